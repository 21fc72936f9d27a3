"""A core whose device does one step while the next is planned, and somebody who proposes tokens: they take turns."""

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekv.core.sampling import SamplingParams
from edgekv.core.scheduler import Outcome, Proposals
from edgekv.core.sequence import FinishReason, SequenceSpec
from edgekv.core.step import StepPlan
from edgekv.engine.speculate import Speculation
from tests.unit.engine.test_in_flight import VOCAB, Harness, alone, logits_after, out_of_memory, params, tokens_of

Wanted = Callable[[], bool]


class Script(Speculation):
    """Proposes `k` tokens that greedy sequences say next, each wrong with a chance, in the steps that are `wanted`."""

    def __init__(self, harness: Harness, k: int, *, wrong: float = 0.0, wanted: Wanted = lambda: True) -> None:
        self._harness, self._k, self._wrong, self._wanted = harness, k, wrong, wanted
        self._chance = random.Random(k)
        self._answer: bool | None = None
        self.seconds: list[float | str | None] = []
        self.proposed: list[int] = []

    def wants(self) -> bool:
        self._answer = self._wanted()
        return self._answer

    def proposals(self) -> Proposals:
        answer, self._answer = self._wanted() if self._answer is None else self._answer, None
        return {each.id: self._guess(each.tokens) for each in self._harness.scheduler.decoding()} if answer else {}

    def observe(self, plan: StepPlan, outcome: Outcome, seconds: float | None, *, is_alone: bool = False) -> None:
        self.seconds.append("alone" if is_alone else seconds)
        self.proposed.append(sum(len(chunk.proposed) for chunk in plan.chunks))

    def forget(self, sequence_ids: object) -> None:
        """It knows nothing of sequences."""

    def _guess(self, tokens: list[int]) -> tuple[int, ...]:
        said = list(tokens)
        for _ in range(self._k):
            right = int(logits_after(said).argmax())
            said.append(self._chance.randrange(VOCAB) if self._chance.random() < self._wrong else right)
        return tuple(said[len(tokens) :])


def scripted(k: int, *, wrong: float = 0.0, wanted: Wanted = lambda: True, **options: int) -> tuple[Harness, Script]:
    harness = Harness(**options)  # type: ignore[arg-type]
    script = Script(harness, k, wrong=wrong, wanted=wanted)
    assert harness.core._in_flight is not None
    harness.core._in_flight._speculation = script
    return harness, script


# ---- the order of things


def test_while_proposals_are_wanted_each_step_is_read_before_the_next_is_begun() -> None:
    harness, script = scripted(2)
    harness.submit(1, max_tokens=8)
    harness.run()
    assert harness.device.events == ["begin 1", "read 1", "begin 2", "read 2", "begin 3", "read 3", "begin 4", "read 4"]
    assert script.proposed == [0, 2, 2, 0], "1 token, 3, 3, and the last"
    assert harness.tokens(1) == alone(max_tokens=8)
    stats = harness.core.stats()
    assert (stats.steps, stats.ahead_steps, stats.proposed_tokens, stats.accepted_tokens) == (4, 0, 4, 4)


def test_whether_to_propose_again_is_asked_once_it_is_known_what_became_of_the_last_proposals() -> None:
    harness, _ = scripted(2, wanted=lambda: harness.device.events.append("asked") or True)
    harness.submit(1, max_tokens=7)
    harness.run()
    assert harness.device.events == [
        "asked", "begin 1", "asked", "read 1", "begin 2", "read 2", "asked", "begin 3", "read 3"
    ]  # fmt: skip


def test_a_step_that_was_begun_ahead_is_completed_before_anything_is_proposed() -> None:
    wants = False
    harness, script = scripted(2, wanted=lambda: wants)
    harness.submit(1, max_tokens=9)
    harness.step()
    harness.step()
    wants = True
    assert tokens_of(harness.step()) == [1]
    wants = False
    assert tokens_of(harness.step()) == [1, 1, 1]
    harness.run()
    assert harness.device.events == [
        "begin 1", "begin 2", "read 1", "begin 3", "read 2", "read 3",
        "begin 4", "read 4",  # nothing is begun ahead of a step that verifies
        "begin 5", "begin 6", "read 5", "begin 7", "read 6", "read 7",
    ]  # fmt: skip
    assert script.proposed[:4] == [0, 0, 0, 2]
    assert harness.tokens(1) == alone(max_tokens=9)


