"""A step that verifies: who is asked and told what, and what a fault in one of its rows costs."""

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Listing
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from edgekv.core.block_pool import BlockPool
from edgekv.core.kv_cache import KVCache
from edgekv.core.prefix_cache import PrefixCache
from edgekv.core.sampling import SamplingParams
from edgekv.core.scheduler import Limits, Outcome, Scheduler
from edgekv.core.sequence import FinishReason, Sequence, SequenceSpec
from edgekv.core.speculation import Controller
from edgekv.core.speculation_accounts import PROBING_SHARE
from edgekv.core.step import Sampled, SpeculationState, StepPlan, StepReport
from edgekv.engine.core import EngineCore
from edgekv.engine.proposer import Proposer
from edgekv.engine.protocols import Pending
from edgekv.engine.sample_row import Followed, SampleRow, sample_rows
from edgekv.engine.sampler import Sampler

VOCAB = 40


class CountingRunner:
    """A model that says one more than the last token; after some tokens it says nothing finite."""

    def __init__(self) -> None:
        self.mute: set[int] = set()
        self.fails = False
        self.plans: list[StepPlan] = []

    def forward(self, plan: StepPlan) -> Tensor:
        if self.fails:
            raise torch.OutOfMemoryError("the card is full")
        self.plans.append(plan)
        logits = torch.zeros(plan.num_sampled, VOCAB)
        rows = [token for chunk in plan.sampling for token in chunk.token_ids[-chunk.sampled :]]
        for row, token in enumerate(rows):
            logits[row, (token + 1) % VOCAB] = 9.0 if token not in self.mute else float("nan")
        return logits


@dataclass
class Script(Proposer):
    """Proposes what it is told to, and notes down what it hears."""

    guess: Callable[[Sequence], tuple[int, ...]]
    asked: list[dict[int, int]] = field(default_factory=list)
    told: list[tuple[int, int, int]] = field(default_factory=list)
    forgotten: list[int] = field(default_factory=list)

    def propose(self, sequences: Listing[Sequence], most: Mapping[int, int]) -> Mapping[int, tuple[int, ...]]:
        assert [sequence.id for sequence in sequences] == list(most)
        self.asked.append(dict(most))
        return {sequence.id: self.guess(sequence) for sequence in sequences}

    def observe(self, sequence_id: int, proposed: int, accepted: int) -> None:
        self.told.append((sequence_id, proposed, accepted))

    def forget(self, sequence_id: int) -> None:
        self.forgotten.append(sequence_id)


def counting(length: int) -> Callable[[Sequence], tuple[int, ...]]:
    """Always right."""
    return lambda sequence: tuple((sequence.tokens[-1] + 1 + i) % VOCAB for i in range(length))


class Harness:
    def __init__(
        self, guess: Callable[[Sequence], tuple[int, ...]], *, controller: Controller | None = None, step_s: float = 0.0
    ) -> None:
        blocks = BlockPool(block_size=4, segment_blocks=16)
        blocks.add_segment(16)
        self.scheduler = Scheduler(KVCache(blocks, PrefixCache(4)), Limits())
        self.runner, self.script = CountingRunner(), Script(guess)
        self.now_s = 0.0
        self.core = EngineCore(
            self.scheduler,
            self.runner,
            Sampler(VOCAB, "cpu"),
            VOCAB,
            clock=self.clock,
            proposer=self.script,
            controller=controller,
        )
        self.step_s = step_s
        self.reasons: dict[int, FinishReason] = {}

    def clock(self) -> float:
        self.now_s += self.step_s
        return self.now_s

    def submit(self, number: int, prompt: tuple[int, ...] = (1, 2, 3), max_tokens: int = 20) -> None:
        self.core.submit(SequenceSpec(number, prompt, SamplingParams(max_tokens, temperature=0.0)))

    def step(self) -> list[int]:
        """The tokens of a step."""
        return [out.sampled.token_id for out in self.report().tokens]

    def report(self) -> StepReport:
        report = self.core.step()
        self.scheduler.check_integrity()
        self.reasons |= {last.sequence_id: last.reason for last in report.finished}
        return report


