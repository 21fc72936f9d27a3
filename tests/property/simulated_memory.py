"""A plain model of KV memory: each slot remembers the whole context that its keys and values were computed from."""

from edgekv.core.block_pool import BlockState
from edgekv.core.kv_cache import KVCache
from edgekv.core.prefix_tree import OPEN_SALT
from edgekv.core.sequence import Sequence
from edgekv.core.step import BlockCopy

Content = tuple[bytes, tuple[int, ...]]


class SimulatedMemory:
    """Slots by block. A key or value depends on every token before it, so a slot's content is (salt, tokens up to it).

    Reading a slot that holds anything else is exactly the fault that a real cache would turn into wrong text.
    """

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self.slots: dict[tuple[int, int], Content] = {}

    def copy(self, copies: list[BlockCopy]) -> None:
        for copy in copies:
            assert copy.source != copy.target, f"block {copy.source} is copied onto itself"
            assert self.cache.pool.refs(copy.source) > 0, f"block {copy.source} is copied from and held by nobody"
            for slot in range(copy.num_tokens):
                self.slots[copy.target, slot] = self.slots[copy.source, slot]

    def copy_all(self, copies: list[BlockCopy]) -> None:
        """Whole blocks, of which slots never written stay empty."""
        moved = {(c.target, slot): self.slots.get((c.source, slot)) for c in copies for slot in range(c.num_tokens)}
        for slot, content in moved.items():
            self.slots.pop(slot, None)
            if content is not None:
                self.slots[slot] = content

    def forget_segment(self, segment: int) -> None:
        """The segment is gone, and whatever it held."""
        size = self.cache.pool.segment_blocks
        self.slots = {slot: content for slot, content in self.slots.items() if slot[0] // size != segment}

    def compute(self, sequence: Sequence, start: int, end: int) -> None:
        """Write positions start..end-1, reading all before them."""
        self.check(sequence, start)
        for position in range(start, end):
            block = sequence.block_table[position // self.cache.block_size]
            assert self.cache.pool.refs(block) == 1, f"block {block} is shared and written to"
            self.slots[block, position % self.cache.block_size] = self._content(sequence, position)

    def check(self, sequence: Sequence, end: int) -> None:
        """Every position before `end` holds this sequence's own context, of its own salt or open to all."""
        for position in range(end):
            slot = sequence.block_table[position // self.cache.block_size], position % self.cache.block_size
            salt, context = self._content(sequence, position)
            assert self.slots.get(slot) in ((salt, context), (OPEN_SALT, context)), f"slot {slot} holds another context"

    def forget_free_blocks(self) -> None:
        """Poison what is free, so that a stale reference cannot read right by luck."""
        for block in {block for block, _ in self.slots}:
            if self.cache.pool.state(block) is BlockState.FREE:
                for slot in range(self.cache.block_size):
                    self.slots.pop((block, slot), None)

    def _content(self, sequence: Sequence, position: int) -> Content:
        return sequence.spec.salt, tuple(sequence.tokens[: position + 1])
