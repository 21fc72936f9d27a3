"""How a draft model reads and guesses, and where its guesses end."""

import pytest
import torch

from edgekv.core.sampling import SamplingParams
from edgekv.core.step import UNKNOWN, Chunk
from edgekv.engine.sampler import Sampler
from tests.unit.engine.draft_alone import BLOCK_SIZE, Draft, sequence


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


def test_chunks_cover_their_tables() -> None:
    draft = Draft(overlaps=True)
    draft.propose(sequence(1, *range(11)), k=9)
    chunks: list[Chunk] = [chunk for plan in draft.device.plans for chunk in plan.chunks]
    assert all(chunk.end <= len(chunk.block_table) * BLOCK_SIZE for chunk in chunks)


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
