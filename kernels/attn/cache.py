"""The cache's memory as kernels see it: segments of blocks, each a tensor of its own.

Runs in: engine thread; owns: nothing (the pool allocates and frees; kernels read and write through these views).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


class CacheSegment:
    """One allocation of blocks and the per-layer views that append and gather use.

    The layout puts a block of one head in one contiguous row, because gathering such rows from a flat matrix is twice
    as fast as any other way torch has (`bench/attention.py`).
    """

    __slots__ = ("block_rows", "data", "num_blocks", "slots")

    def __init__(self, data: Tensor) -> None:
        """`data`: [layers, 2, kv_heads, blocks, block_size, head_dim], contiguous; K is 0 and V is 1 of the second."""
        _, _, kv_heads, num_blocks, block_size, head_dim = data.shape
        self.data = data
        self.num_blocks = num_blocks
        self.block_rows = tuple(layer.view(2 * kv_heads * num_blocks, block_size * head_dim) for layer in data)
        self.slots = tuple(layer.view(2 * kv_heads, num_blocks * block_size, head_dim) for layer in data)


@dataclass(frozen=True, slots=True)
class PagedCache:
    """Every segment of one pool, by index; indices may have holes and segments may differ in size."""

    segments: Mapping[int, CacheSegment]
    segment_shift: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """What attention computes in: float16 is 3 to 5 times slower than float32 on a CPU, conversion included."""
        return torch.float32 if self.device.type == "cpu" and self.dtype == torch.float16 else self.dtype
