"""The states of a device's memory, told from readings alone."""

from itertools import count, pairwise

import pytest

from edgekv.core.reading import Reading
from edgekv.core.spill import Headroom, SpillDetector, State

MIB = 1 << 20
GIB = 1 << 30
TOTAL = 16 * GIB
HEADROOM = Headroom.of(TOTAL)


def reading(at: float, *, free: int = 4 * GIB, spilled: int = 0, stale: bool = False, **more: int | bool) -> Reading:
    return Reading(
        total_bytes=TOTAL,
        used_bytes=TOTAL - free,
        own_bytes=GIB,
        source="test",
        at=at,
        spilled_own_bytes=spilled,
        stale=stale,
        **more,  # type: ignore[arg-type]
    )


def test_headroom_is_six_percent_or_512_mib_whichever_is_more() -> None:
    assert Headroom.of(16 * GIB).num_bytes == 16 * GIB * 6 // 100
    assert Headroom.of(4 * GIB).num_bytes == 512 * MIB
    assert Headroom.of(4 * GIB).critical_bytes == 256 * MIB
    assert Headroom.of(4 * GIB).calm_bytes == 768 * MIB


@pytest.mark.parametrize(("reserve", "critical", "calm"), [(10 * GIB, 9.52, 10.48), (200 * MIB, 0.0977, 0.293)])
def test_a_reserve_of_ones_own_moves_the_thresholds_and_never_below_zero(
    reserve: int, critical: float, calm: float
) -> None:
    headroom = Headroom.of(TOTAL, reserve)
    assert headroom.num_bytes == reserve
    assert headroom.critical_bytes / GIB == pytest.approx(critical, rel=0.01)
    assert headroom.calm_bytes / GIB == pytest.approx(calm, rel=0.01)


def test_the_state_follows_free_memory_with_hysteresis() -> None:
    detector = SpillDetector(HEADROOM)
    r, w = HEADROOM.num_bytes, HEADROOM.width_bytes
    times = count()
    seen = [
        (free, detector.observe(reading(float(next(times)), free=free)).state)
        for free in (r + w, r, r - 1, r + w - 1, r + w, r - w, r - w - 1, r, r + w - 1, r + w)
    ]
    states = [state.value for _, state in seen]
    assert states == [
        "ok", "ok", "pressure", "pressure", "ok", "pressure", "critical", "pressure", "pressure", "ok",
    ]  # fmt: skip


def test_memory_given_back_that_does_not_show_yet_counts_as_free() -> None:
    detector = SpillDetector(HEADROOM)
    low = reading(0.0, free=HEADROOM.critical_bytes - MIB)
    assert detector.observe(low, unseen_bytes=MIB).state is State.PRESSURE
    assert detector.observe(reading(1.0, free=low.free_bytes)).state is State.CRITICAL


def observe_spill(detector: SpillDetector, times: list[float], spilled: int) -> list[State]:
    return [detector.observe(reading(at, spilled=spilled)).state for at in times]


def test_spilled_is_said_after_three_polls_that_outlive_a_restore_cycle() -> None:
    assert observe_spill(SpillDetector(HEADROOM), [0.0, 0.25, 0.5], 33 * MIB) == [State.OK, State.OK, State.SPILLED]
    # Quick polls alone are not enough, nor is time alone.
    assert observe_spill(SpillDetector(HEADROOM), [0.0, 0.1, 0.2, 0.3, 0.4], 33 * MIB) == [State.OK] * 5
    assert observe_spill(SpillDetector(HEADROOM), [0.0, 5.0], 33 * MIB) == [State.OK] * 2


def test_a_spill_that_heals_between_two_polls_starts_anew() -> None:
    detector = SpillDetector(HEADROOM)
    observe_spill(detector, [0.0, 0.25], 100 * MIB)
    observe_spill(detector, [0.4], 32 * MIB)
    assert observe_spill(detector, [0.5, 0.75], 100 * MIB) == [State.OK] * 2
    assert observe_spill(detector, [1.0], 100 * MIB) == [State.SPILLED]
    assert observe_spill(detector, [1.25], 32 * MIB) == [State.OK]


def test_the_very_first_sight_of_a_spill_is_a_suspicion() -> None:
    detector = SpillDetector(HEADROOM)
    condition = detector.observe(reading(0.0, spilled=64 * MIB))
    assert (condition.state, condition.spilled_bytes, condition.suspected_bytes) == (State.OK, 0, 64 * MIB)
    assert detector.observe(reading(0.1, spilled=32 * MIB)).suspected_bytes == 0


