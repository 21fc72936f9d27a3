"""How a draft model forgets, and that whatever goes wrong with it is nobody else's trouble."""

from typing import Any

import pytest
import torch

from edgekv.core.sequence import Sequence
from edgekv.engine.draft import REST_S
from edgekv.engine.draft_settings import LAG_TOKENS
from tests.unit.engine.draft_alone import BLOCK_SIZE, Draft, sequence

# ---- faults


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_whose_logits_are_nothing_is_left_alone_from_then_on(overlaps: bool, place: int) -> None:
    draft = Draft(overlaps=overlaps)
    spoilt, fine = sequence(1, *range(9)), sequence(2, *range(30, 39))
    draft.device.bad = lambda number, row: number >= place and row.tokens[0] == 0
    found = draft.propose(spoilt, fine)
    assert found.pop(1, ()) == (9, 10, 11)[:place]
    assert found == {2: (39, 40, 41)}
    assert not draft.model.serves(spoilt)
    spoilt.tokens.append(9)
    fine.tokens.append(39)
    draft.forget_plans()
    assert draft.propose(spoilt, fine) == {2: (40, 41, 42)}
    assert all(len(plan.chunks) == 1 for plan in draft.device.plans)
    draft.model.forget(2)
    after = sequence(3, *range(9))
    assert draft.model.unread(after) == 0
    draft.forget_plans()
    draft.propose(after)
    assert draft.chunks(0) == [(0, tuple(range(9)), 1)], "nothing of it is shared"


FULL = (
    MemoryError("full"),
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
)


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("where", ["begin_fault", "result_fault"])
@pytest.mark.parametrize("step", [0, 1, 2])
@pytest.mark.parametrize("fault", FULL, ids=lambda fault: type(fault).__name__)
def test_too_little_memory_for_a_step_is_a_rest_and_nothing_else(
    fault: Exception, step: int, where: str, overlaps: bool
) -> None:
    draft = Draft(overlaps=overlaps)
    one, other = sequence(1, *range(9)), sequence(2, *range(30, 39))
    draft.propose(other)
    draft.forget_plans()
    setattr(draft.device, where, lambda number: fault if number == step else None)
    assert draft.propose(one, other) == {}
    assert set(draft.device.steps) == set(draft.device.waited), "nobody touches the memory of a step under way"
    pool = draft.cache.pool
    assert pool.free_blocks == pool.total_blocks
    assert draft.model.away == "the draft model found too little memory for a step"
    draft.forget_plans()
    draft.now_s += REST_S / 2
    assert draft.propose(one, other) == {}
    assert not draft.device.plans
    draft.now_s += REST_S / 2
    setattr(draft.device, where, lambda number: None)
    assert draft.model.away is None
    assert draft.propose(one, other).keys() == {1, 2}
    assert draft.chunks(0) == [(0, tuple(range(9)), 1), (0, tuple(range(30, 39)), 1)]


def test_too_little_memory_for_a_step_that_copies_leaves_nothing_pinned() -> None:
    draft = Draft()
    draft.propose(sequence(1, *range(6)))
    draft.model.forget(1)
    draft.device.begin_fault = lambda number: MemoryError("full")
    assert draft.propose(sequence(2, *range(5), 50)) == {}
    assert draft.device.plans[-1].copies
    assert draft.cache.pool.free_blocks == draft.cache.pool.total_blocks


def test_too_little_memory_to_read_is_one_too() -> None:
    draft = Draft()
    draft.device.begin_fault = lambda number: MemoryError("full")
    assert draft.propose(sequence(1, *range(60))) == {}
    assert draft.cache.pool.free_blocks == draft.cache.pool.total_blocks
    assert draft.model.take_reading().tokens == 0


def test_another_fault_is_not_hidden() -> None:
    draft = Draft()
    draft.device.begin_fault = lambda number: RuntimeError("an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal"):
        draft.propose(sequence(1, 2))


# ---- room


def test_the_view_that_was_not_used_for_longest_makes_room() -> None:
    draft = Draft(blocks=8, prefix=False)
    old, young = sequence(1, *range(8)), sequence(2, *range(8))
    draft.propose(old)  # three blocks, and so has the other
    draft.propose(young)
    draft.propose(old)
    third = sequence(3, *range(8))
    assert draft.propose(third, old).keys() == {1, 3}
    draft.forget_plans()
    assert draft.propose(old).keys() == {1}
    assert draft.chunks(0) == [(7, (7,), 1)], "it was kept"


def test_to_be_asked_for_is_to_be_used() -> None:
    draft = Draft(blocks=8, prefix=False)
    old, young = sequence(1, *range(8)), sequence(2, *range(8))
    for each in (old, young, old, sequence(3, *range(8))):
        draft.propose(each)
    assert draft.model.unread(old) == 0
    assert draft.model.views._views.keys() == {1, 3}


def test_none_goes_in_vain_for_one_that_cannot_grow() -> None:
    draft = Draft(blocks=8, prefix=False)
    idle, growing = sequence(1, *range(8)), sequence(2, *range(8))
    draft.propose(idle)
    draft.propose(growing)
    growing.tokens += [8] * 60
    assert draft.propose(growing) == {}
    assert draft.model.views._views.keys() == {1, 2}


def test_none_goes_in_vain_for_one_that_does_not_fit() -> None:
    draft = Draft(blocks=8, prefix=False)
    small, large = sequence(1, *range(8)), sequence(2, *range(40))
    draft.propose(small)
    assert draft.propose(large) == {}
    draft.forget_plans()
    draft.propose(small)
    assert draft.chunks(0) == [(7, (7,), 1)]


