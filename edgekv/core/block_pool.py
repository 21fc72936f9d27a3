"""The blocks of the KV cache as numbers: which are free, cached or active, and who holds them.

Runs in: engine thread; owns: the state and reference count of every block. No memory lives here; the engine's KV pool
keeps the tensors that these numbers name.

A block id is `segment << shift | slot`, so that the segment of a block is a shift away and segments come and go
without renumbering.

          allocate                    release(keep=True)
    FREE ----------> ACTIVE (refs>0) --------------------> CACHED (refs=0, published)
     ^                 |   ^                                |  |
     +-----------------+   +------------- retain -----------+  |
     | release(keep=False)                                     |
     +----------------------------- reclaim -------------------+
"""

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from enum import Enum, auto

from edgekv.core.step import PoolStats


class OutOfBlocks(Exception):
    """More blocks were asked for than are free."""

    def __init__(self, asked_blocks: int, free_blocks: int) -> None:
        super().__init__(f"{asked_blocks} blocks asked, {free_blocks} free")
        self.asked_blocks, self.free_blocks = asked_blocks, free_blocks


class BlockState(Enum):
    """Where a block is; every block of the pool is in exactly one state."""

    FREE = auto()
    CACHED = auto()
    ACTIVE = auto()


@dataclass(slots=True)
class _Segment:
    """One device allocation: its size, the free slots in it (a stack), and how many blocks of it are active."""

    num_blocks: int
    free: list[int] = field(default_factory=list)
    num_active: int = 0


