from dataclasses import replace

import pytest

from bench.guard.measure import (
    MIB,
    Step,
    hasty,
    ideal,
    lag,
    measure,
    moves,
    reached,
    reversals,
    reversals_allowed,
    spilled_at_steps,
)
from bench.guard.truth import Truth
from edgekv.core.pressure import PATIENCE_S
from edgekv.core.spill import Headroom

TICK_S = 0.02
TOTAL_MIB = 1000
HEADROOM = Headroom(100 * MIB, 50 * MIB)  # critical below 50 MiB


def truth(at: float, own: int, others: int, spilled: int = 0) -> Truth:
    return Truth(
        at=at, total=TOTAL_MIB * MIB, own=own * MIB, others=others * MIB, wanted=others * MIB, spilled=spilled * MIB,
        gtt=0, evicted_ms=0, hanging=False, gone=False,
    )  # fmt: skip


def curve(*parts: tuple[float, int, int] | tuple[float, int, int, int]) -> list[Truth]:
    """(until, own MiB, others MiB[, spilled MiB]) one after the other, a sample every TICK_S."""
    history: list[Truth] = []
    for until, *mib in parts:
        while (at := round(len(history) * TICK_S, 6)) < until:
            history.append(truth(at, *mib))
    return history


# ---- lag


def test_no_lag_without_pressure() -> None:
    assert lag(curve((2, 600, 300)), HEADROOM) == 0


def test_the_lag_is_the_time_from_the_demand_to_memory_given_back() -> None:
    history = curve((1, 800, 100), (1.2, 800, 400), (2, 500, 400))
    assert lag(history, HEADROOM) == pytest.approx(0.2)


def test_free_memory_above_the_critical_headroom_is_no_demand() -> None:
    assert lag(curve((1, 800, 100), (2, 800, 149), (3, 800, 150)), HEADROOM) == 0
    assert lag(curve((1, 800, 100), (2, 800, 151)), HEADROOM) > 0


def test_each_level_of_a_growing_demand_has_its_own_time() -> None:
    # Others take 10 MiB a tick; what we hold follows 0.3 s later, whatever the distance in bytes.
    history = [
        truth(round(i * TICK_S, 6), 900 - 10 * max(0, min(30, i - 15)), 50 + 10 * min(30, i)) for i in range(100)
    ]
    assert lag(history, HEADROOM) == pytest.approx(0.3)


def test_giving_back_a_little_does_not_meet_the_whole_demand() -> None:
    history = curve((1, 800, 100), (1.1, 800, 400), (1.7, 700, 400), (3, 500, 400))
    assert lag(history, HEADROOM) == pytest.approx(0.7)


def test_a_demand_that_is_withdrawn_ends_there() -> None:
    assert lag(curve((1, 800, 100), (1.3, 800, 400), (3, 800, 100)), HEADROOM) == pytest.approx(0.3)


def test_a_demand_that_is_never_met_counts_to_the_end() -> None:
    assert lag(curve((1, 800, 100), (4, 800, 400)), HEADROOM) == pytest.approx(3, abs=2 * TICK_S)


def test_a_demand_that_nobody_could_see_counts_from_when_it_could_be_seen() -> None:
    history = curve((1, 800, 100), (5.2, 800, 400), (6, 500, 400))
    assert lag(history, HEADROOM) == pytest.approx(4.2)
    assert lag(history, HEADROOM, blind=[(0.5, 5.0)]) == pytest.approx(0.2)


def test_what_is_below_the_floor_cannot_be_demanded() -> None:
    history = curve((1, 300, 100), (3, 300, 800))
    assert lag(history, HEADROOM) > 1
    assert lag(history, HEADROOM, floor_bytes=300 * MIB) == 0


# ---- moves and turns