def test_those_that_decode_are_asked_for_and_what_was_right_is_told() -> None:
    harness = Harness(lambda sequence: (*counting(2)(sequence), 0, 0))
    harness.submit(1)
    assert harness.step() == [4]
    assert harness.script.asked == [], "nobody decodes yet"
    assert harness.step() == [5, 6, 7]
    assert harness.script.asked == [{1: 18}]
    assert harness.script.told == [(1, 4, 2)]
    assert harness.step() == [8, 9, 10]
    assert harness.script.asked[1:] == [{1: 15}]
    stats = harness.core.stats()
    assert (stats.generated_tokens, stats.proposed_tokens, stats.accepted_tokens, stats.steps) == (7, 8, 4, 3)


def test_the_statistics_name_who_proposes_and_what_a_step_gives() -> None:
    harness = Harness(lambda sequence: (*counting(2)(sequence), 0, 0), controller=Controller(6))
    assert harness.script.name is None
    harness.script.name = "small"
    told = harness.core.stats().speculation
    assert told is not None
    assert (told.drafter, told.most_tokens, told.tokens_a_step) == ("small", 6, None)
    free = Harness(lambda sequence: (*counting(2)(sequence), 0, 0))
    free.submit(1)
    for _ in range(3):
        free.step()
    told = free.core.stats().speculation
    assert told is not None
    assert (told.drafter, told.most_tokens, told.tokens_a_step) == (None, None, 3.0)
    free.script.guess = lambda sequence: (0,)
    free.step()
    free.core.abort(1)  # until then they may be some steps old
    told = free.core.stats().speculation
    assert told is not None
    assert told.tokens_a_step == pytest.approx(2.8), "of which the latest is a tenth"


def test_nobody_is_asked_for_more_than_is_left() -> None:
    harness = Harness(counting(9))
    harness.submit(1, max_tokens=3)
    harness.step()
    assert harness.step() == [5, 6]
    assert harness.script.asked == [{1: 1}]
    harness.submit(2, max_tokens=2)
    assert (harness.step(), harness.step()) == ([4], [5])
    assert len(harness.script.asked) == 1, "one token is left, which needs no proposal"


def test_whoever_ended_or_was_aborted_is_forgotten() -> None:
    harness = Harness(counting(2))
    harness.submit(1, max_tokens=3)
    harness.submit(2)
    while 1 not in harness.reasons:
        harness.step()
    assert harness.script.forgotten == [1]
    harness.core.abort(2)
    assert harness.script.forgotten == [1, 2]


def test_a_bad_row_behind_what_is_accepted_costs_nothing() -> None:
    harness = Harness(lambda sequence: (5, 0, 0))
    harness.runner.mute = {0}
    harness.submit(1)
    assert [harness.step(), harness.step()] == [[4], [5, 6]]
    assert harness.script.told == [(1, 1, 1)], "what nobody could verify does not count"
    assert harness.reasons == {}


@pytest.mark.parametrize("length", [1, 2, 3, 8])
def test_a_bad_row_that_is_used_ends_its_sequence_behind_what_it_had_said(length: int) -> None:
    harness = Harness(counting(length))
    harness.runner.mute = {7}
    harness.submit(1)
    harness.submit(2, (20, 20, 20, 20, 20))
    said: dict[int, list[int]] = {1: [], 2: []}
    while 1 not in harness.reasons:
        for out in harness.report().tokens:
            said[out.sequence_id].append(out.sampled.token_id)
    assert said[1] == [4, 5, 6, 7], "as without proposals"
    assert harness.reasons == {1: FinishReason.ERROR}
    assert said[2][:4] == [21, 22, 23, 24], "the other one goes on"
    harness.runner.mute = set()
    harness.submit(3, (1, 2, 3, 4, 5))
    (started,) = harness.report().started
    assert started.cached_tokens == 0, "nothing of it is reused"


