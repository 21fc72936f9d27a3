"""What edgekv's attention is compared with: torch's over memory of its own, and FlashInfer's where it is installed.

Runs in: the main thread; owns: the peers' memory.
"""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.bench import Bench, NotMeasured, copies_of
from bench.gpu.paged import BLOCK_SIZE

FLASHINFER_WORKSPACE_BYTES = 128 << 20


class DenseDecode:
    """Keys and values of all sequences side by side, or in blocks that are gathered first: what plain torch can do."""

    def __init__(self, bench: Bench, sequences: int, context: int) -> None:
        """Raises NotMeasured where there is no room."""
        heads = bench.sizes.heads
        self._blocks = -(-context // BLOCK_SIZE)
        # With whole blocks both read alike.
        shape = (heads.keys, sequences * self._blocks, BLOCK_SIZE, heads.dim)
        layer_bytes = 2 * heads.keys * sequences * self._blocks * BLOCK_SIZE * heads.dim * bench.act.itemsize
        layers = copies_of(bench.sizes.arena_bytes, layer_bytes, most=64)
        bench.need((layers + 2) * layer_bytes)
        self._keys = [bench.normal(*shape) for _ in range(layers)]
        self._values = [bench.normal(*shape) for _ in range(layers)]
        order = torch.randperm(sequences * self._blocks, generator=torch.Generator().manual_seed(1))
        self._order = order.to(bench.device)
        # The heads of a group are rows of one product: so keys are read once.
        self._q = bench.normal(sequences, heads.keys, heads.queries // heads.keys, heads.dim)

    def contiguous(self) -> list[Callable[[], Tensor]]:
        """SDPA over [sequences, kv_heads, context, dim]."""
        sequences, kv_heads, _, dim = self._q.shape
        shape = (sequences, kv_heads, self._blocks * BLOCK_SIZE, dim)
        return [
            partial(F.scaled_dot_product_attention, self._q, keys.view(shape), values.view(shape))
            for keys, values in zip(self._keys, self._values, strict=True)
        ]

    def gathered(self) -> list[Callable[[], Tensor]]:
        """Blocks by index_select, then SDPA."""
        return [
            partial(self._gather_and_attend, keys, values)
            for keys, values in zip(self._keys, self._values, strict=True)
        ]

    def _gather_and_attend(self, keys: Tensor, values: Tensor) -> Tensor:
        sequences, kv_heads, _, dim = self._q.shape
        shape = (kv_heads, sequences, self._blocks * BLOCK_SIZE, dim)
        sides = (side.index_select(1, self._order).view(shape).transpose(0, 1) for side in (keys, values))
        return F.scaled_dot_product_attention(self._q, *sides)


def flashinfer_decode(
    bench: Bench, sequences: int, context: int, *, tensor_cores: bool
) -> list[Callable[[], Tensor]]:
    """FlashInfer's paged decode, as many layers as fill the arena. Raises NotMeasured where it cannot be had."""
    if not bench.rig.is_real:
        raise NotMeasured("needs a card")
    try:
        flashinfer: Any = importlib.import_module("flashinfer")
    except ImportError as error:
        raise NotMeasured(f"flashinfer is not installed ({error})") from None
    heads, blocks = bench.sizes.heads, -(-context // BLOCK_SIZE)
    layer_bytes = 2 * heads.keys * sequences * blocks * BLOCK_SIZE * heads.dim * bench.act.itemsize
    layers = copies_of(bench.sizes.arena_bytes, layer_bytes, most=64)
    bench.need(layers * layer_bytes + FLASHINFER_WORKSPACE_BYTES)
    pages = sequences * blocks
    caches = [bench.normal(pages, 2, heads.keys, BLOCK_SIZE, heads.dim) for _ in range(layers)]
    workspace = torch.zeros(FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device=bench.device)
    numbers = partial(torch.tensor, dtype=torch.int32, device=bench.device)
    try:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=tensor_cores)
        wrapper.plan(
            numbers([blocks * i for i in range(sequences + 1)]),
            torch.randperm(pages, generator=torch.Generator().manual_seed(2)).to(torch.int32).to(bench.device),
            numbers([context - (blocks - 1) * BLOCK_SIZE] * sequences),
            heads.queries, heads.keys, heads.dim, BLOCK_SIZE,
            q_data_type=bench.act, kv_data_type=bench.act,
        )  # fmt: skip
    except Exception as error:
        # Another project's: it may want a compiler, files, or another version of something.
        raise NotMeasured(f"flashinfer: {type(error).__name__}: {str(error)[:120]}") from None
    q = bench.normal(sequences, heads.queries, heads.dim)
    return [partial(wrapper.run, q, cache) for cache in caches]
