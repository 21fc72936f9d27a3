"""Which proposals make the most tokens a second, by what was measured."""

import pytest

from edgekv.core.speculation_gain import Gain

PLAIN_S = 0.01
LIMITS = {1: 8, 2: 8}


def measured(row_share: float = 0.1, *, most_in_all: int | None = None) -> Gain:
    """Two sequences, the first of which is guessed well; every row more takes so much of a step."""
    gain = Gain(8, most_in_all)
    for rows in (2, 4, 10, 18):
        gain.costs.observe(2, rows, PLAIN_S * (1 + row_share * (rows - 2)))
    gain.observe_proposing(2, 4, 0.002)
    gain.observe_proposing(2, 8, 0.004)
    for _ in range(40):
        gain.seen.observe(1, 8, 6)
        gain.seen.observe(2, 8, 0)
    return gain


def test_whoever_is_guessed_well_gets_the_rows() -> None:
    best = measured().best(LIMITS, 2, PLAIN_S)
    assert best.keys() == {1}
    assert 3 <= best[1] <= 7
    assert measured(1.0).best(LIMITS, 2, PLAIN_S) == {}


@pytest.mark.parametrize("nudge", [-2, -1, 1, 2])
def test_a_nudge_is_of_so_many_rows(nudge: int) -> None:
    gain = measured()
    best = gain.best(LIMITS, 2, PLAIN_S)
    assert sum(gain.best(LIMITS, 2, PLAIN_S, nudge=nudge).values()) == sum(best.values()) + nudge
    assert measured(1.0).best(LIMITS, 2, PLAIN_S, nudge=nudge) == {}, "where nothing pays there is nothing to nudge"


def test_no_more_rows_than_there_may_be() -> None:
    assert sum(measured(most_in_all=2).best(LIMITS, 2, PLAIN_S).values()) <= 2
    assert sum(measured(most_in_all=2).best(LIMITS, 2, PLAIN_S, nudge=2).values()) <= 2


def test_what_is_saved_is_of_the_time_without() -> None:
    saved = measured().saved_share(LIMITS, 2, PLAIN_S)
    assert 0.3 < saved < 0.8
    assert measured(1.0).saved_share(LIMITS, 2, PLAIN_S) == 0


def test_a_stall_is_not_what_proposing_takes() -> None:
    gain = measured()
    assert gain.observe_proposing(2, 4, 60.0) == pytest.approx(0.008), "four times what it takes"
    assert gain.proposing.of(2, 4) < 0.003
    new = Gain(8, None)
    new.costs.observe(2, 2, PLAIN_S)
    assert new.observe_proposing(2, 4, 60.0) == pytest.approx(4 * PLAIN_S), "as long as the steps that it is for"
