"""Blocks are free, cached or active; segments come and go."""

import pytest

from edgekv.core.block_pool import BlockPool, BlockState, OutOfBlocks


def make_pool(*segments: int) -> BlockPool:
    pool = BlockPool(block_size=16, segment_blocks=4)
    for num_blocks in segments:
        pool.add_segment(num_blocks)
    return pool


def test_a_block_id_names_its_segment() -> None:
    pool = make_pool(4, 3)
    assert sorted(pool.allocate(7)) == [0, 1, 2, 3, 4, 5, 6]
    assert pool.state(6) is BlockState.ACTIVE
    with pytest.raises(KeyError):
        pool.state(7)


def test_allocation_prefers_the_fullest_segment() -> None:
    pool = make_pool(4, 4)
    first = pool.allocate(4)
    pool.allocate(1)
    pool.release(first[0], keep=False)
    pool.release(first[1], keep=False)
    (block,) = pool.allocate(1)
    assert block in first[:2], "the segment with two free blocks is fuller than the one with three"


def test_asking_for_more_than_is_free_takes_nothing() -> None:
    pool = make_pool(4)
    pool.allocate(3)
    with pytest.raises(OutOfBlocks, match="2 blocks asked, 1 free"):
        pool.allocate(2)
    assert pool.free_blocks == 1


def test_a_released_block_is_free_or_cached_as_its_holder_says() -> None:
    pool = make_pool(4)
    one, two = pool.allocate(2)
    assert pool.release(one, keep=True)
    assert pool.release(two, keep=False)
    assert (pool.state(one), pool.state(two)) == (BlockState.CACHED, BlockState.FREE)
    pool.retain(one)
    assert pool.state(one) is BlockState.ACTIVE
    with pytest.raises(ValueError, match="is free and cannot be retained"):
        pool.retain(two)
    with pytest.raises(ValueError, match="held by nobody"):
        pool.release(two, keep=False)


def test_a_shared_block_lives_until_its_last_holder_lets_go() -> None:
    pool = make_pool(4)
    (block,) = pool.allocate(1)
    pool.retain(block)
    assert not pool.release(block, keep=False)
    assert pool.release(block, keep=False)
    assert pool.free_blocks == 4


def test_a_segment_leaves_only_when_it_is_empty_and_its_index_is_used_again() -> None:
    pool = make_pool(4, 4)
    taken = pool.allocate(5)
    with pytest.raises(ValueError, match="still holds"):
        pool.remove_segment(0)
    for block in taken:
        pool.release(block, keep=False)
    pool.remove_segment(0)
    assert pool.total_blocks == 4
    assert pool.add_segment(2) == 0
    pool.check_integrity()


@pytest.mark.parametrize("segment_blocks", [0, 3, -4])
def test_a_segment_size_that_no_shift_can_address_is_refused(segment_blocks: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        BlockPool(block_size=16, segment_blocks=segment_blocks)


def test_stats_add_up() -> None:
    pool = make_pool(4, 2)
    one, _two = pool.allocate(2)
    pool.release(one, keep=True)
    stats = pool.stats()
    assert (stats.free_blocks, stats.cached_blocks, stats.active_blocks, stats.total_blocks) == (4, 1, 1, 6)


def test_segments_are_told_in_the_order_of_their_active_blocks() -> None:
    pool = make_pool(4, 4, 4)
    full = pool.allocate(4)
    some = pool.allocate(2)
    assert pool.emptiest_segments() == [2, some[0] // 4, full[0] // 4]
    for block in full:
        pool.release(block, keep=True)
    assert pool.emptiest_segments()[-1] == some[0] // 4, "cached blocks cost nothing"
    pool.check_integrity()


def test_no_block_is_taken_from_segments_that_go() -> None:
    pool = make_pool(4, 4, 4)
    assert pool.free_blocks_beside([0, 2]) == 4
    assert {block // 4 for block in pool.allocate(4, beside=[0, 2])} == {1}
    with pytest.raises(OutOfBlocks, match="1 blocks asked, 0 free"):
        pool.allocate(1, beside=[0, 2])


def test_the_most_that_it_had_is_remembered_until_it_is_not_to_come_back() -> None:
    pool = make_pool(4, 4)
    pool.remove_segment(0)
    assert (pool.total_blocks, pool.most_blocks) == (4, 8)
    pool.forget_growth()
    assert pool.most_blocks == 4
    pool.add_segment(2)
    assert pool.most_blocks == 6
