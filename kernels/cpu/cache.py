"""The native KV cache as the library sees it: a table of segments that follows the pool's.

Runs in: engine thread; owns: the table (the pool owns the memory).
"""

import ctypes
from collections.abc import Mapping
from typing import Protocol

from edgekv.kernels.cpu.abi import Cache, KvFormat, Segment

FORMATS: Mapping[str, KvFormat] = {
    "float32": KvFormat.F32,
    "float16": KvFormat.F16,
    "bfloat16": KvFormat.BF16,
    "int8": KvFormat.INT8,
}


class Allocated(Protocol):
    """A segment of the pool."""

    @property
    def address(self) -> int:
        """Where its bytes begin, in the layout of src/ek.h."""

    @property
    def num_blocks(self) -> int:
        """Blocks in it."""


class SegmentPool(Protocol):
    """The pool whose segments these are."""

    segment_shift: int
    block_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    generation: int
    """Another one whenever a segment came or went."""

    @property
    def kv_format(self) -> str:
        """Of `FORMATS`."""

    @property
    def allocated(self) -> Mapping[int, Allocated]:
        """Every segment, by index; indices may have holes and segments may differ in size."""


class NativeCache:
    """All segments of one pool.

    It holds none of them: an idle pool's memory would stay until the next step.
    """

    def __init__(self, pool: SegmentPool) -> None:
        self._pool, self._generation = pool, -1
        self._struct = Cache(
            None, 0, pool.segment_shift, FORMATS[pool.kv_format], pool.num_layers, pool.num_kv_heads, pool.head_dim,
            pool.block_size,
        )  # fmt: skip
        self._table: ctypes.Array[Segment] = (Segment * 0)()

    def struct(self) -> Cache:
        """The ek_cache of this moment; valid until a segment goes."""
        if self._generation != self._pool.generation:
            self._generation, segments = self._pool.generation, self._pool.allocated
            self._table = (Segment * (max(segments, default=-1) + 1))()
            for index, segment in segments.items():
                self._table[index] = Segment(segment.address, segment.num_blocks)
            self._struct.segments = ctypes.addressof(self._table)
            self._struct.num_segments = len(self._table)
        return self._struct
