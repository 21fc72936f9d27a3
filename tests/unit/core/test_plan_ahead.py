"""Planning a step before the one before it has been read: when it is done, what it takes, what becomes of it."""

import pytest

from edgekv.core.block_pool import BlockPool
from edgekv.core.kv_cache import KVCache
from edgekv.core.prefix_cache import PrefixCache
from edgekv.core.sampling import SamplingParams
from edgekv.core.scheduler import Limits, Outcome, Scheduler
from edgekv.core.sequence import FinishReason, SequenceSpec
from edgekv.core.step import UNKNOWN, Sampled, StepPlan

BLOCK_SIZE = 4


def make(num_blocks: int = 16, **limits: int) -> Scheduler:
    pool = BlockPool(block_size=BLOCK_SIZE, segment_blocks=64)
    pool.add_segment(num_blocks)
    return Scheduler(KVCache(pool, PrefixCache(BLOCK_SIZE)), Limits(**limits))


def submit(
    scheduler: Scheduler,
    number: int,
    num_prompt: int = 3,
    max_tokens: int = 20,
    priority: int = 0,
    stops: frozenset[int] = frozenset(),
) -> None:
    params = SamplingParams(max_tokens, stop_token_ids=stops)
    prompt = tuple(100 * number + position for position in range(num_prompt))
    scheduler.submit(SequenceSpec(number, prompt, params, priority))


def complete(scheduler: Scheduler, plan: StepPlan, token: int = 7) -> Outcome:
    plan = scheduler.still_running(plan)
    outcome = scheduler.complete(plan, [Sampled(token) for _ in plan.sampling])
    scheduler.check_integrity()
    return outcome


def ids(plan: StepPlan | None) -> list[int]:
    assert plan is not None
    return [chunk.sequence.id for chunk in plan.chunks]


def test_every_sequence_that_samples_gets_one_unknown_token_behind_its_chunk() -> None:
    scheduler = make()
    submit(scheduler, 1, num_prompt=6)
    submit(scheduler, 2, num_prompt=2)
    plan = scheduler.plan()
    ahead = scheduler.plan_ahead(plan)
    assert ahead is not None
    scheduler.check_integrity()
    found = [(chunk.sequence.id, chunk.start, chunk.token_ids, chunk.samples) for chunk in ahead.chunks]
    assert found == [(1, 6, (UNKNOWN,), True), (2, 2, (UNKNOWN,), True)]
    assert ahead.copies == ahead.preempted == ()
    complete(scheduler, plan, 7)
    assert [token.sampled.token_id for token in complete(scheduler, ahead, 8).tokens] == [8, 8]
    assert [sequence.tokens[-2:] for sequence in scheduler.running] == [[7, 8], [7, 8]]
    assert [chunk.token_ids for chunk in scheduler.plan().chunks] == [(8,), (8,)]


def test_it_takes_the_block_of_its_token_and_a_plan_thrown_away_leaves_it_to_the_sequence() -> None:
    scheduler = make()
    submit(scheduler, 1, num_prompt=4)
    plan = scheduler.plan()
    assert len(plan.chunks[0].block_table) == 1
    ahead = scheduler.plan_ahead(plan)
    assert ahead is not None
    assert len(ahead.chunks[0].block_table) == 2
    complete(scheduler, plan)
    assert scheduler.cache.pool.active_blocks == 2
    assert scheduler.plan().chunks[0].block_table == ahead.chunks[0].block_table
    scheduler.abort(1)
    assert scheduler.cache.pool.active_blocks == 0


def test_steps_can_be_planned_ahead_one_after_another() -> None:
    scheduler = make()
    submit(scheduler, 1, max_tokens=12)
    plan = scheduler.plan()
    tokens = 0
    while True:
        ahead = scheduler.plan_ahead(plan)
        tokens += len(complete(scheduler, plan, tokens).tokens)
        if ahead is None:
            break
        plan = ahead
    assert tokens == 12
    assert not scheduler.busy
    key = (*range(100, 103), *range(9))
    assert len(scheduler.cache.chain(key, b"")) == 3, "blocks are published with tokens that were unknown once"


def test_a_sequence_that_ends_by_its_length_is_left_out() -> None:
    scheduler = make()
    submit(scheduler, 1, max_tokens=1)
    submit(scheduler, 2, max_tokens=2)
    plan = scheduler.plan()
    ahead = scheduler.plan_ahead(plan)
    assert ids(ahead) == [2]
    complete(scheduler, plan)
    assert ahead is not None
    assert scheduler.plan_ahead(ahead) is None, "nobody goes on"
    assert [last.reason for last in complete(scheduler, ahead).finished] == [FinishReason.LENGTH]


def test_there_is_none_while_a_prompt_is_not_done() -> None:
    scheduler = make(max_step_tokens=8)
    submit(scheduler, 1, num_prompt=3)
    submit(scheduler, 2, num_prompt=12)
    plan = scheduler.plan()
    assert [chunk.samples for chunk in plan.chunks] == [True, False]
    assert scheduler.plan_ahead(plan) is None
    complete(scheduler, plan)
    assert ids(scheduler.plan_ahead(scheduler.plan())) == [1, 2]


