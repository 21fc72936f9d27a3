"""The memory of the KV cache: segments that are allocated and freed one by one.

Runs in: engine thread; owns: the cache's device memory. Which block holds what is the block pool's to know.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from edgekv.core.capacity import KVShape
from edgekv.core.step import BlockCopy
from edgekv.engine.segment_memory import SegmentMemory
from edgekv.kernels.attn.cache import CacheSegment, PagedCache


@dataclass(frozen=True, slots=True)
class PoolShape:
    """A `KVShape` of its own, for pools without a model."""

    num_layers: int
    num_kv_heads: int
    head_dim: int


class KVPool:
    """Keys and values of every block of every layer.

    A block id is `segment << log2(segment_blocks) | block of the segment`. Segment: [layers, 2, kv_heads, blocks,
    block_size, head_dim]. Invariant: every slot of a block that has been written since it was taken is finite or its
    own sequence's doing, because whoever writes a block's first slot clears the rest (attention on append, `copy`
    here); so what an earlier owner left can never reach another's result.
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
        if segment_blocks < 1 or segment_blocks & (segment_blocks - 1):
            raise ValueError(f"segment_blocks must be a power of two, not {segment_blocks}")
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, not {block_size}")
        self.num_layers = shape.num_layers
        self._segments: dict[int, CacheSegment] = {}
        self._memory: dict[int, SegmentMemory] = {}
        self._commit = commit
        self.block_size = block_size
        self.segment_blocks = segment_blocks
        self.cache = PagedCache(
            segments=self._segments,
            segment_shift=segment_blocks.bit_length() - 1,
            block_size=block_size,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            dtype=dtype,
            device=device,
        )

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
    def block_bytes(self) -> int:
        """Bytes of one block: K and V of `block_size` tokens in every layer."""
        cache = self.cache
        return self.num_layers * 2 * cache.num_kv_heads * self.block_size * cache.head_dim * cache.dtype.itemsize

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
        cache = self.cache
        index = next(i for i in range(len(self._segments) + 1) if i not in self._segments)
        shape = (self.num_layers, 2, cache.num_kv_heads, num_blocks, self.block_size, cache.head_dim)
        memory = SegmentMemory(shape, dtype=cache.dtype, device=cache.device, commit=self._commit)
        assert memory.data is not None
        self._memory[index] = memory
        self._segments[index] = CacheSegment(memory.data)
        return index

    def remove_segment(self, index: int) -> None:
        """Free a segment, to the system. Its blocks must be unused; other segments keep their indices."""
        if index not in self._segments:
            raise ValueError(f"there is no segment {index}")
        del self._segments[index]
        self._memory.pop(index).free()

    def copy(self, copies: Iterable[BlockCopy]) -> None:
        """Copy the first `num_tokens` slots of each source to its target, in order; clear the rest of the target."""
        for copy in copies:
            if not 0 <= copy.num_tokens <= self.block_size:
                raise ValueError(f"a block has {self.block_size} slots; cannot copy {copy.num_tokens} of {copy.source}")
            source, source_block = self._locate(copy.source)
            target, target_block = self._locate(copy.target)
            if copy.source == copy.target:
                raise ValueError(f"block {copy.source} cannot be copied onto itself")
            written = target.data[:, :, :, target_block]  # [layers, 2, kv_heads, block_size, head_dim]
            written[..., : copy.num_tokens, :].copy_(source.data[:, :, :, source_block, : copy.num_tokens])
            if copy.num_tokens < self.block_size:
                written[..., copy.num_tokens :, :].zero_()

    def poison(self, block_ids: Iterable[int]) -> None:
        """Fill blocks with NaN, so that a test sees whoever reads a block that is not theirs."""
        for block_id in block_ids:
            segment, block = self._locate(block_id)
            segment.data[:, :, :, block].fill_(torch.nan)

    def _locate(self, block_id: int) -> tuple[CacheSegment, int]:
        segment = self._segments.get(block_id >> self.cache.segment_shift)
        block = block_id & (self.segment_blocks - 1)
        if segment is None or block >= segment.num_blocks:
            raise ValueError(f"block {block_id} is in no segment of the pool")
        return segment, block
