"""The memory of the KV cache: segments that are allocated and freed one by one.

Runs in: engine thread; owns: the cache's device memory. Which block holds what is the block pool's to know.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from edgekv.core.kv_format import KVShape
from edgekv.core.step import BlockCopy
from edgekv.engine.segment_memory import SegmentMemory
from edgekv.kernels.attn.cache import CacheSegment, PagedCache
from edgekv.kernels.attn.ragged import Ints


@dataclass(frozen=True, slots=True)
class PoolShape:
    """A `KVShape` of its own, for pools without a model."""

    num_layers: int
    num_kv_heads: int
    head_dim: int


class Segment(Protocol):
    """One allocation of blocks, in whatever layout."""

    @property
    def data(self) -> Tensor:
        """All of it."""

    @property
    def num_blocks(self) -> int:
        """How many it has."""


SegmentT = TypeVar("SegmentT", bound=Segment)


class BlockMemory(ABC, Generic[SegmentT]):
    """Keys and values of every block of every layer, in some layout.

    A block id is `segment << log2(segment_blocks) | block of the segment`.
    """

    def __init__(self, shape: KVShape, *, device: torch.device, block_size: int, segment_blocks: int) -> None:
        """No segment yet. Raises ValueError for sizes that make no sense."""
        if segment_blocks < 1 or segment_blocks & (segment_blocks - 1):
            raise ValueError(f"segment_blocks must be a power of two, not {segment_blocks}")
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, not {block_size}")
        self.num_layers = shape.num_layers
        self.num_kv_heads = shape.num_kv_heads
        self.head_dim = shape.head_dim
        self.device = device
        self.block_size = block_size
        self.segment_blocks = segment_blocks
        self.segment_shift = segment_blocks.bit_length() - 1
        self._segments: dict[int, SegmentT] = {}
        self._memory: dict[int, SegmentMemory] = {}
        self.generation = 0
        """Another one whenever a segment came or went."""
        self.segment_sizes: Ints = np.zeros(0, np.int64)
        """Blocks of every segment by its index, 0 where there is none."""

    @property
    @abstractmethod
    def block_bytes(self) -> int:
        """Bytes of one block: K and V of `block_size` tokens in every layer."""

    @abstractmethod
    def _allocate(self, num_blocks: int) -> tuple[SegmentMemory, SegmentT]:
        """Memory for a segment, and the segment in it. Raises MemoryError, or torch's like, keeping nothing."""

    @abstractmethod
    def _copy(self, source: SegmentT, source_block: int, target: SegmentT, target_block: int, num_tokens: int) -> None:
        """Copy the first `num_tokens` slots; of the others none may hold what an earlier owner left."""

    @abstractmethod
    def _poison(self, segment: SegmentT, block: int) -> None:
        """Fill with NaN."""

    @property
    def allocated(self) -> Mapping[int, SegmentT]:
        """Every segment by index; the mapping stays the same and changes with the pool."""
        return self._segments

    @property
    def segments(self) -> Mapping[int, int]:
        """Blocks in each segment, by segment index."""
        return {index: segment.num_blocks for index, segment in sorted(self._segments.items())}

    @property
    def num_blocks(self) -> int:
        """Blocks in all segments."""
        return sum(segment.num_blocks for segment in self._segments.values())

    @property
    def num_tokens(self) -> int:
        """Tokens that all blocks together can hold."""
        return self.num_blocks * self.block_size

    @property
    def num_bytes(self) -> int:
        """Bytes allocated now."""
        return self.num_blocks * self.block_bytes

    def add_segment(self, num_blocks: int) -> int:
        """Allocate a segment and return its index, the lowest that is absent.

        Raises MemoryError, or torch's like, keeping nothing.
        """
        if not 1 <= num_blocks <= self.segment_blocks:
            raise ValueError(f"a segment holds 1 to {self.segment_blocks} blocks, not {num_blocks}")
        index = next(i for i in range(len(self._segments) + 1) if i not in self._segments)
        self._memory[index], self._segments[index] = self._allocate(num_blocks)
        self._note_change()
        return index

    def remove_segment(self, index: int) -> None:
        """Free a segment, to the system. Its blocks must be unused; other segments keep their indices."""
        if index not in self._segments:
            raise ValueError(f"there is no segment {index}")
        del self._segments[index]
        self._note_change()
        self._memory.pop(index).free()

    def copy(self, copies: Iterable[BlockCopy]) -> None:
        """Copy the first `num_tokens` slots of each source to its target, in order."""
        for copy in copies:
            if not 0 <= copy.num_tokens <= self.block_size:
                raise ValueError(f"a block has {self.block_size} slots; cannot copy {copy.num_tokens} of {copy.source}")
            source, source_block = self._locate(copy.source)
            target, target_block = self._locate(copy.target)
            if copy.source == copy.target:
                raise ValueError(f"block {copy.source} cannot be copied onto itself")
            self._copy(source, source_block, target, target_block, copy.num_tokens)

    def poison(self, block_ids: Iterable[int]) -> None:
        """Fill blocks with NaN, so that a test sees whoever reads a block that is not theirs."""
        for block_id in block_ids:
            self._poison(*self._locate(block_id))

    def _note_change(self) -> None:
        self.generation += 1
        sizes = np.zeros(max(self._segments, default=-1) + 1, np.int64)
        for index, segment in self._segments.items():
            sizes[index] = segment.num_blocks
        self.segment_sizes = sizes

    def _locate(self, block_id: int) -> tuple[SegmentT, int]:
        segment = self._segments.get(block_id >> self.segment_shift)
        block = block_id & (self.segment_blocks - 1)
        if segment is None or block >= segment.num_blocks:
            raise ValueError(f"block {block_id} is in no segment of the pool")
        return segment, block


