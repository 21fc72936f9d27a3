"""Whatever is proposed, every sequence says what it would say alone, and no block is lost or shared too soon."""

from collections.abc import Callable

import pytest
from hypothesis.stateful import run_state_machine_as_test

from edgekv.core.kv_cache import KVCache
from edgekv.core.scheduler import Outcome, Scheduler
from edgekv.core.sequence import Sequence
from edgekv.core.step import Chunk, Sampled, StepPlan
from edgekv.engine import core
from edgekv.engine.sample_row import SampleRow
from tests.property.hunt import hunt
from tests.property.speculating_machine import SpeculatingMachine
from tests.property.test_elastic import HUNT, LONG


def test_no_interleaving_of_requests_orders_and_faults_changes_what_is_said() -> None:
    class CountedMachine(SpeculatingMachine):
        pass

    run_state_machine_as_test(CountedMachine, settings=LONG)
    assert CountedMachine.operations >= 3000
    assert CountedMachine.accepted >= 200
    assert CountedMachine.rejected >= 200
    assert CountedMachine.ends_within >= 10, "hardly ever was there an end within what was accepted"


def rows_without_proposals(plan: StepPlan) -> list[SampleRow]:
    """Planted: penalties and counters see the tokens before the proposals only."""
    return [
        SampleRow(chunk.sequence.spec.sampling, chunk.sequence.tokens, chunk.sequence.num_prompt)
        for chunk in plan.sampling
        for _ in range(chunk.sampled)
    ]


def rows_drawn_as_the_first(plan: StepPlan) -> list[SampleRow]:
    """Planted: they see the proposals, and draw the first row's number."""
    return [
        SampleRow(sequence.spec.sampling, tokens, sequence.num_prompt, num_unknown=-place)
        for chunk in plan.sampling
        for place in range(chunk.sampled)
        for sequence in [chunk.sequence]
        for tokens in [[*sequence.tokens, *chunk.proposed[:place]]]
    ]


@pytest.mark.parametrize("rows", [rows_without_proposals, rows_drawn_as_the_first])
def test_a_row_that_is_told_the_wrong_past_is_caught(
    rows: Callable[[StepPlan], list[SampleRow]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core, "sample_rows", rows)
    with pytest.raises(AssertionError):
        hunt(type("PlantedMachine", (SpeculatingMachine,), {}), HUNT)


class CredulousScheduler(Scheduler):
    """Planted: the proposal after those that were right is accepted, too."""

    def _take_tokens(self, chunk: Chunk, choices: list[Sampled]) -> Outcome:  # type: ignore[override]
        right = next((i for i, p in enumerate(chunk.proposed) if choices[i].token_id != p), None)
        if right is not None:
            choices[right] = Sampled(chunk.proposed[right])
        return super()._take_tokens(chunk, choices)


class HastyScheduler(Scheduler):
    """Planted: all that was proposed is published, before it is known which of it was right."""

    def _take_tokens(self, chunk: Chunk, choices: list[Sampled]) -> Outcome:  # type: ignore[override]
        sequence = chunk.sequence
        sequence.tokens += chunk.proposed
        sequence.num_computed = chunk.end
        self.cache.publish(sequence)
        del sequence.tokens[len(sequence.tokens) - len(chunk.proposed) :]
        return super()._take_tokens(chunk, choices)


@pytest.mark.parametrize("planted", [CredulousScheduler, HastyScheduler])
def test_a_planted_carelessness_is_caught(planted: type[Scheduler]) -> None:
    machine = type("PlantedMachine", (SpeculatingMachine,), {"scheduler_class": planted})
    with pytest.raises(AssertionError):
        hunt(machine, HUNT)


def drop(self: KVCache, sequence: Sequence) -> None:
    """Planted: blocks of proposals are dropped and not given back."""
    del sequence.block_table[self.blocks_for(len(sequence.tokens)) :]


def keep(self: KVCache, sequence: Sequence) -> None:
    """Planted: they stay with the sequence."""


@pytest.mark.parametrize("planted", [drop, keep])
def test_blocks_that_do_not_come_back_are_caught(
    planted: Callable[[KVCache, Sequence], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KVCache, "trim", planted)
    with pytest.raises(AssertionError):
        hunt(type("PlantedMachine", (SpeculatingMachine,), {}), HUNT)