def test_a_step_without_memory_for_what_it_verifies_is_tried_again_without_and_then_with_less() -> None:
    harness = Harness(counting(4))
    for number in (1, 2):
        harness.submit(number)
    harness.step()
    harness.runner.fails = True
    assert harness.step() == []
    assert harness.scheduler.num_running == 2, "nobody pays for what was only proposed"
    assert len(harness.script.asked) == 1
    assert harness.step() == []
    assert harness.scheduler.num_running == 1
    harness.runner.fails = False
    assert len(harness.step()) == 1
    assert len(harness.script.asked) == 1, "for a while there are no proposals"
    while harness.core.busy:
        harness.step()
    assert set(harness.reasons.values()) == {FinishReason.LENGTH}


def test_a_controller_says_how_many_and_learns_what_steps_take() -> None:
    controller = Controller(3)
    harness = Harness(counting(9), controller=controller)
    forward = harness.runner.forward

    def timed(plan: StepPlan) -> Tensor:
        harness.now_s += 1.0 + 0.1 * plan.num_tokens
        return forward(plan)

    harness.runner.forward = timed  # type: ignore[method-assign]
    harness.submit(1)
    assert harness.step() == [4]
    assert controller.costs.plain(1) is None, "a prompt's step says nothing of decoding"
    assert [harness.step() for _ in range(3)] == [[5], [6], [7]], "a few of them before any other"
    assert controller.costs.plain(1) == pytest.approx(1.1)
    said = harness.step()
    assert harness.script.asked == [{1: len(said) - 1}]
    assert len(said) >= 2
    assert controller.costs.of(1, len(said)) == pytest.approx(1.0 + 0.1 * len(said))
    assert controller.seen.chances(1)[0] > 0.6
    harness.core.abort(1)
    assert controller.seen._by_sequence == {}


def test_where_none_is_worth_it_nobody_is_asked() -> None:
    controller = Controller(3)
    controller.observe_step(1, 0, 0, 1.0)
    controller.accounts._left[1] = -1.0
    harness = Harness(counting(9), controller=controller)
    harness.submit(1)
    assert (harness.step(), harness.step()) == ([4], [5])
    assert harness.script.asked == []


def test_in_debt_nobody_thinks_about_it() -> None:
    controller = Controller(3)
    harness = Harness(counting(9), controller=controller)
    harness.submit(1)
    harness.step()
    controller.accounts._left[1] = -1.0

    def choose(*_: object) -> dict[int, int]:
        raise AssertionError("it is asked what to choose")

    controller.choose = choose  # type: ignore[method-assign, assignment]
    assert harness.step() == [5]


def test_rests_are_kept_by_how_many_run_and_told_of() -> None:
    controller = Controller(3)
    harness = Harness(counting(9), controller=controller)
    asked: list[int] = []

    def choose(most: Mapping[int, int], *_: object) -> dict[int, int]:
        asked.append(len(most))
        controller.rest_steps = 3
        return {}

    rested: list[tuple[int, int]] = []
    controller.choose = choose  # type: ignore[method-assign, assignment]
    controller.observe_rest = lambda decodes, steps: rested.append((decodes, steps))  # type: ignore[method-assign]
    for number in (1, 2):
        harness.submit(number)
    for _ in range(4):
        harness.step()
    assert asked == [2], "a prompt, the choice, and two steps at rest"
    harness.core.abort(2)
    harness.step()
    assert asked == [2, 1]
    assert rested == [(2, 2)]
    harness.submit(3)
    for _ in range(3):
        harness.step()
    assert asked == [2, 1, 2], "one step of the rest was left"


def test_a_rest_of_one_ends_with_its_sequence() -> None:
    controller = Controller(3)
    harness = Harness(counting(9), controller=controller)
    asked: list[int] = []

    def choose(most: Mapping[int, int], *_: object) -> dict[int, int]:
        asked.extend(most)
        controller.rest_steps = 100
        return {}

    controller.choose = choose  # type: ignore[method-assign, assignment]
    harness.submit(1)
    for _ in range(4):
        harness.step()
    harness.core.abort(1)
    harness.submit(2)
    for _ in range(4):
        harness.step()
    assert asked == [1, 2]


def test_a_step_verifies_no_more_in_all_than_there_may_be() -> None:
    harness = Harness(counting(0))
    harness.scheduler.limits = Limits(max_proposed=5)
    for number in (1, 2):
        harness.submit(number)
    harness.step()
    plan = harness.scheduler.plan(dict.fromkeys((1, 2), (7, 7, 7, 7)))
    assert [len(chunk.proposed) for chunk in plan.chunks] == [2, 3]