def test_changes_in_a_row_are_one_move_and_a_pause_makes_two() -> None:
    history = curve((1, 500, 0), (1.02, 564, 0), (1.04, 628, 0), (2, 692, 0), (3, 500, 0), (4, 501, 0))
    assert [(move.at, move.num_bytes // MIB) for move in moves(history)] == [(1.0, 192), (2.0, -192)]


def test_growing_only_to_give_back_is_a_reversal() -> None:
    soon = curve((1, 500, 0), (5, 600, 0), (6, 500, 0))
    late = curve((1, 500, 0), (2 + PATIENCE_S, 600, 0), (20, 500, 0))
    assert reversals(moves(soon)) == 1
    assert reversals(moves(late)) == 0


def test_growing_right_after_giving_back_into_room_that_others_had_is_haste() -> None:
    soon = curve((1, 600, 100), (1.2, 600, 400), (5, 500, 400), (5.2, 500, 100), (6, 600, 100))
    late = curve((1, 600, 100), (1.2, 600, 400), (5, 500, 400), (5.2 + PATIENCE_S, 500, 100), (20, 600, 100))
    assert hasty(soon, moves(soon), HEADROOM) == 1
    assert hasty(late, moves(late), HEADROOM) == 0


def test_taking_back_what_was_given_back_in_excess_is_none() -> None:
    history = curve((1, 700, 100), (1.2, 700, 300), (5, 100, 300), (6, 600, 300))
    assert hasty(history, moves(history), HEADROOM) == 0
    history = curve((1, 700, 100), (1.2, 700, 300), (5, 100, 300), (6, 601, 300))
    assert hasty(history, moves(history), HEADROOM) == 1


def test_a_pool_that_follows_every_flicker_has_more_reversals_than_can_be_forced() -> None:
    flapping = [truth(round(i * TICK_S, 6), 500 + 100 * (i // 100 % 2), 0) for i in range(2000)]
    assert reversals(moves(flapping)) > reversals_allowed(40)


def test_as_many_reversals_are_allowed_as_patience_that_doubles_can_be_forced_to() -> None:
    assert [reversals_allowed(PATIENCE_S * factor) for factor in (0.5, 1, 2.9, 3, 7)] == [0, 1, 1, 2, 3]


# ---- others' room


def test_a_growth_that_leaves_the_headroom_free_reaches_into_nobodys_room() -> None:
    history = curve((1, 500, 300), (2, 600, 300))
    assert reached(history, moves(history), HEADROOM, within_s=0.3) == 0


def test_a_growth_into_the_headroom_is_others_room() -> None:
    history = curve((1, 500, 300), (2, 620, 300))
    assert reached(history, moves(history), HEADROOM, within_s=0.3) == 20 * MIB


def test_what_others_took_at_the_same_moment_nobody_could_have_known() -> None:
    history = curve((1, 500, 300), (1.1, 500, 350), (2, 600, 350))
    assert reached(history, moves(history), HEADROOM, within_s=0.3) == 0
    assert reached(history, moves(history), HEADROOM, within_s=0.05) == 50 * MIB


# ---- steps


def test_a_step_with_memory_spilled_for_longer_than_a_restore_cycle_is_counted() -> None:
    history = curve((1, 800, 100), (3, 800, 100, 200), (4, 600, 100))
    steps = [Step(0.5, 0.6), Step(1.1, 1.2), Step(1.4, 1.5), Step(1.6, 1.7), Step(2.9, 3.1), Step(3.2, 3.3)]
    assert spilled_at_steps(history, steps) == (2, 200 * MIB)


def test_what_the_driver_brings_back_at_once_is_no_spill() -> None:
    history = curve((1, 800, 100), (1.4, 800, 100, 200), (3, 800, 100))
    assert spilled_at_steps(history, [Step(at / 10, at / 10) for at in range(30)]) == (0, 0)


def test_the_least_that_was_spilled_all_along_is_what_counts() -> None:
    history = curve((1, 800, 100), (2, 800, 100, 40), (3, 800, 100, 200))
    assert spilled_at_steps(history, [Step(2.2, 2.3)]) == (1, 40 * MIB)
    assert spilled_at_steps(history, [Step(2.6, 2.7)]) == (1, 200 * MIB)


# ---- all of it


def test_the_ideal_leaves_the_headroom_and_others_what_they_want_and_no_more() -> None:
    history = [truth(0, 500, 300), replace(truth(1, 500, 300), wanted=700 * MIB), truth(2, 500, 0)]
    found = ideal(history, HEADROOM, ceiling_bytes=700 * MIB, floor_bytes=250 * MIB)
    assert [each // MIB for each in found] == [600, 250, 700]


def test_all_figures_of_a_history() -> None:
    history = curve((1, 800, 100), (1.2, 800, 400), (20, 500, 400), (22, 800, 100))
    history = [replace(sample, wanted=500 * MIB) if sample.at < 0.1 else sample for sample in history]
    figures = measure(
        history, [Step(0.1, 0.2)], HEADROOM, longest_step_s=0.1, ceiling_bytes=800 * MIB, floor_bytes=100 * MIB
    )
    assert figures.lag_s == pytest.approx(0.2)
    assert figures.lag_allowed_s == pytest.approx(0.35)
    assert (figures.reversals, figures.reversals_allowed, figures.hasty_growths) == (0, 1, 0)
    assert figures.denied_s == pytest.approx(0.1)
    assert (figures.lowest_own // MIB, figures.highest_own // MIB) == (500, 800)
    assert (figures.steps, figures.spilled_steps, figures.reached_bytes) == (1, 0, 0)
    assert figures.share_of_ideal == pytest.approx(1.0, abs=0.01)
