"""Names pin prefixes: what that holds, and for how long."""

import pytest

from edgekv.core.block_pool import BlockPool, BlockState, OutOfBlocks
from edgekv.core.kv_cache import KVCache
from edgekv.core.prefix_cache import PrefixCache
from edgekv.core.prefix_tree import OPEN_SALT, Node
from edgekv.core.sampling import SamplingParams
from edgekv.core.sequence import Sequence, SequenceSpec

HOUSE = (1, 2, 3, 4, 5, 6, 7, 8, 9)


def make_cache(*segments: int) -> KVCache:
    pool = BlockPool(block_size=4, segment_blocks=8)
    for num_blocks in segments:
        pool.add_segment(num_blocks)
    return KVCache(pool, PrefixCache(4))


def start(cache: KVCache, tokens: tuple[int, ...], salt: bytes = b"") -> Sequence:
    """A sequence with all of its prompt computed."""
    sequence = Sequence.from_spec(SequenceSpec(0, tokens, SamplingParams(max_tokens=1), salt=salt), 0)
    cache.admit(sequence, cache.match(sequence))
    cache.unpin()
    sequence.num_computed = len(tokens)
    cache.publish(sequence)
    return sequence


def compute(cache: KVCache, tokens: tuple[int, ...], salt: bytes = b"") -> tuple[Node, ...]:
    """The chain that a sequence leaves in the cache."""
    cache.release(start(cache, tokens, salt))
    return cache.chain(tokens, salt)


def cached_tokens(cache: KVCache, tokens: tuple[int, ...], salt: bytes = b"") -> int:
    spec = SequenceSpec(0, (*tokens, 99), SamplingParams(max_tokens=1), salt=salt)
    return cache.match(Sequence.from_spec(spec, 0)).cached_tokens(4)


def test_pinned_blocks_are_neither_evicted_nor_flushed_until_they_are_unpinned() -> None:
    cache = make_cache(4)
    cache.pin_prefix("house", compute(cache, HOUSE, OPEN_SALT))
    assert cache.pinned_blocks == 2
    cache.flush()
    with pytest.raises(OutOfBlocks, match="3 blocks asked, 2 free"):
        start(cache, (7,) * 9)
    cache.release(start(cache, (7,) * 5))
    cache.check_integrity(())
    assert cached_tokens(cache, HOUSE[:8]) == 8
    cache.unpin_prefix("house")
    assert (cache.pinned_blocks, cache.pool.active_blocks) == (0, 0)
    cache.check_integrity(())
    cache.flush()
    assert cached_tokens(cache, HOUSE[:8]) == 0


def test_blocks_that_two_names_share_count_once_and_stay_until_both_are_given_up() -> None:
    cache = make_cache(8)
    cache.pin_prefix("house", compute(cache, HOUSE, OPEN_SALT))
    cache.pin_prefix("porch", compute(cache, (*HOUSE[:4], 0, 0, 0, 0, 0), OPEN_SALT))
    assert cache.pinned_blocks == 3
    cache.unpin_prefix("house")
    assert cache.pinned_blocks == 2
    cache.flush()
    cache.check_integrity(())
    assert cached_tokens(cache, HOUSE[:8]) == 4
    cache.unpin_prefix("porch")
    cache.flush()
    assert cache.pool.free_blocks == 8


def test_a_distrusted_sequence_takes_no_pinned_block_with_it() -> None:
    cache = make_cache(8)
    cache.pin_prefix("house", compute(cache, HOUSE, OPEN_SALT))
    reader = start(cache, (*HOUSE[:8], 0, 0, 0, 0, 0), b"tenant")
    cache.distrust(reader)
    cache.release(reader)
    cache.check_integrity(())
    assert cached_tokens(cache, HOUSE[:8], b"tenant") == 8
    assert cached_tokens(cache, (*HOUSE[:8], 0, 0, 0, 0), b"tenant") == 8, "what only it held is gone"


def test_pinned_blocks_move_when_their_segment_goes() -> None:
    cache = make_cache(4, 4)
    chain = compute(cache, HOUSE, OPEN_SALT)
    cache.pin_prefix("house", chain)
    before = [node.block for node in chain]
    segment = (before[0] or 0) // 8
    copies = cache.vacate([segment], [])
    assert [copy.source for copy in copies] == before
    assert [copy.target for copy in copies] == [node.block for node in chain]
    cache.pool.remove_segment(segment)
    cache.check_integrity(())
    assert cached_tokens(cache, HOUSE[:8]) == 8
    [last] = cache.pool.segments
    with pytest.raises(OutOfBlocks):
        cache.vacate([last], [])
    cache.unpin_prefix("house")
    assert cache.pool.cached_blocks == 2


@pytest.mark.parametrize(("lower", "higher"), [(0, 1), (-1, 0)])
def test_after_its_time_a_prefix_of_higher_priority_is_evicted_later(lower: int, higher: int) -> None:
    cache = make_cache(5)
    for name, tokens, priority in (("first", HOUSE[:5], higher), ("second", (0, 0, 0, 0, 0), lower)):
        cache.pin_prefix(name, compute(cache, tokens, OPEN_SALT), priority=priority)
    cache.unpin_prefix("first")
    cache.unpin_prefix("second")
    start(cache, (7,) * 13)
    assert cached_tokens(cache, HOUSE[:4]) == 4, "although it is the older one"
    assert cached_tokens(cache, (0, 0, 0, 0)) == 0


def test_only_a_whole_live_chain_can_be_pinned_and_a_name_only_once() -> None:
    cache = make_cache(8)
    chain = compute(cache, HOUSE, OPEN_SALT)
    for wrong in ((), chain[1:], (chain[0], chain[0])):
        with pytest.raises(ValueError, match="chain"):
            cache.pin_prefix("house", wrong)
    cache.pin_prefix("house", chain)
    with pytest.raises(ValueError, match="pins a prefix already"):
        cache.pin_prefix("house", chain)
    cache.unpin_prefix("house")
    cache.flush()
    with pytest.raises(ValueError, match="no full published block"):
        cache.pin_prefix("house", chain)
    with pytest.raises(KeyError):
        cache.unpin_prefix("house")
    assert cache.pool.free_blocks == 8


def test_a_block_that_is_shared_behind_a_pinned_one_lives_as_long_as_its_readers() -> None:
    """The pin's time may run out under a running sequence."""
    cache = make_cache(8)
    cache.pin_prefix("house", compute(cache, HOUSE, OPEN_SALT))
    readers = [start(cache, (*HOUSE[:8], 0, 0, 0, 0, 0), b"tenant")]
    readers += [start(cache, (*HOUSE[:8], 0, 0, 0, 0, 1), b"tenant")]
    cache.unpin_prefix("house")
    cache.flush()
    cache.check_integrity(readers)
    assert readers[0].block_table[:3] == readers[1].block_table[:3]
    assert all(cache.pool.state(block) is BlockState.ACTIVE for block in readers[0].block_table)