class Done:
    """A step that was done at once."""

    def __init__(self, sampled: list[Sampled]) -> None:
        self._sampled = sampled

    def result(self, without: object = ()) -> list[Sampled]:
        return self._sampled


class AtOnce:
    """A pipeline that does a step when it is begun."""

    def begin(self, plan: StepPlan, rows: list[SampleRow], after: Pending | None) -> Done:
        return Done([Sampled(4) for _ in rows])


def test_with_a_pipeline_they_are_asked_and_told_too() -> None:
    harness = Harness(counting(2))
    core = EngineCore(
        harness.scheduler,
        harness.runner,
        Sampler(VOCAB, "cpu"),
        VOCAB,
        pipeline=AtOnce(),
        proposer=harness.script,
    )
    core.submit(SequenceSpec(1, (1, 2, 3), SamplingParams(6)))
    said = [out.sampled.token_id for _ in range(9) if core.busy for out in core.step().tokens]
    assert said == [4] * 6
    assert harness.script.asked[0] == {1: 3}, "the first step after the prompt was begun ahead"
    assert harness.script.told[0] == (1, 2, 0), "4 is not 5"
    assert harness.script.forgotten == [1]


def test_a_step_that_was_alone_for_nothing_is_paid_for_and_says_nothing_of_plain_ones() -> None:
    controller = Controller(3)
    for _ in range(3):
        controller.observe_step(1, 0, 0, 1.0)
    harness = Harness(counting(0), controller=controller)
    harness.submit(1)
    harness.step()
    speculation = harness.core._speculation
    assert speculation is not None
    before = controller.account_steps
    plan = harness.scheduler.plan()
    speculation.observe(plan, Outcome(), None, is_alone=True)
    speculation.took(1.5)
    assert controller.costs.plain(1) == 1.0
    assert controller.account_steps == pytest.approx(min(before, before - 0.5 + PROBING_SHARE))


def test_stats_are_new_when_a_sequence_ends_and_when_the_draft_is_given_up() -> None:
    harness = Harness(counting(9))
    speculation = harness.core._speculation
    assert speculation is not None
    harness.submit(1)
    harness.step()
    told = speculation.stats()
    assert speculation.stats() is told
    harness.core.abort(1)
    again = speculation.stats()
    assert again is not told
    harness.script.gone = "its files went"
    assert speculation.stats().state is SpeculationState.OFF


def test_a_proposer_without_memory_costs_nobody_anything() -> None:
    harness = Harness(counting(2))
    harness.submit(1)
    harness.step()

    def fails(sequences: object, most: object) -> Mapping[int, tuple[int, ...]]:
        raise MemoryError("none left")

    harness.script.propose = fails  # type: ignore[method-assign, assignment]
    assert harness.step() == [5]
    harness.script.propose = Script.propose.__get__(harness.script)  # type: ignore[method-assign]
    assert harness.step() == [6], "for a while nobody is asked"
    assert harness.script.asked == []


def test_a_row_sees_the_proposals_before_it_as_output() -> None:
    harness = Harness(counting(0))
    harness.submit(1)
    harness.step()
    plan = harness.scheduler.plan({1: (8, 9)})
    rows = sample_rows(plan)
    assert [list(row.tokens) for row in rows] == [[1, 2, 3, 4], [1, 2, 3, 4, 8], [1, 2, 3, 4, 8, 9]]
    assert [row.num_output for row in rows] == [1, 2, 3]
    assert rows[0].tokens is plan.chunks[0].sequence.tokens, "without a copy"


def test_tokens_with_some_behind_them_are_a_sequence() -> None:
    tokens = Followed([1, 2, 3], (4, 5))
    plain = [1, 2, 3, 4, 5]
    assert list(tokens) == plain
    assert len(tokens) == 5
    assert [tokens[i] for i in range(-5, 5)] == plain + plain
    for cut in (slice(None), slice(2, None), slice(None, 2), slice(4, 1, -1), slice(3, 4)):
        assert list(tokens[cut]) == plain[cut]
    with pytest.raises(IndexError):
        tokens[5]
