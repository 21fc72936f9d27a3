"""How a draft model reads, guesses and forgets, and that whatever goes wrong with it is nobody else's trouble."""

from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch

from edgekv.core.block_pool import BlockPool
from edgekv.core.kv_cache import KVCache
from edgekv.core.prefix_cache import PrefixCache
from edgekv.core.sampling import SamplingParams
from edgekv.core.sequence import Sequence, SequenceSpec, Stage
from edgekv.core.step import UNKNOWN, Chunk, Sampled, StepPlan
from edgekv.engine.draft import LAG_TOKENS, REST_S, DraftModel
from edgekv.engine.protocols import Pending
from edgekv.engine.sample_row import SampleRow
from edgekv.engine.sampler import NonFiniteLogits, Sampler

BLOCK_SIZE = 4


class Step:
    def __init__(self, device: "Device", tokens: list[int], fault: Exception | None, bad: set[int]) -> None:
        self.device, self.tokens, self.fault, self.bad = device, tokens, fault, bad

    def result(self, without: Collection[int] = ()) -> list[Sampled]:
        self.device.waited.append(self)
        if self.fault is not None:
            raise self.fault
        if bad := self.bad - set(without):
            raise NonFiniteLogits(tuple(sorted(bad)), len(self.tokens))
        return [Sampled(token) for row, token in enumerate(self.tokens) if row not in without]


class Device:
    """Says one more than the last token, modulo 100; where it chooses by itself, whatever it is told to begin with."""

    def __init__(self) -> None:
        self.plans: list[StepPlan] = []
        self.rows: list[list[SampleRow]] = []
        self.steps: list[Step] = []
        self.waited: list[Step] = []
        self.begin_fault: Callable[[int], Exception | None] = lambda number: None
        self.result_fault: Callable[[int], Exception | None] = lambda number: None
        self.bad: Callable[[int, SampleRow], bool] = lambda number, row: False
        self.say: Callable[[list[int], int], int] = lambda tokens, unknown: (tokens[-1] + 1 + unknown) % 100

    def begin(self, plan: StepPlan, rows: list[SampleRow], after: Pending | None) -> Step:
        number = len(self.plans)
        self.plans.append(plan)
        self.rows.append(rows)
        if (fault := self.begin_fault(number)) is not None:
            raise fault
        tokens = [self.say(list(row.tokens), row.num_unknown) for row in rows]
        bad = {place for place, row in enumerate(rows) if self.bad(number, row)}
        self.steps.append(Step(self, tokens, self.result_fault(number), bad))
        return self.steps[-1]


class Draft:
    """A draft model on a pool of `blocks`, and the sequences that it is asked for."""

    def __init__(self, *, blocks: int = 64, prefix: bool = True, **options: Any) -> None:
        pool = BlockPool(block_size=BLOCK_SIZE, segment_blocks=4)
        for first in range(0, blocks, 4):
            pool.add_segment(min(4, blocks - first))
        self.cache = KVCache(pool, PrefixCache(BLOCK_SIZE) if prefix else None)
        self.now_s = 0.0
        sizes = {"vocab_size": 100, "target_vocab": 100, "context_tokens": 1000, "max_step_tokens": 64}
        self.model = DraftModel(self.cache, **(sizes | options), clock=lambda: self.now_s)
        self.device = self.model.pipeline = Device()

    def propose(self, *sequences: Sequence, k: int = 3) -> dict[int, tuple[int, ...]]:
        found = dict(self.model.propose(list(sequences), {sequence.id: k for sequence in sequences}))
        self.model.check_integrity()
        assert not self.cache._pins
        return found

    def chunks(self, step: int = -1) -> list[tuple[int, tuple[int, ...], int]]:
        return [(chunk.start, chunk.token_ids, chunk.sampled) for chunk in self.device.plans[step].chunks]

    def forget_plans(self) -> None:
        self.device.plans.clear()


def sequence(number: int, *tokens: int, arrival: int = 0, **sampling: Any) -> Sequence:
    params = SamplingParams(**({"max_tokens": 500} | sampling))
    spec = SequenceSpec(number, tuple(tokens), params)
    return Sequence(spec, arrival or number, list(tokens), Stage.RUNNING)


def test_a_guess_is_one_step_for_each_token_and_each_reads_the_one_before() -> None:
    draft = Draft()
    assert draft.propose(sequence(1, 7, 8, 9), k=4) == {1: (10, 11, 12, 13)}
    assert [draft.chunks(step) for step in range(4)] == [
        [(0, (7, 8, 9), 1)],
        [(3, (10,), 1)],
        [(4, (11,), 1)],
        [(5, (12,), 1)],
    ]
    assert [row.num_output for [row] in draft.device.rows] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("said", "start", "read"),
    [
        ((50,), 3, (50,)),
        ((10, 50), 4, (50,)),
        ((10, 11, 12, 13), 5, (12, 13)),  # of a whole guess the last token was never computed
        ((10, 11, 12, 50), 5, (12, 50)),
        ((10, 11), 4, (11,)),  # only the first was verified
        ((10, 11, 12), 5, (12,)),
        ((50, 51, 52), 3, (50, 51, 52)),
        ((), 2, (9,)),  # nothing came of it: the last token's logits are wanted again
    ],
)
def test_what_was_guessed_right_is_computed_and_the_rest_is_read_again(
    said: tuple[int, ...], start: int, read: tuple[int, ...]
) -> None:
    draft = Draft()
    one = sequence(1, 7, 8, 9)
    draft.propose(one)
    one.tokens += said
    draft.forget_plans()
    last = one.tokens[-1]
    assert draft.propose(one) == {1: (last + 1, last + 2, last + 3)}
    assert draft.chunks(0) == [(start, read, 1)]


