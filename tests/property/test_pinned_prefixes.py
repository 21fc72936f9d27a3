"""Pinned prefixes stay whole through long random lives, no salt sees another's blocks, and planted bugs are caught."""

from collections.abc import Sequence as Listing

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test

from edgekv.core.block_pool import BlockPool
from edgekv.core.kv_cache import KVCache
from edgekv.core.prefix_cache import PrefixCache
from edgekv.core.prefix_tree import OPEN_SALT, Node
from edgekv.core.sampling import SamplingParams
from edgekv.core.sequence import Sequence, SequenceSpec
from tests.property.pinning_machine import PinningMachine
from tests.property.test_kv_cache import four_bit_key

BLOCK_SIZE = 4
LONG = settings(max_examples=400, stateful_step_count=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
HUNT = settings(LONG, max_examples=400, phases=[Phase.generate], database=None, derandomize=True)


class CollidingMachine(PinningMachine):
    hasher = staticmethod(four_bit_key)


def test_what_is_pinned_stays_whole_through_ten_thousand_operations() -> None:
    class CountedMachine(PinningMachine):
        pass

    run_state_machine_as_test(CountedMachine, settings=LONG)
    assert CountedMachine.operations >= 10_000


class ForgetfulCache(KVCache):
    """Planted: a pin does not hold its blocks."""

    def pin_prefix(self, name: str, chain: Listing[Node], *, priority: int = 0) -> None:
        super().pin_prefix(name, chain, priority=priority)
        for node in chain:
            assert node.block is not None
            self._let_go(node.block)


class RootedPrefixes(PrefixCache):
    """Planted: a pinned block that was moved is still said to be in its old place."""

    def relocate(self, block: int, to: int) -> None:
        node = self._by_block[block]
        super().relocate(block, to)
        if node.pins:
            node.block = block


class UnprotectedCache(KVCache):
    """Planted: a chain is pinned but for its first block, whose eviction takes the others along."""

    def pin_prefix(self, name: str, chain: Listing[Node], *, priority: int = 0) -> None:
        super().pin_prefix(name, chain, priority=priority)
        first = chain[0]
        assert first.block is not None
        self._pinned[name] = tuple(chain[1:])
        first.pins -= 1
        self._num_pinned -= first.pins == 0
        self._let_go(first.block)


class LeakyPrefixes(PrefixCache):
    """Planted: what a salted sequence publishes behind an open block hangs below that block itself."""

    def _place(self, parent: Node | None, salt: bytes) -> Node | None:
        return super()._place(parent, OPEN_SALT if parent is not None and parent.is_open else salt)


@pytest.mark.parametrize(
    "planted",
    [
        {"cache_class": ForgetfulCache},
        {"cache_class": UnprotectedCache},
        {"prefix_class": RootedPrefixes},
        {"prefix_class": LeakyPrefixes},
    ],
    ids=["not held", "not to the root", "moved block", "leak"],
)
def test_a_planted_bug_is_caught(planted: dict[str, object]) -> None:
    machine = type("PlantedMachine", (PinningMachine,), planted)
    with pytest.raises((AssertionError, ValueError, KeyError)):
        run_state_machine_as_test(machine, settings=HUNT)


def test_a_four_bit_hash_loses_no_pinned_block_and_gives_no_wrong_one() -> None:
    run_state_machine_as_test(CollidingMachine, settings=settings(LONG, max_examples=60))


PINNED = [0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 0]
TENANTS = (b"", b"one tenant", b"other tenant")
turns = st.tuples(
    st.sampled_from(TENANTS),
    st.integers(0, len(PINNED)),  # how much of the pinned text the prompt begins with
    st.lists(st.integers(0, 1), min_size=1, max_size=10),  # and what comes behind it
    st.integers(0, 3),  # how many turns it stays
)


def what_is_seen(
    seer: bytes, others: tuple[bytes, ...], talk: list[tuple[bytes, int, list[int], int]], prefixes: PrefixCache
) -> list[tuple[int, int, str | None]]:
    """What the cache tells one tenant in a talk among several, where nothing is ever evicted."""
    pool = BlockPool(block_size=BLOCK_SIZE, segment_blocks=256)
    pool.add_segment(256)
    cache = KVCache(pool, prefixes)
    seen: list[tuple[int, int, str | None]] = []
    staying: list[tuple[int, Sequence]] = []
    for number, (salt, common, tail, stay) in enumerate([(OPEN_SALT, len(PINNED), [0], 0), *talk]):
        for _, gone in [item for item in staying if item[0] < number]:
            cache.release(gone)
        staying = [item for item in staying if item[0] >= number]
        if salt not in (OPEN_SALT, seer, *others):
            continue
        spec = SequenceSpec(number, (*PINNED[:common], *tail), SamplingParams(max_tokens=1), salt=salt)
        sequence = Sequence.from_spec(spec, number)
        match = cache.match(sequence)
        if salt == seer:
            seen.append((len(match.nodes), match.partial_tokens, match.miss))
        cache.admit(sequence, match)
        cache.unpin()
        sequence.num_computed = len(sequence.tokens)
        cache.publish(sequence)
        staying.append((number + stay, sequence))
        if number == 0:
            cache.pin_prefix("house", cache.chain(PINNED, OPEN_SALT))
        cache.check_integrity([sequence for _, sequence in staying])
    return seen


@settings(max_examples=200, deadline=None)
@given(talk=st.lists(turns, min_size=1, max_size=12), seer=st.sampled_from(TENANTS))
def test_no_tenant_can_tell_what_others_have_cached(talk: list[tuple[bytes, int, list[int], int]], seer: bytes) -> None:
    among_others = what_is_seen(seer, TENANTS, talk, PrefixCache(BLOCK_SIZE))
    assert among_others == what_is_seen(seer, (), talk, PrefixCache(BLOCK_SIZE))


def test_a_tenant_whose_blocks_hang_behind_the_pinned_ones_would_be_told_on() -> None:
    talk = [(TENANTS[1], len(PINNED), [0, 0, 0, 0, 1], 0), (TENANTS[2], len(PINNED), [0, 0, 0, 0, 0], 0)]
    leaked = what_is_seen(TENANTS[2], TENANTS, talk, LeakyPrefixes(BLOCK_SIZE))
    assert leaked[0][0] > len(PINNED) // BLOCK_SIZE, "the planted leak shows"
    assert what_is_seen(TENANTS[2], TENANTS, talk, PrefixCache(BLOCK_SIZE))[0][0] == len(PINNED) // BLOCK_SIZE