def test_whoever_proposes_nothing_changes_nothing() -> None:
    harness, _ = scripted(2, wanted=lambda: False)
    plain = Harness()
    for each in (harness, plain):
        each.submit(1)
        each.submit(2, (5, 5))
        each.run()
    assert harness.device.events == plain.device.events
    assert harness.outputs == plain.outputs


def test_what_steps_took_is_told_of_those_that_overlap_and_of_those_that_do_not() -> None:
    wants, now_s = False, 0.0
    harness, script = scripted(2, wanted=lambda: wants)

    def host(_: int) -> None:
        nonlocal now_s
        now_s += 1.0

    def device(_: int) -> None:
        nonlocal now_s
        now_s += 10.0

    harness.device.begin_fault, harness.device.result_fault = host, device
    harness.core.clock = lambda: now_s
    harness.submit(1, max_tokens=9)
    harness.step()
    assert script.seconds == ["alone"], "it overlapped with nothing"
    harness.step()
    assert script.seconds == ["alone", 11.0], "since the step before was read: the third was begun, the second read"
    wants = True
    harness.step()
    assert script.seconds[2:] == [10.0]
    now_s += 100.0  # whatever is between two steps
    harness.step()
    assert script.seconds[3:] == [None], "whoever reports will say"
    assert script.proposed == [0, 0, 0, 2]


# ---- faults


def test_a_row_that_is_not_finite_ends_its_own_sequence_behind_the_proposals_before_it() -> None:
    harness, _ = scripted(3)
    harness.device.nan_from = {2: 3}
    for number in (1, 2, 3):
        harness.submit(number, max_tokens=12)
    harness.step()
    assert tokens_of(harness.step()) == [1] * 4 + [2] * 2 + [3] * 4
    report = harness.step()
    assert [(last.sequence_id, last.reason) for last in report.finished] == [(2, FinishReason.ERROR)]
    assert tokens_of(report) == [1] * 4 + [3] * 4
    harness.run()
    assert harness.tokens(2) == alone()[:3]
    assert harness.tokens(1) == harness.tokens(3) == alone(max_tokens=12)


def test_one_behind_a_wrong_proposal_is_nobodys() -> None:
    harness, script = scripted(4, wrong=0.5)
    harness.device.nan_from = {1: 12}  # proposals go on behind its end
    for number in (1, 2):
        harness.submit(number, max_tokens=12)
    harness.run()
    assert harness.tokens(1) == harness.tokens(2) == alone(max_tokens=12)
    assert 0 < harness.core.stats().accepted_tokens < sum(script.proposed)


@pytest.mark.parametrize("where", ["begin_fault", "result_fault"])
@pytest.mark.parametrize("step", range(1, 6))
def test_out_of_memory_in_any_step_with_company_costs_only_time(where: str, step: int) -> None:
    harness, _ = scripted(1, wrong=0.5)
    setattr(harness.device, where, out_of_memory(step))
    prompts = {1: (1, 2, 3), 2: (1, 2, 3, 4, 5, 6), 3: (1, 2, 3, 4, 5, 9)}
    for number, prompt in prompts.items():
        harness.submit(number, prompt, max_tokens=9)
    harness.submit(4, max_tokens=20)  # so that nobody is ever alone
    harness.run()
    for number, prompt in prompts.items():
        assert harness.tokens(number) == alone(prompt, 9)
    assert set(harness.reasons.values()) == {FinishReason.LENGTH}
    assert harness.core.stats().accepted_tokens > 0


# ---- the same words as step by step


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9), params), min_size=1, max_size=5
    ),
    max_sequences=st.integers(1, 5),
    k=st.integers(1, 5),
    wrong=st.sampled_from([0.0, 0.3, 1.0]),
    turns=st.randoms(use_true_random=False),
)
def test_outputs_are_those_without_whoever_proposes_what_and_when(
    requests: list[tuple[list[int], SamplingParams]], max_sequences: int, k: int, wrong: float, turns: random.Random
) -> None:
    plain = Harness(pipelined=False, max_sequences=max_sequences)
    speculated, _ = scripted(k, wrong=wrong, wanted=lambda: turns.random() < 0.6, max_sequences=max_sequences)
    for harness in (plain, speculated):
        for number, (prompt, sampling) in enumerate(requests):
            harness.core.submit(SequenceSpec(number, tuple(prompt), sampling))
        harness.run()
    assert speculated.outputs == plain.outputs
    assert speculated.reasons == plain.reasons
