"""When steps without proposals are measured, and when what was measured is doubted."""

from math import inf

from edgekv.core.step_costs import PlainSteps


def in_a_row(plain: PlainSteps, *seconds: float, mean_s: float | None = 1.0) -> list[float | None]:
    return [plain.observe(each, mean_s) for each in seconds]


def test_the_shorter_of_the_last_two_is_measured() -> None:
    plain = PlainSteps()
    assert in_a_row(plain, 5.0, 1.0, 20.0, 1.1, 1.2, mean_s=None) == [None, None, 1.0, 1.1, 1.1]
    plain.interrupt(1.0, 1.0)
    assert in_a_row(plain, 0.5, 3.0, 1.3) == [None, None, 1.3], "those before another do not count"
    assert PlainSteps().latest_s == inf


def test_three_slower_steps_in_a_row_are_reason_to_doubt() -> None:
    plain = PlainSteps()
    in_a_row(plain, 1.0, 1.0, 1.0)
    for seconds in (2.0, 2.0, 1.0, 2.0, 2.0):
        plain.interrupt(seconds, 1.0)
    assert not plain.is_in_doubt
    plain.interrupt(2.0, 1.0)
    assert plain.is_in_doubt
    assert plain.is_due


def test_it_is_doubted_until_steps_take_what_they_usually_do_though_not_for_ever() -> None:
    plain = PlainSteps(is_in_doubt=True)
    in_a_row(plain, *[3.0] * 20)
    assert plain.is_due
    in_a_row(plain, 3.0, 3.0, mean_s=2.8)
    assert not plain.is_due
    restless = PlainSteps(is_in_doubt=True)
    in_a_row(restless, *[3.0] * 39)
    assert restless.is_due
    in_a_row(restless, 3.0)
    assert not restless.is_due
