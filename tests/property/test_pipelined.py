"""With one step in flight every sequence says what it would say alone, whatever comes between."""

from typing import Any

import pytest
from hypothesis.stateful import run_state_machine_as_test

from edgekv.engine.core import EngineCore
from tests.property.pipelined_machine import PipelinedMachine
from tests.property.test_elastic import HUNT, LONG


def test_no_interleaving_of_requests_orders_and_faults_changes_what_is_said() -> None:
    class CountedMachine(PipelinedMachine):
        pass

    run_state_machine_as_test(CountedMachine, settings=LONG)
    assert CountedMachine.operations >= 3000
    assert CountedMachine.ahead_steps >= 300, "hardly any step ran ahead"
    assert CountedMachine.orders_in_flight >= 20, "hardly ever was a step in flight when memory moved"


class UnsettledCore(EngineCore):
    """Planted: memory moves while a step is in flight."""

    def settle(self) -> None:
        """Waits for nothing."""


class CredulousCore(EngineCore):
    """Planted: what was computed behind a step that failed is believed."""

    def __init__(self, *parts: Any, **options: Any) -> None:
        super().__init__(*parts, **options)
        assert self._in_flight is not None
        self._in_flight._forget = lambda ahead: None  # type: ignore[method-assign]


@pytest.mark.parametrize("planted", [UnsettledCore, CredulousCore])
def test_a_planted_carelessness_is_caught(planted: type[EngineCore]) -> None:
    machine = type("PlantedMachine", (PipelinedMachine,), {"core_class": planted})
    with pytest.raises(AssertionError):
        run_state_machine_as_test(machine, settings=HUNT)