def test_one_that_found_no_room_is_tried_again_a_block_later_or_when_there_is_more() -> None:
    draft = Draft(blocks=4, prefix=False)
    holder, waiting = sequence(1, *range(8)), sequence(2, *range(8))
    tried = 0
    match = draft.cache.match

    def counted(own: Sequence) -> Any:
        nonlocal tried
        tried += 1
        return match(own)

    draft.cache.match = counted  # type: ignore[method-assign]
    draft.propose(holder, k=1)
    tries = []
    for _ in range(9):
        before = tried
        assert draft.propose(holder, waiting, k=1).keys() == {1}
        tries.append(tried > before)
        waiting.tokens.append(5)
    assert tries == [True, False, False, False] * 2 + [True]
    draft.cache.pool.add_segment(4)
    draft.cache.pool.add_segment(4)
    for _ in range(BLOCK_SIZE + 1):
        found = draft.propose(holder, waiting, k=1)
        waiting.tokens.append(5)
    assert found.keys() == {1, 2}


def test_a_view_that_cannot_grow_has_no_guess_and_keeps_what_it_has() -> None:
    draft = Draft(blocks=3, prefix=False)
    one = sequence(1, *range(9))
    assert draft.propose(one).keys() == {1}
    one.tokens += [9, 10]
    assert draft.propose(one) == {}
    assert draft.propose(one, k=1) == {}, "not before it has said a block more"
    assert draft.cache.pool.active_blocks == 3
    draft.cache.pool.add_segment(4)
    one.tokens += [11, 12, 13, 14]
    draft.forget_plans()
    assert draft.propose(one).keys() == {1}
    assert draft.chunks(0)[0][0] in (9, 10, 11)


def test_a_cached_block_that_is_copied_from_needs_a_place_too() -> None:
    draft = Draft(blocks=3)
    draft.propose(sequence(1, *range(6)), k=1)
    draft.model.forget(1)
    # One whole block is shared. Of the two others, one holds the tail to copy and one is free; two are needed.
    other = sequence(2, *range(5), 50, 51)
    draft.forget_plans()
    assert draft.propose(other, k=5) == {2: (52, 53, 54, 55, 56)}
    assert draft.chunks(0) == [(4, (4, 50, 51), 1)]


def test_forgotten_is_the_blocks_and_the_name() -> None:
    draft = Draft()
    one = sequence(1, *range(9))
    draft.propose(one)
    draft.model.forget(1)
    draft.model.forget(1)
    assert draft.cache.pool.active_blocks == 0
    draft.forget_plans()
    # Another sequence by the same number that was never said to have ended.
    draft.propose(sequence(1, 50, 51))
    draft.propose(sequence(1, 60, 61), k=1)
    assert draft.chunks() == [(0, (60, 61), 1)]
    draft.model.forget(1)
    assert draft.cache.pool.active_blocks == 0


def test_emptied_segments_take_along_the_views_that_do_not_fit_the_others() -> None:
    draft = Draft(blocks=12, prefix=False)
    sequences = [sequence(number, *range(8)) for number in (1, 2, 3)]
    for each in sequences:
        draft.propose(each)  # three blocks each
    vacated = draft.model.views.vacate(5, keep_promises=False)
    assert len(vacated.segments) == 2
    for index in vacated.segments:
        draft.cache.pool.remove_segment(index)
    assert draft.cache.pool.active_blocks == 3
    draft.model.check_integrity()
    assert draft.model.unread(sequences[2]) == 0
    draft.forget_plans()
    draft.propose(sequences[2], k=1)
    assert draft.chunks(0) == [(7, (7,), 1)]
    assert draft.propose(sequences[0], sequences[2], k=1).keys() == {3}


def test_it_is_away_without_weights_or_blocks_and_asks_nothing_of_them() -> None:
    draft = Draft(blocks=0)
    assert draft.model.away == "the draft model's KV cache was given back"
    assert draft.propose(sequence(1, 2)) == {}
    draft.model.pipeline = None
    assert draft.model.away == "the draft model's memory was given back"
    assert draft.propose(sequence(1, 2)) == {}
    assert draft.device.plans == []


def test_unread_is_what_is_not_cached_and_little_is_nothing() -> None:
    draft = Draft()
    one = sequence(1, *range(40))
    assert draft.model.unread(one) == 40
    draft.propose(one)
    assert draft.model.unread(one) == 0
    one.tokens += [50] * (LAG_TOKENS + 1)
    assert draft.model.unread(one) == LAG_TOKENS + 1
    draft.model.forget(1)
    assert draft.model.unread(sequence(2, *range(40))) == 0
    assert draft.model.unread(sequence(3, *range(36), *[60] * 30)) == 30
    draft.model.clear()
    assert draft.model.unread(sequence(2, *range(40))) == 40


def test_unread_is_looked_at_again_when_a_view_or_its_blocks_have_gone() -> None:
    draft = Draft(blocks=19)
    one, other = sequence(1, *range(40)), sequence(2, *range(36), *[60] * 30)
    assert draft.model.unread(one) == 40
    draft.propose(one)
    # The other takes all the room but for what both begin with.
    assert draft.propose(other).keys() == {2}
    assert draft.model.views._views.keys() == {2}
    assert draft.model.unread(one) == 0
    draft.model.views.vacate(19, keep_promises=False)
    assert draft.model.unread(one) == 40
