"""An engine keeps every promise while its memory comes and goes, and a leak of one lease does not go unseen."""

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from edgekv.core.ledger import Lease, Ledger
from edgekv.engine.segments import KV_LEASE, Segments
from tests.property.elastic_machine import ElasticMachine

# Without the phase that shrinks a failure, which takes minutes here; it is run by hand where there is one.
LONG = settings(
    max_examples=100,
    stateful_step_count=50,
    deadline=None,
    phases=[Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)
HUNT = settings(LONG, max_examples=100, phases=[Phase.generate], database=None, derandomize=True)


def test_promises_and_the_ledger_hold_through_thousands_of_operations() -> None:
    class CountedMachine(ElasticMachine):
        pass

    run_state_machine_as_test(CountedMachine, settings=LONG)
    assert CountedMachine.operations >= 3000


class LeakyLedger(Ledger):
    """Planted: the release of a small lease is forgotten."""

    def release(self, lease: Lease) -> None:
        if lease.num_bytes != 4 * 32:
            super().release(lease)


class LeakySegments(Segments):
    """Planted: a segment's memory goes, its lease stays."""

    def _remove(self, index: int) -> int:
        lease = self._leases[index]
        num_bytes = super()._remove(index)
        if index == 2:
            self._ledger._leases.append(lease)
        return num_bytes


class CarelessSegments(Segments):
    """Planted: the lease of a segment that could not be allocated is kept."""

    def _take(self, num_blocks: int) -> str | None:
        shortfall = super()._take(num_blocks)
        if shortfall is not None and "the card is full" in shortfall:
            self._ledger.reserve(KV_LEASE, num_blocks * self._memory.block_bytes)
        return shortfall


class HoardingSegments(Segments):
    """Planted: a lease is released and its memory kept."""

    def _remove(self, index: int) -> int:
        self._memory.remove_segment = lambda index: None  # type: ignore[method-assign]
        return super()._remove(index)


@pytest.mark.parametrize(
    "planted",
    [
        {"ledger_class": LeakyLedger},
        {"segments_class": LeakySegments},
        {"segments_class": CarelessSegments},
        {"segments_class": HoardingSegments},
    ],
    ids=["release", "lease of a segment", "failed growth", "memory kept"],
)
def test_a_planted_leak_is_caught(planted: dict[str, object]) -> None:
    machine = type("PlantedMachine", (ElasticMachine,), planted)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(machine, settings=HUNT)
