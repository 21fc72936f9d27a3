"""Verifying proposals: how many there is room for, what is accepted, and what is left of those that were wrong."""

import pytest

from edgekv.core.block_pool import BlockPool
from edgekv.core.kv_cache import KVCache
from edgekv.core.prefix_cache import PrefixCache
from edgekv.core.sampling import SamplingParams
from edgekv.core.scheduler import Limits, Outcome, Scheduler
from edgekv.core.sequence import FinishReason, Sequence, SequenceSpec
from edgekv.core.step import Chunk, Finished, Sampled, StepPlan, Verified

BLOCK_SIZE = 4


def make(num_blocks: int = 16, **limits: int) -> Scheduler:
    pool = BlockPool(block_size=BLOCK_SIZE, segment_blocks=64)
    pool.add_segment(num_blocks)
    return Scheduler(KVCache(pool, PrefixCache(BLOCK_SIZE)), Limits(**limits))


def submit(scheduler: Scheduler, number: int, num_prompt: int = 3, max_tokens: int = 20, **params: object) -> None:
    prompt = tuple(100 * number + position for position in range(num_prompt))
    sampling = SamplingParams(max_tokens, **params)  # type: ignore[arg-type]
    scheduler.submit(SequenceSpec(number, prompt, sampling))


def complete(scheduler: Scheduler, plan: StepPlan, *tokens: int) -> Outcome:
    """Every row has said the next of these tokens; 7 where they are too few."""
    said = [*tokens, *[7] * plan.num_sampled][: plan.num_sampled]
    outcome = scheduler.complete(plan, [Sampled(token) for token in said])
    scheduler.check_integrity()
    for sequence in scheduler.running:
        blocks = scheduler.cache.blocks_for(len(sequence.tokens))
        assert len(sequence.block_table) <= blocks, "a block is kept for tokens that there are not"
    return outcome


def decoding(
    num_blocks: int = 16, count: int = 1, num_prompt: int = 3, max_tokens: int = 20, **limits: int
) -> Scheduler:
    """`count` sequences that have each said one token, 7."""
    scheduler = make(num_blocks, **limits)
    for number in range(1, count + 1):
        submit(scheduler, number, num_prompt, max_tokens)
    while not all(s.num_output for s in scheduler.running) or scheduler.num_waiting:
        complete(scheduler, scheduler.plan())
    return scheduler


def only(scheduler: Scheduler) -> Sequence:
    (sequence,) = scheduler.running
    return sequence


def said(outcome: Outcome) -> list[int]:
    return [out.sampled.token_id for out in outcome.tokens]


def test_a_chunk_is_the_last_known_token_and_what_is_proposed_after_it() -> None:
    scheduler = decoding()
    (chunk,) = scheduler.plan({1: (8, 9)}).chunks
    assert (chunk.start, chunk.token_ids, chunk.sampled, chunk.proposed) == (3, (7, 8, 9), 3, (8, 9))
    assert chunk.samples
    assert chunk.end == 6
    assert len(chunk.block_table) == 2
    assert chunk.with_sampled(1).token_ids == (7,)
    assert chunk.with_sampled(2).proposed == (8,)


def test_a_chunk_that_samples_nothing_proposes_nothing() -> None:
    sequence = Sequence.from_spec(SequenceSpec(1, (1, 2, 3), SamplingParams(1)), arrival=1)
    assert Chunk(sequence, 0, (1, 2), (0,), sampled=0).proposed == ()
    assert Chunk(sequence, 0, (1, 2, 3), (0,), sampled=1).proposed == ()