class BlockPool:
    """Reference counts and free lists over segments.

    Invariant: free + cached + active = the blocks of all segments, and a block is active exactly while its reference
    count is above zero.

    Args:
        block_size: tokens in a block.
        segment_blocks: the most blocks a segment holds; a power of two.
    """

    def __init__(self, *, block_size: int, segment_blocks: int) -> None:
        if block_size < 1:
            raise ValueError(f"block_size is {block_size}, must be at least 1")
        if segment_blocks < 1 or segment_blocks & (segment_blocks - 1):
            raise ValueError(f"segment_blocks is {segment_blocks}, must be a power of two")
        self.block_size = block_size
        self.segment_blocks = segment_blocks
        self._shift = segment_blocks.bit_length() - 1
        self._segments: dict[int, _Segment] = {}
        self._refs: dict[int, int] = {}
        self._cached: set[int] = set()
        self._num_free = 0
        self._num_total = 0
        self._most_blocks = 0

    @property
    def segments(self) -> dict[int, int]:
        """Blocks of each segment, by its index."""
        return {index: segment.num_blocks for index, segment in self._segments.items()}

    @property
    def total_blocks(self) -> int:
        """Blocks of all segments."""
        return self._num_total

    @property
    def most_blocks(self) -> int:
        """The most blocks that the pool has had, and may have again."""
        return self._most_blocks

    @property
    def free_blocks(self) -> int:
        """Blocks that hold nothing."""
        return self._num_free

    @property
    def cached_blocks(self) -> int:
        """Blocks that hold published content nobody uses at the moment."""
        return len(self._cached)

    @property
    def active_blocks(self) -> int:
        """Blocks in at least one block table (or pinned for a copy)."""
        return len(self._refs)

    def stats(self) -> PoolStats:
        """The counts, for reports."""
        return PoolStats(self.total_blocks, self.free_blocks, self.cached_blocks, self.active_blocks, self.block_size)

    def state(self, block: int) -> BlockState:
        """The block's state. Raises KeyError if no segment holds it."""
        if block in self._refs:
            return BlockState.ACTIVE
        if block in self._cached:
            return BlockState.CACHED
        if (block & (self.segment_blocks - 1)) >= self._segments[block >> self._shift].num_blocks:
            raise KeyError(block)
        return BlockState.FREE

    def refs(self, block: int) -> int:
        """How many hold the block."""
        return self._refs.get(block, 0)

    def add_segment(self, num_blocks: int) -> int:
        """Add a segment of `num_blocks` free blocks; returns its index (the lowest one not in use)."""
        if not 1 <= num_blocks <= self.segment_blocks:
            raise ValueError(f"a segment holds 1 to {self.segment_blocks} blocks, not {num_blocks}")
        index = next(i for i in range(len(self._segments) + 1) if i not in self._segments)
        base = index << self._shift
        self._segments[index] = _Segment(num_blocks, [base | slot for slot in reversed(range(num_blocks))])
        self._num_free += num_blocks
        self._num_total += num_blocks
        self._most_blocks = max(self._most_blocks, self._num_total)
        return index

    def remove_segment(self, index: int) -> None:
        """Take away a segment. Raises ValueError unless all its blocks are free."""
        segment = self._segments[index]
        if len(segment.free) != segment.num_blocks:
            raise ValueError(f"segment {index} still holds {segment.num_blocks - len(segment.free)} blocks")
        del self._segments[index]
        self._num_free -= segment.num_blocks
        self._num_total -= segment.num_blocks

    def forget_growth(self) -> None:
        """What the pool has lost does not come back: `most_blocks` is what there is now."""
        self._most_blocks = self._num_total

    def cached_blocks_in(self, index: int) -> list[int]:
        """The blocks of a segment that are cached."""
        return [block for block in self._blocks_of(index) if block in self._cached]

    def active_blocks_in(self, index: int) -> list[int]:
        """The blocks of a segment that are active."""
        if self._segments[index].num_active == 0:
            return []
        return [block for block in self._blocks_of(index) if block in self._refs]

    def emptiest_segments(self) -> list[int]:
        """The segments in the order of their active blocks, the fewest first; the later of equals first."""
        segments = self._segments
        return sorted(segments, key=lambda index: (segments[index].num_active, -index))

    def free_blocks_beside(self, indices: Collection[int]) -> int:
        """Free blocks in all segments but these."""
        return self._num_free - sum(len(self._segments[index].free) for index in indices)

    def allocate(self, num_blocks: int, *, beside: Collection[int] = ()) -> list[int]:
        """Make `num_blocks` free blocks active with one reference each; none of the segments `beside`.

        Takes from the fullest segments first, so that emptying one stays cheap. Raises OutOfBlocks, taking none.
        """
        free = self.free_blocks_beside(beside)
        if num_blocks > free:
            raise OutOfBlocks(num_blocks, free)
        taken: list[int] = []
        open_segments = [segment for index, segment in self._segments.items() if index not in beside]
        while len(taken) < num_blocks:
            fullest = min((s for s in open_segments if s.free), key=lambda s: len(s.free))
            while fullest.free and len(taken) < num_blocks:
                taken.append(fullest.free.pop())
                fullest.num_active += 1
        for block in taken:
            self._refs[block] = 1
        self._num_free -= num_blocks
        return taken

    def retain(self, block: int) -> None:
        """One more holder of an active or cached block. Raises ValueError for a free one."""
        if block in self._refs:
            self._refs[block] += 1
        elif block in self._cached:
            self._cached.remove(block)
            self._refs[block] = 1
            self._segments[block >> self._shift].num_active += 1
        else:
            raise ValueError(f"block {block} is free and cannot be retained")

    def release(self, block: int, *, keep: bool) -> bool:
        """One holder less. At zero the block becomes cached if `keep` (its content is published), else free.

        Returns whether it reached zero. Raises ValueError if nobody holds it.
        """
        refs = self._refs.get(block)
        if refs is None:
            raise ValueError(f"block {block} is held by nobody and cannot be released")
        if refs > 1:
            self._refs[block] = refs - 1
            return False
        del self._refs[block]
        self._segments[block >> self._shift].num_active -= 1
        if keep:
            self._cached.add(block)
        else:
            self._free(block)
        return True

    def hand_over(self, block: int, to: int) -> None:
        """All holders of `block` hold the freshly allocated `to` instead; `block` is free."""
        if self._refs[to] != 1:
            raise ValueError(f"block {to} has holders of its own")
        self._refs[to] = self._refs.pop(block)
        self._segments[block >> self._shift].num_active -= 1
        self._free(block)

    def reclaim(self, blocks: Iterable[int]) -> None:
        """Make those blocks free that are cached: their content is no longer published."""
        for block in blocks:
            if block in self._cached:
                self._cached.remove(block)
                self._free(block)

    def check_integrity(self) -> None:
        """Raise AssertionError where the invariant does not hold."""
        free = {block for segment in self._segments.values() for block in segment.free}
        assert len(free) == sum(len(s.free) for s in self._segments.values()), "a block is free twice"
        assert len(free) == self._num_free, f"{len(free)} blocks in the free lists, {self._num_free} counted"
        assert self._num_total == sum(s.num_blocks for s in self._segments.values()), "total is wrong"
        assert not free & self._cached, "a block is free and cached"
        assert not free & self._refs.keys(), "a block is free and referenced"
        assert not self._cached & self._refs.keys(), "a block is cached and referenced"
        assert all(refs > 0 for refs in self._refs.values()), "an active block has no holder"
        active = Counter(block >> self._shift for block in self._refs)
        for index, segment in self._segments.items():
            counted = segment.num_active
            assert counted == active[index], f"segment {index}: {active[index]} active blocks, {counted} counted"
        assert self._num_total <= self._most_blocks, "the pool is larger than it has ever been"
        assert self._num_free + self.cached_blocks + self.active_blocks == self._num_total, "a block is lost"

    def _blocks_of(self, index: int) -> range:
        base = index << self._shift
        return range(base, base + self._segments[index].num_blocks)

    def _free(self, block: int) -> None:
        self._segments[block >> self._shift].free.append(block)
        self._num_free += 1
