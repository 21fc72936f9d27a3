"""Answers of the demo model with and without its draft, step by step."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from edgekv.core.sampling import SamplingParams
from edgekv.core.sequence import SequenceSpec
from edgekv.core.speculation import Controller
from edgekv.demo import draft_path, target_path
from edgekv.engine.assemble import assemble, controller_of
from edgekv.engine.draft_settings import DraftSettings
from edgekv.engine.measure_speculation import FixedTokens, SpeculationMeter, Way, ways
from edgekv.engine.settings import EngineSettings
from edgekv.engine.step_sums import StepKind, StepSums, Turn
from edgekv.smi.device import choose_place

SPECS = [
    SequenceSpec(number, tuple(range(40 + number, 70 + 2 * number)), SamplingParams(20, temperature=0.0))
    for number in range(3)
]


@pytest.fixture(scope="module")
def meter() -> Iterator[SpeculationMeter]:
    base = EngineSettings(target_path(), choose_place("cpu", {}), kv_budget=64 << 20, max_sequences=2)
    drafted = replace(base, draft=DraftSettings(draft_path(), tokens=4))
    core, _ = assemble(drafted, lambda done, total, stage: None)
    yield SpeculationMeter(core, detailed=True)
    core.scheduler.cache.check_integrity([])


def test_each_way_verifies_as_much_as_it_says(meter: SpeculationMeter) -> None:
    plain, automatic, three = ways(meter, Controller(4), [3], 3)
    turns = {way.name: way.answer(SPECS) for way in (plain, automatic, three)}
    assert turns["plain"].said == turns["automatic"].said == turns["fixed 3"].said
    assert {len(said) for said in turns["plain"].said.values()} == {20}
    assert StepKind.VERIFY not in turns["plain"].kinds
    fixed = turns["fixed 3"]
    # As it is served, two sequences and four proposals at once would be the most.
    verify = fixed.of(StepKind.VERIFY)
    assert verify.sequences / verify.steps > 2
    assert verify.rows - verify.sequences == verify.proposed
    assert verify.proposed / verify.sequences > 2
    assert fixed.verifications > 0
    assert 0 <= fixed.first_right <= fixed.verifications
    assert fixed.accepted <= fixed.proposed <= fixed.steps.proposed
    # Every token is of a row that was verified and right, or the one after these.
    assert fixed.steps.tokens == fixed.steps.sequences + fixed.accepted == 60


def test_a_later_way_has_its_own_limits(meter: SpeculationMeter) -> None:
    for way in ways(meter, Controller(4), [1], 1):
        way.answer(SPECS)
    found = {way.name: way for way in ways(meter, Controller(4), [1], 2)}
    assert (found["automatic"].most_proposed, found["fixed 1"].most_proposed) == (4, None)
    assert max_sequences(found["plain"]) == 2


def max_sequences(way: Way) -> int:
    decoding = way.answer(SPECS).decoding
    return -(-decoding.sequences // decoding.steps)


def test_nothing_is_cached_when_a_turn_begins(meter: SpeculationMeter) -> None:
    _, _, fixed = ways(meter, Controller(4), [2], 3)
    for _ in range(2):
        before = fixed.core.stats().cached_prompt_tokens
        turn = fixed.answer(SPECS)
        assert fixed.core.stats().cached_prompt_tokens == before
        read = turn.of(StepKind.READ)
        assert read.rows >= sum(len(spec.prompt) for spec in SPECS) - len(SPECS)


def test_what_cannot_be_answered_is_an_error(meter: SpeculationMeter) -> None:
    plain, *_ = ways(meter, Controller(4), [], 1)
    with pytest.raises(ValueError, match=r"sequence 5: .*vocabulary"):
        plain.answer([replace(SPECS[0], id=5, prompt=(1 << 30,))])


def test_a_fixed_number_never_rests() -> None:
    fixed = FixedTokens(3)
    assert fixed.choose({1: 9, 2: 2, 3: 0}) == {1: 3, 2: 2}
    assert fixed.is_on


def test_a_controller_is_as_it_is_served() -> None:
    settings = EngineSettings(target_path(), choose_place("cpu", {}))
    assert controller_of(settings) is None
    controller = controller_of(replace(settings, draft=DraftSettings(tokens=3)))
    assert controller is not None
    assert controller.most == 3


def test_a_drafts_steps_are_not_counted_twice() -> None:
    turn = Turn()
    turn.of(StepKind.PROMPT).add(StepSums(steps=1, tokens=1, total_s=1.0))
    turn.of(StepKind.VERIFY).add(StepSums(steps=2, tokens=5, total_s=2.0, propose_s=0.5))
    turn.of(StepKind.DRAFT).add(StepSums(steps=4, rows=4, total_s=0.5))
    assert (turn.steps.steps, turn.steps.total_s, turn.tok_s) == (3, 3.0, 2.0)
    assert turn.decoding.tokens == 5
    other = Turn(said={1: [2]}, verifications=2, proposed=4, accepted=3, first_right=1)
    other.add(turn)
    other.add(turn)
    assert other.of(StepKind.DRAFT).rows == 8
    assert (other.verifications, other.accepted, other.said) == (2, 3, {1: [2]})
