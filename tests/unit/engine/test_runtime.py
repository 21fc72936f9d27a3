"""What the process holds before the weights is measured where it can be, and never holds up the loading."""

import threading
import time

import pytest

from edgekv.config.units import GIB, MIB
from edgekv.core.reading import Reading
from edgekv.demo import draft_path
from edgekv.engine import runtime
from edgekv.engine.runtime import Runtime, measure_runtime
from edgekv.engine.settings import EngineSettings, lease, plan_engine
from edgekv.model.hf_config import read_spec
from edgekv.smi.device import Place
from edgekv.smi.reader import ReadingFailed, Source

CPU = Place("cpu", "cpu", "CPU", free_bytes=4 * GIB)
CARD = Place("card", "cpu", "a card played by main memory", free_bytes=4 * GIB, total_bytes=8 * GIB)


class Card:
    """A driver that says `own_bytes`, or fails."""

    def __init__(self, own_bytes: int | Exception | None) -> None:
        self.own_bytes = own_bytes
        self.closed = False

    def read(self, at: float) -> Reading:
        if isinstance(self.own_bytes, Exception):
            raise self.own_bytes
        return Reading(8 * GIB, 1 * GIB, self.own_bytes, "card", at)

    def close(self) -> None:
        self.closed = True


def source(card: Card) -> Source:
    return Source("card", lambda: card)


def test_in_main_memory_it_is_the_process_itself() -> None:
    found = measure_runtime(CPU, 1, ())
    assert 50 * MIB < found.num_bytes < 8 * GIB
    assert "own resident memory" in found.reason


def test_on_a_card_the_first_source_that_tells_is_believed() -> None:
    cards = [Card(ReadingFailed("gone")), Card(None), Card(300 * MIB), Card(7)]
    assert measure_runtime(CARD, 1, [source(card) for card in cards]) == Runtime(300 * MIB, "as card tells")
    assert [card.closed for card in cards] == [True, True, True, False]


def test_where_nobody_tells_the_plan_is_believed_and_says_so() -> None:
    def absent() -> Card:
        raise ReadingFailed("no such library")

    found = measure_runtime(CARD, 512 * MIB, (Source("absent", absent), source(Card(None))))
    assert found == Runtime(512 * MIB, "an estimate: the driver does not tell")


def test_a_driver_that_hangs_costs_its_deadline_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "DEADLINE_S", 0.05)
    let_go = threading.Event()

    def hang() -> Card:
        let_go.wait(10)
        raise ReadingFailed("at last")

    started = time.monotonic()
    assert measure_runtime(CARD, 5, (Source("hung", hang),)).num_bytes == 5
    assert time.monotonic() - started < 2
    let_go.set()


@pytest.mark.parametrize("measured", [0, 50 * MIB, 2 * GIB])
def test_what_was_measured_does_not_change_the_pool(measured: int) -> None:
    _, memory = plan_engine(EngineSettings(draft_path(), CARD), read_spec(draft_path()))
    ledger = lease(memory, measured)
    assert ledger.statement()["runtime"] == measured
    assert ledger.statement()["kv.target"] == memory.kv.pool_bytes
    assert ledger.budget_bytes == memory.budget_bytes + max(0, measured - memory.runtime_bytes)
    ledger.check_integrity()