@pytest.mark.parametrize(
    ("chosen", "taken"),
    [((5, 9, 6), [5]), ((8, 5, 6), [8, 5]), ((8, 9, 6), [8, 9, 6]), ((9, 9, 9), [9]), ((8, 8, 9), [8, 8])],
)
def test_as_many_are_accepted_as_were_chosen_and_the_row_after_them_chooses_one_more(
    chosen: tuple[int, ...], taken: list[int]
) -> None:
    scheduler = decoding()
    outcome = complete(scheduler, scheduler.plan({1: (8, 9)}), *chosen)
    assert said(outcome) == taken
    assert outcome.verified == (Verified(1, 2, len(taken) - 1),)
    sequence = only(scheduler)
    assert sequence.tokens[3:] == [7, *taken]
    assert sequence.num_uncomputed == 1
    assert scheduler.counters.generated_tokens == 1 + len(taken)
    assert (scheduler.counters.proposed_tokens, scheduler.counters.accepted_tokens) == (2, len(taken) - 1)
    (chunk,) = scheduler.plan().chunks
    assert (chunk.start, chunk.token_ids) == (3 + len(taken), (taken[-1],)), "the next step goes on behind it"


def test_only_what_was_accepted_is_published() -> None:
    scheduler = decoding(num_prompt=6)
    complete(scheduler, scheduler.plan({1: (8, 9, 10, 11, 12)}), 8, 5)
    tokens = only(scheduler).tokens
    assert tokens[6:] == [7, 8, 5]
    assert len(scheduler.cache.chain(tokens, b"")) == 2, "the second block is full of accepted tokens"
    assert len(scheduler.cache.chain([*tokens[:6], 7, 8, 9, 10, 11, 12], b"")) == 2
    scheduler.abort(1)
    submit(scheduler, 2, 1)
    scheduler.submit(SequenceSpec(3, (*tokens[:6], 7, 8, 9, 10, 11, 12), SamplingParams(4)))
    plan = scheduler.plan()
    assert [chunk.start for chunk in plan.chunks] == [0, 8], "nor is the tail of an aborted one more than it was"


def test_the_end_may_come_within_what_is_accepted() -> None:
    scheduler = make()
    submit(scheduler, 1, stop_token_ids=frozenset({9}))
    complete(scheduler, scheduler.plan(), 7)
    outcome = complete(scheduler, scheduler.plan({1: (8, 9, 10, 11)}), 8, 9, 10, 11, 12)
    assert said(outcome) == [8, 9]
    assert [out.is_stop for out in outcome.tokens] == [False, True]
    assert outcome.finished == (Finished(1, FinishReason.STOP),)
    assert outcome.verified == (Verified(1, 2, 2),)
    assert scheduler.cache.pool.active_blocks == 0


def test_a_stop_counts_only_after_min_tokens_also_within() -> None:
    scheduler = make()
    submit(scheduler, 1, stop_token_ids=frozenset({9}), min_tokens=3)
    complete(scheduler, scheduler.plan(), 7)
    outcome = complete(scheduler, scheduler.plan({1: (9, 9, 9, 9)}), 9, 9, 9, 9, 9)
    assert said(outcome) == [9, 9, 9]
    assert [out.is_stop for out in outcome.tokens] == [False, False, True]


def test_no_more_is_verified_than_the_sequence_may_still_have() -> None:
    scheduler = make()
    submit(scheduler, 1, max_tokens=4)
    complete(scheduler, scheduler.plan(), 7)
    assert {sequence.id: most for sequence, most in scheduler.decoding().items()} == {1: 2}
    plan = scheduler.plan({1: (8,) * 9})
    assert plan.chunks[0].proposed == (8, 8)
    outcome = complete(scheduler, plan, 8, 8, 8)
    assert said(outcome) == [8, 8, 8]
    assert outcome.finished == (Finished(1, FinishReason.LENGTH),)
    submit(scheduler, 2, max_tokens=2)
    complete(scheduler, scheduler.plan(), 7)
    assert scheduler.plan({2: (8,)}).chunks[0].proposed == (), "the last token needs no company"


def test_whoever_does_not_decode_has_nothing_verified() -> None:
    scheduler = decoding(max_step_tokens=8, mixed_step_tokens=8)
    submit(scheduler, 2, 30)
    submit(scheduler, 3, 1)
    plan = scheduler.plan({2: (1, 2), 3: (1, 2), 99: (1,)})
    assert [chunk.proposed for chunk in plan.chunks] == [(), ()]
    assert plan.chunks[1].token_ids == tuple(range(200, 207)), "and nothing is kept back for it"


