"""Whoever asks what the memory guard did is told in a few sentences."""

import logging

import pytest

from edgekv.actors.memory_log import GROWN_S, MOST_EVENTS, MemoryLog
from edgekv.core.pressure import Decision, PoolFacts
from edgekv.core.spill import Condition, State

MIB, GIB = 1 << 20, 1 << 30
SEGMENT = 64 * MIB


def facts(given_back: int = 0, taken: int = 0, num_resizes: int = 0) -> PoolFacts:
    return PoolFacts(GIB, 2 * GIB, SEGMENT, 4 * GIB, 0, given_back, taken, num_resizes)


def decision(
    state: State = State.OK, *, others: int = 0, shrink: int = 0, reason: str = "why", **more: int
) -> Decision:
    return Decision(Condition(state, reason), GIB, others, others, hold=False, shrink_bytes=shrink, **more)  # type: ignore[arg-type]


@pytest.fixture
def told() -> MemoryLog:
    return MemoryLog(lambda: 1e9)


def details(told: MemoryLog, kind: str) -> list[str]:
    return [event.detail for event in told.events if event.kind == kind]


def test_what_was_given_back_is_what_the_engine_says_and_not_what_was_asked_for(told: MemoryLog) -> None:
    told.decided(decision(others=GIB), facts(), 1000, 0)
    told.decided(decision(State.CRITICAL, others=5 * GIB, shrink=100 * MIB), facts(), 1000, 1)
    told.decided(decision(State.CRITICAL, others=5 * GIB), facts(given_back=128 * MIB, num_resizes=1), 500, 1.1)
    (event,) = [event for event in told.events if event.kind == "shrunk"]
    assert (event.at, event.num_bytes) == (1e9, 128 * MIB)
    assert event.detail == "gave 128.00 MiB back: others took 4.00 GiB; the pool has 500 tokens now"


def test_others_that_took_it_in_two_bites_took_it_all(told: MemoryLog) -> None:
    told.decided(decision(others=GIB), facts(), 1000, 0)
    told.decided(decision(State.PRESSURE, others=2 * GIB), facts(), 1000, 0.1)
    told.decided(decision(State.CRITICAL, others=3 * GIB, shrink=SEGMENT), facts(), 1000, 0.2)
    told.decided(decision(others=3 * GIB), facts(SEGMENT, 0, 1), 900, 0.3)
    assert "others took 2.00 GiB" in details(told, "shrunk")[0]


def test_what_a_spill_cost_is_not_laid_at_others_door(told: MemoryLog) -> None:
    told.decided(decision(others=GIB), facts(), 1000, 0)
    reason = "200 MiB of ours are in system memory"
    told.decided(decision(State.SPILLED, others=2 * GIB, shrink=SEGMENT, reason=reason), facts(), 1000, 1)
    told.decided(decision(others=2 * GIB), facts(SEGMENT, 0, 1), 900, 1.1)
    assert details(told, "shrunk") == [f"gave 64.00 MiB back: {reason}; the pool has 900 tokens now"]


def test_memory_that_a_step_had_to_give_back_is_told_too(told: MemoryLog) -> None:
    told.decided(decision(), facts(), 1000, 0)
    told.decided(decision(), facts(SEGMENT), 900, 1)
    assert "a step found no memory" in details(told, "shrunk")[0]


def test_segments_taken_one_after_the_other_are_one_event(told: MemoryLog) -> None:
    now = 0.0
    for number in range(9):
        told.decided(decision(), facts(taken=number * SEGMENT, num_resizes=number), 1000 + number, now)
        now += 0.2
    assert details(told, "grown") == []
    told.decided(decision(), facts(taken=8 * SEGMENT, num_resizes=8), 1008, now + GROWN_S)
    assert details(told, "grown") == [
        "took 512.00 MiB that others left; the pool has 1,008 tokens now"
    ]
    assert told.events[-1].num_bytes == 8 * SEGMENT


def test_what_was_taken_is_told_before_what_was_given_back(told: MemoryLog) -> None:
    told.decided(decision(), facts(), 1000, 0)
    told.decided(decision(), facts(taken=SEGMENT, num_resizes=1), 1100, 0.1)
    told.decided(decision(), facts(2 * SEGMENT, SEGMENT, 2), 900, 0.2)
    assert [event.kind for event in told.events] == ["grown", "shrunk"]
    assert told.events[0].detail.endswith("the pool has 1,100 tokens now")


def test_a_new_engine_has_given_nothing_back(told: MemoryLog) -> None:
    told.decided(decision(), facts(GIB, GIB, 7), 1000, 0)
    told.decided(decision(), None, 0, 1)
    told.decided(decision(), facts(), 1000, 2)
    told.decided(decision(), facts(taken=SEGMENT, num_resizes=1), 1000, 3)
    told.decided(decision(), facts(taken=SEGMENT, num_resizes=1), 1000, 9)
    assert [event.num_bytes for event in told.events] == [SEGMENT]


def test_a_state_is_told_when_it_begins(told: MemoryLog, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for state in (State.OK, State.CRITICAL, State.CRITICAL, State.SPILLED, State.OK):
        told.decided(decision(state), facts(), 1000, 0)
    assert details(told, "state") == ["critical: why", "spilled: why", "ok: why"]
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING", "INFO"]


def test_no_reading_is_told_once_and_its_end_too(told: MemoryLog) -> None:
    told.freshened("nvml")
    told.aged(2.1, "nvml: has not answered for 0.25 s")
    told.aged(2.2, "nvml: has not answered for 0.25 s")
    told.freshened("nvml")
    told.freshened("nvml")
    assert [event.kind for event in told.events] == ["stale", "fresh"]
    assert details(told, "stale") == [
        "last read 2.1 s ago (nvml: has not answered for 0.25 s); the pool does not grow until it is read again"
    ]


def test_memory_that_did_not_go_is_a_warning(told: MemoryLog, caplog: pytest.LogCaptureFixture) -> None:
    told.decided(decision(unreturned_bytes=SEGMENT), facts(), 1000, 0)
    assert told.events[0].num_bytes == SEGMENT
    assert "64.00 MiB were given back and still show as ours" in caplog.text


def test_events_are_few_however_long_it_runs(told: MemoryLog) -> None:
    for number in range(3 * MOST_EVENTS):
        told.decided(decision(State.PRESSURE if number % 2 else State.OK), facts(), 1000, number)
    assert len(told.events) == MOST_EVENTS
