"""The state machine of a KVCache in which names pin prefixes, of any salt, while everything else goes on."""

from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule

from edgekv.core.block_pool import BlockState
from edgekv.core.prefix_tree import OPEN_SALT
from edgekv.core.sampling import SamplingParams
from edgekv.core.sequence import Sequence, SequenceSpec
from tests.property.kv_cache_machine import BLOCK_SIZE, KVCacheMachine

NAMES = ("house", "tools", "style")


class PinningMachine(KVCacheMachine):
    """What a name pins is there until the name is given up, whoever comes and goes."""

    def __init__(self) -> None:
        super().__init__()
        self.pinned: dict[str, tuple[bytes, list[int]]] = {}

    @precondition(lambda self: self.seen)
    @rule(
        name=st.sampled_from(NAMES),
        which=st.integers(0, 100),
        most=st.integers(1, 4),
        salt=st.sampled_from([OPEN_SALT, OPEN_SALT, b"", b"tenant"]),
        priority=st.integers(0, 2),
    )
    def pin(self, name: str, which: int, most: int, salt: bytes, priority: int) -> None:
        """Pin the full blocks that some text has in the cache."""
        text = self.seen[which % len(self.seen)]
        chain = self.cache.chain(text, salt)[:most]
        if chain and name not in self.pinned:
            self.cache.pin_prefix(name, chain, priority=priority)
            self.pinned[name] = salt, text[: len(chain) * BLOCK_SIZE]

    @precondition(lambda self: self.pinned)
    @rule(which=st.integers(0, 2))
    def unpin_a_name(self, which: int) -> None:
        name = sorted(self.pinned)[which % len(self.pinned)]
        self.cache.unpin_prefix(name)
        del self.pinned[name]
        self.memory.forget_free_blocks()

    @precondition(lambda self: self.pinned)
    @rule(
        which=st.integers(0, 2),
        tail=st.sampled_from([[0] * 9, [0] * 5, [0, 0, 0, 0, 1, 1], [1] * 3]),
        salt=st.sampled_from([b"", b"tenant", b"other tenant"]),
    )
    def continue_a_pinned_text(self, which: int, tail: list[int], salt: bytes) -> None:
        """Somebody's prompt begins with it: computed at once, so that what follows is often published."""
        _, text = self.pinned[sorted(self.pinned)[which % len(self.pinned)]]
        before = len(self.running)
        self.admit([*text, *tail], 0, salt)
        if len(self.running) > before:
            self.advance(before, [0], len(text) + len(tail))

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 100))
    def fail(self, which: int) -> None:
        """A sequence ends, and what it left is not to be trusted: which takes no pinned block away."""
        sequence = self.running.pop(which % len(self.running))
        self.cache.unpin()
        self.cache.distrust(sequence)
        self.cache.release(sequence)
        self.memory.forget_free_blocks()

    @invariant()
    def what_is_pinned_can_be_had(self) -> None:
        """Whole, with the right content, by anybody who may see it."""
        for name, (salt, text) in self.pinned.items():
            blocks = set()
            for reader in (salt, b"stranger") if salt == OPEN_SALT else (salt,):
                spec = SequenceSpec(-1, (*text, 0), SamplingParams(max_tokens=1), salt=reader)
                sequence = Sequence.from_spec(spec, 0)
                nodes = self.cache.match(sequence).nodes
                assert len(nodes) == len(text) // BLOCK_SIZE, f"part of {name} is gone"
                sequence.block_table = [node.block for node in nodes if node.block is not None]
                self.memory.check(sequence, len(text))
                assert all(self.cache.pool.state(b) is BlockState.ACTIVE for b in sequence.block_table)
                blocks.update(sequence.block_table)

    def teardown(self) -> None:
        for name in self.pinned:
            self.cache.unpin_prefix(name)
        super().teardown()