class KVPool(BlockMemory[CacheSegment]):
    """The pool of torch's attention.

    Segment: [layers, 2, kv_heads, blocks, block_size, head_dim]. Invariant: every slot of a block that has been written
    since it was taken is finite or its own sequence's doing, because whoever writes a block's first slot clears the
    rest (attention on append, `copy` here); so what an earlier owner left can never reach another's result.
    """

    def __init__(
        self,
        shape: KVShape,
        *,
        dtype: torch.dtype,
        device: torch.device,
        block_size: int,
        segment_blocks: int,
        commit: bool = True,
    ) -> None:
        """An empty pool.

        Args:
            shape: of the model.
            dtype: of keys and values.
            device: where they are.
            block_size: tokens in a block.
            segment_blocks: the most blocks that one segment can have; a power of two.
            commit: see `SegmentMemory`.
        """
        super().__init__(shape, device=device, block_size=block_size, segment_blocks=segment_blocks)
        self._commit = commit
        self.cache = PagedCache(
            segments=self.allocated,
            segment_shift=self.segment_shift,
            block_size=block_size,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            dtype=dtype,
            device=device,
        )

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: K and V of `block_size` tokens in every layer."""
        elements = self.num_kv_heads * self.block_size * self.head_dim
        return self.num_layers * 2 * elements * self.cache.dtype.itemsize

    def _allocate(self, num_blocks: int) -> tuple[SegmentMemory, CacheSegment]:
        shape = (self.num_layers, 2, self.num_kv_heads, num_blocks, self.block_size, self.head_dim)
        memory = SegmentMemory(shape, dtype=self.cache.dtype, device=self.device, commit=self._commit)
        assert memory.data is not None
        return memory, CacheSegment(memory.data)

    def _copy(
        self, source: CacheSegment, source_block: int, target: CacheSegment, target_block: int, num_tokens: int
    ) -> None:
        written = target.data[:, :, :, target_block]  # [layers, 2, kv_heads, block_size, head_dim]
        written[..., :num_tokens, :].copy_(source.data[:, :, :, source_block, :num_tokens])
        if num_tokens < self.block_size:
            written[..., num_tokens:, :].zero_()

    def _poison(self, segment: CacheSegment, block: int) -> None:
        segment.data[:, :, :, block].fill_(torch.nan)
