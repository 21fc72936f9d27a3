"""Runs one step's plan through the model.

Runs in: engine thread; owns: attention's scratch memory.
"""

from typing import Protocol

import torch
from torch import Tensor

from edgekv.core.kv_format import KVShape
from edgekv.core.step import StepPlan
from edgekv.engine.batch import build_batch
from edgekv.engine.kv_pool import KVPool
from edgekv.kernels.attn.interface import Attention
from edgekv.kernels.attn.paged_torch import PagedAttention
from edgekv.kernels.attn.workspace import Workspace


class RunnableSpec(KVShape, Protocol):
    """What the runner must know of a model; a `ModelSpec` is one."""

    @property
    def vocab_size(self) -> int:
        """Token ids are 0 .. vocab_size - 1."""
        ...


class RunnableModel(Protocol):
    """What the runner runs; a `CausalLM` is one."""

    @property
    def spec(self) -> RunnableSpec:
        """The shape of the model."""
        ...

    def forward(self, token_ids: Tensor, positions: Tensor, attention: Attention, sample_rows: Tensor) -> Tensor:
        """Logits of `sample_rows`, [rows, vocab_size] float32."""
        ...


class Runner:
    """One model over one pool."""

    def __init__(self, model: RunnableModel, pool: KVPool) -> None:
        """Raises ValueError if the pool was made for another shape of model."""
        spec = model.spec
        wanted = (spec.num_layers, spec.num_kv_heads, spec.head_dim)
        given = (pool.num_layers, pool.cache.num_kv_heads, pool.cache.head_dim)
        if wanted != given:
            raise ValueError(f"the model's (layers, kv heads, head dim) are {wanted}, the pool's {given}")
        self._model = model
        self._pool = pool
        self._workspace = Workspace(pool.cache.device)

    @property
    def model(self) -> RunnableModel:
        """What it runs."""
        return self._model

    @property
    def workspace_bytes(self) -> int:
        """Scratch memory held beside the pool; grows with the longest context so far."""
        return self._workspace.num_bytes

    @torch.inference_mode()
    def forward(self, plan: StepPlan) -> Tensor:
        """Apply the plan's copies, then run its chunks; logits [rows sampled, vocab_size] float32, in order.

        Raises ValueError naming the sequence, before anything is copied or computed, if a chunk's tokens or blocks
        are not of this model and pool.
        """
        cache, vocab_size = self._pool.cache, self._model.spec.vocab_size
        if not plan.chunks:
            self._pool.copy(plan.copies)
            return torch.empty(0, vocab_size, device=cache.device)
        batch = build_batch(plan.chunks, self._pool, vocab_size)
        self._pool.copy(plan.copies)
        attention = PagedAttention(cache, batch.ragged, self._workspace)
        token_ids, positions, sample_rows = (
            torch.from_numpy(ints).to(cache.device) for ints in (batch.token_ids, batch.positions, batch.sample_rows)
        )
        return self._model.forward(token_ids, positions, attention, sample_rows)