def test_there_is_none_while_a_sequence_runs_that_the_step_had_no_place_for() -> None:
    scheduler = make(max_step_tokens=8)
    submit(scheduler, 1, num_prompt=3)
    submit(scheduler, 2, num_prompt=12)
    complete(scheduler, scheduler.plan())
    scheduler.limits = Limits(max_step_tokens=1)
    plan = scheduler.plan()
    assert ids(plan) == [1]
    assert scheduler.num_running == 2
    assert scheduler.plan_ahead(plan) is None


def test_there_is_none_while_somebody_waits_who_might_be_let_in() -> None:
    scheduler = make(max_sequences=2)
    submit(scheduler, 1)
    plan = scheduler.plan()
    submit(scheduler, 2)
    assert scheduler.plan_ahead(plan) is None


def test_whoever_waits_for_others_to_end_holds_nothing_up_before_one_does() -> None:
    scheduler = make(max_sequences=2)
    for number, max_tokens in ((1, 20), (2, 3), (3, 20)):
        submit(scheduler, number, max_tokens=max_tokens)
    plan = scheduler.plan()
    for _ in range(2):
        ahead = scheduler.plan_ahead(plan)
        assert ids(ahead) == [1, 2]
        complete(scheduler, plan)
        assert ahead is not None
        plan = ahead
    assert scheduler.plan_ahead(plan) is None, "2 ends with it, and 3 is let in"
    complete(scheduler, plan)
    assert ids(scheduler.plan()) == [1, 3]


def test_a_stop_lets_in_whoever_waits_after_the_step_that_was_begun_ahead() -> None:
    scheduler = make(max_sequences=1)
    submit(scheduler, 1, stops=frozenset({7}))
    submit(scheduler, 2)
    plan = scheduler.plan()
    ahead = scheduler.plan_ahead(plan)
    assert ahead is not None
    complete(scheduler, plan, 7)
    assert scheduler.plan_ahead(ahead) is None
    assert complete(scheduler, ahead).tokens == ()
    assert ids(scheduler.plan()) == [2]


def test_there_is_none_and_nothing_is_taken_where_blocks_do_not_reach_for_all() -> None:
    scheduler = make(num_blocks=3)
    submit(scheduler, 1, num_prompt=4, max_tokens=8)
    submit(scheduler, 2, num_prompt=4, max_tokens=2)
    plan = scheduler.plan()
    assert ids(plan) == [1, 2]
    assert scheduler.cache.pool.free_blocks == 1
    assert scheduler.plan_ahead(plan) is None
    assert scheduler.cache.pool.free_blocks == 1
    assert [len(sequence.block_table) for sequence in scheduler.running] == [1, 1]
    complete(scheduler, plan)
    assert scheduler.plan().preempted == (2,)


def test_it_may_evict_what_is_cached_but_not_what_the_step_before_copies_from() -> None:
    scheduler = make(num_blocks=5)
    submit(scheduler, 1, num_prompt=7, max_tokens=1)
    complete(scheduler, scheduler.plan())
    assert scheduler.cache.pool.cached_blocks == 2
    prompt = (*range(100, 106), 0, 0)
    scheduler.submit(SequenceSpec(2, prompt, SamplingParams(9)))
    plan = scheduler.plan()
    [copy] = plan.copies
    assert scheduler.cache.pool.refs(copy.source) == 1
    ahead = scheduler.plan_ahead(plan)
    assert ahead is not None
    assert copy.source not in ahead.chunks[0].block_table
    complete(scheduler, plan)
    assert scheduler.cache.pool.refs(copy.source) == 0


def test_what_was_computed_for_a_sequence_that_has_ended_is_dropped_also_when_its_id_comes_again() -> None:
    scheduler = make()
    submit(scheduler, 1)
    submit(scheduler, 2)
    plan = scheduler.plan()
    ahead = scheduler.plan_ahead(plan)
    assert ahead is not None
    complete(scheduler, plan)
    scheduler.abort(1)
    submit(scheduler, 1)
    assert [out.sequence_id for out in complete(scheduler, ahead).tokens] == [2]
    assert ids(scheduler.plan()) == [2, 1]
    assert ids(scheduler.still_running(ahead)) == [2]


def test_an_aborted_sequence_is_not_planned_ahead() -> None:
    scheduler = make()
    submit(scheduler, 1)
    submit(scheduler, 2)
    plan = scheduler.plan()
    scheduler.abort(1)
    assert ids(scheduler.plan_ahead(plan)) == [2]


def test_a_step_is_not_completed_before_the_one_before_it() -> None:
    scheduler = make()
    submit(scheduler, 1)
    plan = scheduler.plan()
    ahead = scheduler.plan_ahead(plan)
    assert ahead is not None
    with pytest.raises(AssertionError, match="a step is missing"):
        complete(scheduler, ahead)