def test_a_stale_reading_changes_nothing() -> None:
    detector = SpillDetector(HEADROOM)
    before = detector.observe(reading(0.0))
    assert detector.observe(reading(1.0, free=0, spilled=GIB, stale=True)) == before
    observe_spill(detector, [2.0, 2.25], GIB)
    detector.observe(reading(2.4, spilled=GIB, stale=True))
    assert detector.condition.state is State.OK


def test_a_forgiven_spill_counts_again_only_for_what_comes_on_top() -> None:
    detector = SpillDetector(HEADROOM)
    assert observe_spill(detector, [0.0, 0.5, 1.0], 200 * MIB)[-1] is State.SPILLED
    detector.forgive()
    assert observe_spill(detector, [1.5, 2.0, 2.5, 3.0], 200 * MIB) == [State.OK] * 4
    assert observe_spill(detector, [3.5, 4.0, 4.5], 240 * MIB)[-1] is State.SPILLED
    assert detector.condition.spilled_bytes == 40 * MIB
    # Once it has healed it is forgotten: the same again is a spill again.
    observe_spill(detector, [5.0], 0)
    assert observe_spill(detector, [5.5, 6.0, 6.5], 200 * MIB)[-1] is State.SPILLED


def test_pages_swapped_out_before_we_looked_are_no_spill_but_more_of_them_are() -> None:
    detector = SpillDetector(HEADROOM)
    short = HEADROOM.num_bytes + MIB
    calm = [detector.observe(reading(at / 2, free=short, spilled=500 * MIB, unified=True)).state for at in range(4)]
    assert calm == [State.OK] * 4
    worse = [detector.observe(reading(2 + at / 2, free=short, spilled=540 * MIB, unified=True)) for at in range(3)]
    assert worse[-1].state is State.SPILLED
    assert "swap" in detector.condition.reason


def test_pages_swapped_out_with_room_for_all_are_not_missed() -> None:
    detector = SpillDetector(HEADROOM)
    free = HEADROOM.calm_bytes
    early = [detector.observe(reading(at / 2, free=free, spilled=at * 50 * MIB, unified=True)) for at in range(9)]
    assert [condition.state for condition in early] == [State.OK] * 9
    later = [detector.observe(reading(5 + at / 2, free=free - MIB, spilled=400 * MIB, unified=True)) for at in range(4)]
    assert [condition.suspected_bytes for condition in later] == [0] * 4, "they are no more than they were"


@pytest.mark.parametrize("unified", [False, True])
def test_a_reading_that_says_less_than_nothing_is_spilled_makes_no_spill_of_those_after_it(unified: bool) -> None:
    detector = SpillDetector(HEADROOM)
    for tick in range(30):
        spilled = -GIB if tick in (0, 5) else 0
        condition = detector.observe(reading(tick / 10, spilled=spilled, unified=unified))
        assert (condition.state, condition.suspected_bytes) == (State.OK, 0)


@pytest.mark.parametrize(("stopped_ms_per_s", "thrashes"), [(45, False), (60, True)])
def test_queues_stopped_for_more_than_five_percent_of_two_seconds_thrash(stopped_ms_per_s: int, thrashes: bool) -> None:
    detector = SpillDetector(HEADROOM)
    states = [
        detector.observe(reading(tenth / 10, evicted_ms=1000 + stopped_ms_per_s * tenth // 10)).state
        for tenth in range(40)
    ]
    assert State.THRASH not in states[:20], "two seconds have not passed"
    assert (State.THRASH in states) == thrashes
    if thrashes:
        quiet = [detector.observe(reading(4 + t / 10, evicted_ms=1000 + stopped_ms_per_s * 4)).state for t in range(25)]
        assert quiet[-1] is State.OK, "the past two seconds were quiet"


@pytest.mark.parametrize(("faults_per_s", "thrashes"), [(190, False), (220, True)])
def test_many_pages_read_back_from_disk_thrash(faults_per_s: int, thrashes: bool) -> None:
    detector = SpillDetector(HEADROOM)
    states = [detector.observe(reading(float(s), major_faults=faults_per_s * s, unified=True)).state for s in range(5)]
    assert (State.THRASH in states) == thrashes


def test_a_trace_replays_exactly() -> None:
    trace = [
        reading(i / 10, free=GIB + (i * 37 % 29 - 14) * 80 * MIB, spilled=(i % 13 > 5) * 90 * MIB, evicted_ms=i * i)
        for i in range(300)
    ]
    first, second = SpillDetector(HEADROOM), SpillDetector(HEADROOM)
    conditions = [first.observe(r) for r in trace]
    assert conditions == [second.observe(r) for r in trace]
    assert len({c.state for c in conditions}) > 3, "the trace visits several states"
    assert any(a.state != b.state for a, b in pairwise(conditions))
