"""The state machine that drives a KVCache by itself against the plain model of memory."""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from edgekv.core.block_pool import BlockPool, OutOfBlocks
from edgekv.core.kv_cache import KVCache
from edgekv.core.prefix_cache import PrefixCache
from edgekv.core.prefix_tree import OPEN_SALT, Hasher, block_key
from edgekv.core.sampling import SamplingParams
from edgekv.core.sequence import Sequence, SequenceSpec
from tests.property.simulated_memory import SimulatedMemory

BLOCK_SIZE = 4


class KVCacheMachine(RuleBasedStateMachine):
    """Sequences over a three-letter alphabet share prefixes often; the pool is small, so eviction is the rule."""

    pool_class: type[BlockPool] = BlockPool
    prefix_class: type[PrefixCache] = PrefixCache
    cache_class: type[KVCache] = KVCache
    hasher: Hasher = staticmethod(block_key)
    operations = 0

    @initialize(sizes=st.lists(st.integers(2, 4), min_size=1, max_size=4))
    def build(self, sizes: list[int]) -> None:
        pool = self.pool_class(block_size=BLOCK_SIZE, segment_blocks=4)
        for size in sizes:
            pool.add_segment(size)
        self.cache = self.cache_class(pool, self.prefix_class(BLOCK_SIZE, type(self).hasher))
        self.memory = SimulatedMemory(self.cache)
        self.running: list[Sequence] = []
        self.born = 0
        self.seen: list[list[int]] = []

    @rule(
        prompt=st.lists(st.integers(0, 2), min_size=1, max_size=22),
        again=st.integers(0, 40),
        salt=st.sampled_from([b"", b"", b"tenant", OPEN_SALT]),
    )
    def admit(self, prompt: list[int], again: int, salt: bytes) -> None:
        """A new sequence; most of them begin like an earlier one."""
        if self.seen and again:
            prompt = self.seen[again % len(self.seen)][:again] + prompt
        self.born += 1
        spec = SequenceSpec(self.born, tuple(prompt), SamplingParams(max_tokens=1), salt=salt)
        sequence = Sequence.from_spec(spec, self.born)
        match = self.cache.match(sequence)
        assert match.cached_tokens(BLOCK_SIZE) < len(prompt), "nothing is left to compute"
        if not self.cache.can_admit(sequence, match, 0):
            return
        self.memory.copy(self.cache.admit(sequence, match))
        self.memory.check(sequence, sequence.num_computed)
        self.running.append(sequence)
        self.seen.append(sequence.tokens)

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 100), tokens=st.lists(st.integers(0, 2), min_size=1, max_size=6), most=st.integers(1, 9))
    def advance(self, which: int, tokens: list[int], most: int) -> None:
        """Compute a chunk of a sequence, or generate more tokens when its prompt is done."""
        sequence = self.running[which % len(self.running)]
        if sequence.num_uncomputed == 0:
            sequence.tokens += tokens
            if not self.cache.can_grow(sequence):
                del sequence.tokens[-len(tokens) :]
                return
            self.cache.grow(sequence)
        self.memory.forget_free_blocks()
        end = min(len(sequence.tokens), sequence.num_computed + most)
        self.memory.compute(sequence, sequence.num_computed, end)
        sequence.num_computed = end
        self.cache.unpin()
        self.cache.publish(sequence)

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 100))
    def finish(self, which: int) -> None:
        self.cache.release(self.running.pop(which % len(self.running)))
        self.memory.forget_free_blocks()

    @rule()
    def end_step(self) -> None:
        self.cache.unpin()

    @precondition(lambda self: self.born % 8 == 7)
    @rule()
    def flush(self) -> None:
        self.cache.flush()
        assert self.cache.pool.cached_blocks == 0
        self.memory.forget_free_blocks()

    @rule(size=st.integers(1, 4))
    def grow_pool(self, size: int) -> None:
        if self.cache.pool.total_blocks < 24:
            self.cache.pool.add_segment(size)

    @precondition(lambda self: len(self.cache.pool.segments) > 1)
    @rule(which=st.integers(0, 5), more=st.integers(0, 2))
    def shrink_pool(self, which: int, more: int) -> None:
        """Vacate any segments between steps, and take them away."""
        self.cache.unpin()
        segments = sorted(self.cache.pool.segments)
        gone = segments[which % len(segments) :][: 1 + more]
        try:
            copies = self.cache.vacate(gone, self.running)
        except OutOfBlocks:
            return
        self.memory.copy_all(copies)
        for segment in gone:
            self.cache.pool.remove_segment(segment)
            self.memory.forget_segment(segment)

    @invariant()
    def invariants_hold(self) -> None:
        type(self).operations += 1
        if hasattr(self, "cache"):
            self.cache.check_integrity(self.running)
            for sequence in self.running:
                self.memory.check(sequence, sequence.num_computed)

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            self.cache.unpin()
            for sequence in self.running:
                self.cache.release(sequence)
            self.cache.flush()
            assert self.cache.pool.free_blocks == self.cache.pool.total_blocks, "a block leaked"
