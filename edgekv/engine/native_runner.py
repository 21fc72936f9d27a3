"""Runs one step's plan through a model that was lowered to the native CPU kernels: one call a step.

Runs in: engine thread; owns: nothing (the model keeps its buffers).
"""

import torch
from torch import Tensor

from edgekv.core.step import StepPlan
from edgekv.engine.batch import build_batch
from edgekv.engine.native_pool import NativeKVPool
from edgekv.kernels.cpu.cache import NativeCache
from edgekv.model.native_lm import NativeLM


class NativeRunner:
    """One model over one pool."""

    def __init__(self, model: NativeLM, pool: NativeKVPool) -> None:
        """Raises ValueError if the pool was made for another shape of model."""
        spec = model.spec
        wanted = (spec.num_layers, spec.num_kv_heads, spec.head_dim)
        given = (pool.num_layers, pool.num_kv_heads, pool.head_dim)
        if wanted != given:
            raise ValueError(f"the model's (layers, kv heads, head dim) are {wanted}, the pool's {given}")
        self._model = model
        self._pool = pool
        self._cache = NativeCache(pool)

    @property
    def model(self) -> NativeLM:
        """What it runs."""
        return self._model

    @property
    def workspace_bytes(self) -> int:
        """Scratch memory held beside the pool; grows with the largest step so far."""
        return self._model.workspace_bytes

    def forward(self, plan: StepPlan) -> Tensor:
        """Apply the plan's copies, then run its chunks; logits [rows sampled, vocab_size] float32, in order.

        The logits are valid until the next call. Raises ValueError naming the sequence, before anything is copied or
        computed, if a chunk's tokens or blocks are not of this model and pool.
        """
        vocab_size = self._model.spec.vocab_size
        if not plan.chunks:
            self._pool.copy(plan.copies)
            return torch.empty(0, vocab_size)
        batch = build_batch(plan.chunks, self._pool, vocab_size)
        self._pool.copy(plan.copies)
        logits = self._model.forward(self._cache, batch.token_ids, batch.positions, batch.sample_rows, batch.ragged)
        return torch.from_numpy(logits)
