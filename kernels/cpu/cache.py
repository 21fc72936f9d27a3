"""The native KV cache as the library sees it: a table of segments that follows the pool's.

Runs in: engine thread; owns: the table (the pool owns the memory).
"""

import ctypes
from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

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
    def data(self) -> Tensor:
        """All of its bytes, in the layout of src/ek.h."""

    @property
    def num_blocks(self) -> int:
        """Blocks in it."""


class NativeCache:
    """Every segment of one pool, by index; indices may have holes and segments may differ in size."""

    def __init__(
        self,
        segments: Mapping[int, Allocated],
        *,
        kv_format: str,
        segment_shift: int,
        block_size: int,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
    ) -> None:
        """`segments` changes with the pool."""
        self.segments = segments
        self.segment_shift, self.block_size = segment_shift, block_size
        self._struct = Cache(
            None, 0, segment_shift, FORMATS[kv_format], num_layers, num_kv_heads, head_dim, block_size
        )
        self._table: ctypes.Array[Segment] = (Segment * 0)()
        self._known: list[Allocated] = []

    def struct(self) -> Cache:
        """The ek_cache of this moment; valid until a segment goes."""
        now = list(self.segments.values())
        # By identity: a segment that comes back under an old index is another one.
        if len(now) != len(self._known) or any(a is not b for a, b in zip(now, self._known, strict=True)):
            self._known = now
            self._table = (Segment * (max(self.segments, default=-1) + 1))()
            for index, segment in self.segments.items():
                self._table[index] = Segment(segment.data.data_ptr(), segment.num_blocks)
            self._struct.segments = ctypes.addressof(self._table)
            self._struct.num_segments = len(self._table)
        return self._struct