def test_a_guess_that_is_never_verified_is_not_believed_when_the_sequence_comes_back() -> None:
    draft = Draft()
    one = sequence(1, 7, 8, 9)
    draft.propose(one, k=8)
    one.tokens += [10, 11, 60, 61, 62]  # said without proposals, after a preemption
    draft.forget_plans()
    draft.propose(one)
    assert draft.chunks(0) == [(5, (60, 61, 62), 1)]


def test_nothing_guessed_is_published() -> None:
    draft = Draft()
    one, other = sequence(1, 1, 2, 3), sequence(2, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
    assert draft.propose(one, k=7) == {1: (4, 5, 6, 7, 8, 9, 10)}
    draft.model.forget(1)
    assert len(draft.cache.prefix or ()) == 1, "the prompt's tail is there to be copied"
    draft.propose(other)
    assert draft.chunks(-3) == [(2, (3, 4, 5, 6, 7, 8, 9, 10), 1)]
    draft.propose(other)
    draft.model.forget(2)
    assert len(draft.cache.prefix or ()) == 3


def test_two_sequences_share_what_was_computed_and_copies_are_made_before_it_is_read() -> None:
    draft = Draft()
    one = sequence(1, *range(10))
    draft.propose(one)
    draft.model.forget(1)
    draft.forget_plans()
    draft.propose(sequence(2, *range(9), 50))
    assert draft.chunks(0) == [(9, (50,), 1)]
    [copy] = draft.device.plans[0].copies
    assert copy.num_tokens == 1
    assert all(not plan.copies for plan in draft.device.plans[1:])


def test_a_copy_is_made_for_one_that_has_no_turn_yet() -> None:
    draft = Draft(max_step_tokens=8)
    for number, tokens in ((1, range(6)), (2, range(20, 26))):
        draft.propose(sequence(number, *tokens))
        draft.model.forget(number)
    draft.forget_plans()
    # Each has seven to read, and a step has room for eight.
    first = sequence(3, *range(5), *range(40, 47))
    second = sequence(4, *range(20, 25), *range(50, 57))
    assert draft.propose(first, second).keys() == {3}
    assert [len(plan.copies) for plan in draft.device.plans] == [2, 0, 0]
    draft.forget_plans()
    first.tokens.append(47)
    draft.model.forget(3)
    assert draft.propose(second).keys() == {4}
    assert draft.chunks(0) == [(5, tuple(range(50, 57)), 1)]


def test_a_long_prompt_is_read_in_pieces_and_that_is_said() -> None:
    draft = Draft(max_step_tokens=40, blocks=100)
    one = sequence(1, *(place % 90 for place in range(100)))
    assert draft.model.unread(one) == 100
    assert draft.propose(one) == {}
    assert draft.chunks(0) == [(0, tuple(one.tokens[:40]), 0)]
    assert draft.model.unread(one) == 60
    assert draft.propose(one) == {1: (10, 11, 12)}
    assert [draft.chunks(1), draft.chunks(2)] == [
        [(40, tuple(one.tokens[40:80]), 0)],
        [(80, tuple(one.tokens[80:]), 1)],
    ]
    assert draft.model.unread(one) == 0
    assert draft.model.take_reading().tokens == 80
    assert draft.model.take_reading().tokens == 0


def test_what_is_left_of_a_prompt_is_read_and_guessed_from_at_once() -> None:
    draft = Draft()
    one = sequence(1, *range(60))
    assert draft.propose(one, k=1) == {1: (60,)}
    assert [draft.chunks(0), draft.chunks(1)] == [[(0, tuple(range(59)), 0)], [(59, (59,), 1)]]


@pytest.mark.parametrize("max_step_tokens", [1, 2, 5, 23])
def test_a_budget_smaller_than_the_usual_lag_leaves_nobody_behind(max_step_tokens: int) -> None:
    draft = Draft(max_step_tokens=max_step_tokens)
    one = sequence(1, *range(20))
    for _ in range(20):
        found = draft.propose(one)
        assert all(plan.num_tokens <= max_step_tokens for plan in draft.device.plans)
        if found:
            break
    assert found == {1: (20, 21, 22)}
    for _ in range(4):
        one.tokens += [one.tokens[-1] + step for step in range(1, 5)]
        before = draft.model.unread(one)
        assert draft.propose(one), f"{before} tokens behind"


def test_sequences_of_one_step_have_a_row_each() -> None:
    draft = Draft()
    found = draft.propose(sequence(1, 5), sequence(2, 15, 16), sequence(3, 25))
    assert found == {1: (6, 7, 8), 2: (17, 18, 19), 3: (26, 27, 28)}
    assert draft.chunks(0) == [(0, (5,), 1), (0, (15, 16), 1), (0, (25,), 1)]


def test_each_has_as_many_as_are_wanted() -> None:
    draft = Draft()
    asked = [sequence(1, 5), sequence(2, 15), sequence(3, 25)]
    assert draft.model.propose(asked, {1: 2, 2: 0, 3: 1}) == {1: (6, 7), 3: (26,)}
    assert [len(plan.chunks) for plan in draft.device.plans] == [2, 1]


# ---- a device that chooses by itself


def test_on_a_device_that_chooses_by_itself_all_steps_are_begun_before_one_is_read() -> None:
    draft = Draft(overlaps=True)
    assert draft.propose(sequence(1, 7, 8, 9), k=4) == {1: (10, 11, 12, 13)}
    assert [draft.chunks(step) for step in range(4)] == [
        [(0, (7, 8, 9), 1)],
        *([(place, (UNKNOWN,), 1)] for place in (3, 4, 5)),
    ]
    assert [(len(row.tokens), row.num_unknown) for [row] in draft.device.rows] == [(3, 0), (3, 1), (3, 2), (3, 3)]
    assert draft.device.waited == draft.device.steps


def test_there_a_token_that_was_not_computed_is_a_sampled_row_like_the_next() -> None:
    draft = Draft(overlaps=True)
    one = sequence(1, 7, 8, 9)
    draft.propose(one)
    one.tokens += [10, 11, 12, 13]
    draft.forget_plans()
    assert draft.propose(one) == {1: (14, 15, 16)}
    assert draft.chunks(0) == [(5, (12, 13), 2)]


def test_there_penalties_have_no_effect() -> None:
    sampling = {"presence_penalty": 1.0, "frequency_penalty": 1.0, "repetition_penalty": 2.0, "logprobs": 3}
    for overlaps in (True, False):
        draft = Draft(overlaps=overlaps)
        draft.propose(sequence(1, 7, **sampling))
        [row] = draft.device.rows[0]
        expected = SamplingParams(500) if overlaps else SamplingParams(500, **(sampling | {"logprobs": None}))
        assert row.params == expected


# ---- where a guess ends


@pytest.mark.parametrize("overlaps", [False, True])
def test_a_guess_ends_before_the_end_of_the_answer_and_before_what_the_target_does_not_know(overlaps: bool) -> None:
    draft = Draft(overlaps=overlaps, vocab_size=100, target_vocab=62)
    stopping = sequence(1, 7, stop_token_ids=frozenset({10}))
    assert draft.propose(stopping, sequence(2, 60), sequence(3, 20)) == {1: (8, 9), 2: (61,), 3: (21, 22, 23)}
    stopping.tokens += [8, 9]
    draft.forget_plans()
    assert draft.propose(stopping) == {}
    # Its first token was the end; what was computed for that is not computed again.
    stopping.tokens.append(40)
    draft.forget_plans()
    draft.propose(stopping)
    assert draft.chunks(0) == [(3, (40,), 1)]


def test_a_sequence_that_says_what_the_draft_does_not_know_gets_no_guess_any_more() -> None:
    draft = Draft(vocab_size=50, target_vocab=100)
    one, other = sequence(1, 7, 8), sequence(2, 7, 60)
    assert draft.propose(one, other).keys() == {1}
    assert (draft.model.serves(one), draft.model.serves(other)) == (True, False)
    one.tokens += [9, 70, 8]
    assert draft.propose(one) == {}
    assert not draft.model.serves(one)
    assert draft.cache.pool.active_blocks == 0, "nor does it keep blocks"
    assert all(token < 50 for plan in draft.device.plans for chunk in plan.chunks for token in chunk.token_ids)


def test_a_bias_of_what_the_draft_does_not_know_is_left_out() -> None:
    draft = Draft(vocab_size=50, target_vocab=100)
    draft.propose(sequence(1, 7, logit_bias=((3, 1.0), (70, 2.0), (49, -1.0))))
    [row] = draft.device.rows[0]
    assert row.params.logit_bias == ((3, 1.0), (49, -1.0))
    Sampler(50, "cpu").sample(torch.zeros(1, 50), [row])


def test_there_are_no_guesses_beyond_what_the_draft_can_see() -> None:
    draft = Draft(context_tokens=20)
    one = sequence(1, *range(16))
    assert draft.propose(one) == {1: (16, 17, 18)}
    one.tokens += [16, 17]
    assert draft.propose(one) == {1: (18, 19)}
    one.tokens += [18, 19]
    assert draft.propose(one) == {}
    assert not draft.model.serves(one)
    assert draft.cache.pool.active_blocks == 0


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


def test_chunks_cover_their_tables() -> None:
    draft = Draft(overlaps=True)
    draft.propose(sequence(1, *range(11)), k=9)
    chunks: list[Chunk] = [chunk for plan in draft.device.plans for chunk in plan.chunks]
    assert all(chunk.end <= len(chunk.block_table) * BLOCK_SIZE for chunk in chunks)
