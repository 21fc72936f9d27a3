"""An hour of serving on a card that others use, in seconds; `python -m bench.compressed` plays a day."""

import pytest

from bench.compressed import bound_steps, soak


@pytest.mark.slow
def test_an_hour_under_pressure_loses_no_request_and_leaks_nothing() -> None:
    result = soak(20_000, seed=7)
    assert result.broken == []
    assert result.counts["finished"] > 800
    assert result.counts["left"] > 50
    assert {"shrunk", "grown", "state", "stale", "fresh"} <= result.events.keys()
    assert max(result.worst.values()) <= 1


def test_the_bound_grows_with_the_request_and_is_longer_for_those_who_let_others_pass() -> None:
    assert bound_steps(100, 50, 0) < bound_steps(100, 60, 0) < bound_steps(900, 60, 0) < bound_steps(900, 60, 10)
