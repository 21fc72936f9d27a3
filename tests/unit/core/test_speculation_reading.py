"""Who is read for a draft model, and what that costs."""

from math import inf

import pytest

from edgekv.core.speculation_accounts import CREDIT_STEPS
from edgekv.core.speculation_reading import Reading

STEP_S = 0.01


def reader(token_s: float = 0.001) -> Reading:
    reading = Reading()
    reading.observe(100, 100 * token_s, None)
    return reading


def test_it_is_read_once_the_same_again_would_repay_it() -> None:
    reading = reader()
    shares: list[float] = []

    def half() -> float:
        shares.append(0.5)
        return 0.5

    assert reading.worth({1: 8, 2: 8}, {1: 100}, {1: 0}, STEP_S, half) == {2: 8}
    assert reading.worth_in_steps == pytest.approx(10), "ten steps take as long as reading"
    assert not shares, "before that there is no need to know what is saved"
    assert reading.worth({1: 8}, {1: 100}, {1: 12}, STEP_S, half) == {}
    assert reading.worth_in_steps == pytest.approx(8)
    assert reading.worth({1: 8}, {1: 100}, {1: 20}, STEP_S, half) == {1: 8}
    assert shares == [0.5, 0.5]


def test_where_nothing_is_saved_nobody_is_read() -> None:
    reading = reader()
    assert reading.worth({1: 8}, {1: 100}, {1: 1_000}, STEP_S, lambda: 0.0) == {}
    assert reading.worth_in_steps == inf


def test_what_was_begun_is_read_to_its_end_and_in_debt_nothing_is_begun() -> None:
    reading = reader()
    reading.account.left = -1.0
    assert reading.worth({1: 8}, {1: 100}, {1: 1_000}, STEP_S, lambda: 0.9) == {}
    reading.begin([1])
    assert reading.worth({1: 8}, {1: 100}, {1: 0}, STEP_S, lambda: 0.9) == {1: 8}
    assert reading.worth({1: 8}, {}, {}, STEP_S, lambda: 0.9) == {1: 8}
    assert reading.worth({1: 8}, {1: 100}, {1: 1_000}, STEP_S, lambda: 0.9) == {}


def test_a_stall_is_not_what_reading_takes() -> None:
    reading = Reading()
    reading.observe(4, 1_000.0, STEP_S)
    assert reading.token_s == pytest.approx(STEP_S), "the first finds cold caches"
    assert reading.account.left == pytest.approx(CREDIT_STEPS - 4)
    reading.observe(1, 1_000.0, STEP_S)
    assert reading.account.left == pytest.approx(CREDIT_STEPS - 8)
    assert reading.token_s < 2 * STEP_S