def test_a_prompt_has_half_of_the_step_and_what_proposals_leave() -> None:
    scheduler = decoding(count=2, num_blocks=40, max_step_tokens=64, mixed_step_tokens=12)
    submit(scheduler, 3, 60)
    plan = scheduler.plan({1: (8,) * 9, 2: (8,) * 9})
    assert [len(chunk.proposed) for chunk in plan.chunks] == [2, 3, 0], "shared by those who ask"
    assert len(plan.chunks[2].token_ids) == 5
    complete(scheduler, plan)
    plan = scheduler.plan({1: (8,)})
    assert [len(chunk.proposed) for chunk in plan.chunks] == [1, 0, 0]
    assert len(plan.chunks[2].token_ids) == 9


def test_who_asks_for_little_leaves_the_rest_to_the_others() -> None:
    scheduler = decoding(count=3, num_blocks=40, mixed_step_tokens=15)
    plan = scheduler.plan({1: (8,), 2: (8,) * 9, 3: (8,) * 9})
    assert [len(chunk.proposed) for chunk in plan.chunks] == [1, 5, 6]
    assert plan.num_tokens == 15


def test_proposals_take_no_block_that_a_running_sequence_may_need_next() -> None:
    # One block each is held; of the others one is in reserve for each of the two.
    for num_blocks, slots in ((4, 0), (5, 4), (6, 6)):
        scheduler = decoding(num_blocks, count=2, max_tokens=9)
        plan = scheduler.plan({1: (8,) * 6})
        assert not plan.preempted
        assert len(plan.chunks[0].proposed) == slots, num_blocks
        complete(scheduler, plan, 5)


def test_cached_blocks_make_room_for_proposals_and_are_free_when_these_were_wrong() -> None:
    scheduler = make(6)
    submit(scheduler, 1, 16, max_tokens=2)
    for _ in range(2):
        complete(scheduler, scheduler.plan())
    submit(scheduler, 2)
    complete(scheduler, scheduler.plan())
    pool = scheduler.cache.pool
    assert (pool.free_blocks, pool.cached_blocks, pool.active_blocks) == (0, 5, 1)
    plan = scheduler.plan({2: (8,) * 6})
    assert len(plan.chunks[0].proposed) == 6
    assert pool.active_blocks == 3
    complete(scheduler, plan, 5)
    assert (pool.free_blocks, pool.active_blocks) == (1, 2), "the fifth token has a block, the others went back"


def test_somebody_is_admitted_before_blocks_go_to_proposals() -> None:
    scheduler = decoding(5, max_tokens=9)
    submit(scheduler, 2, 12, max_tokens=2)
    plan = scheduler.plan({1: (8,) * 6})
    assert [len(chunk.token_ids) for chunk in plan.chunks] == [1, 12]


def test_a_step_that_did_not_happen_leaves_no_blocks_with_anybody() -> None:
    scheduler = decoding(count=2)
    plan = scheduler.plan({1: (8,) * 6, 2: (8,) * 6})
    assert [len(chunk.block_table) for chunk in plan.chunks] == [3, 3]
    scheduler.retreat(plan)
    scheduler.check_integrity()
    assert [len(sequence.block_table) for sequence in scheduler.running] == [1]


def test_nothing_is_planned_ahead_of_a_step_that_verifies() -> None:
    scheduler = decoding()
    assert scheduler.plan_ahead(scheduler.plan({1: (8, 9)})) is None
    complete(scheduler, scheduler.plan())
    assert scheduler.plan_ahead(scheduler.plan()) is not None


def test_an_outcome_without_a_sequence_has_nothing_of_it() -> None:
    scheduler = decoding(count=2)
    outcome = complete(scheduler, scheduler.plan({1: (8,), 2: (8,)}))
    assert [each.sequence_id for each in outcome.without(1).verified] == [2]
    assert [each.sequence_id for each in outcome.then(outcome).verified] == [1, 2, 1, 2]
