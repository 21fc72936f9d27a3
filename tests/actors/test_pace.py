"""The cost of a token is learnt from what the engine does, and foretells when who waits will start."""

import random

import pytest

from edgekv.actors.pace import FORGET_S, SAMPLE_S, Cost, Pace, Work, starts


def work(pace: Pace, steps: list[tuple[int, int]], cost: Cost, now: float = 0.0) -> float:
    """Steps of (prompt tokens, generated tokens) on a server of this cost; the time at their end."""
    prompt = generated = 0
    pace.observe(now, 0, 0)
    for more_prompt, more_generated in steps:
        prompt, generated = prompt + more_prompt, generated + more_generated
        now += more_prompt * cost.prompt_s + more_generated * cost.generated_s
        pace.observe(now, prompt, generated)
    pace.pause()
    return now


def learnt(pace: Pace, now: float) -> Cost:
    cost = pace.cost(now)
    assert cost is not None
    return cost


@pytest.mark.parametrize("true", [Cost(0.001, 0.02), Cost(0.003, 0.003), Cost(0.0002, 0.05)])
def test_prompts_and_generated_tokens_are_told_apart(true: Cost) -> None:
    dice = random.Random(1)
    pace = Pace()
    steps = [(dice.choice([0, 0, 0, 128, 40]), dice.randrange(1, 9)) for _ in range(2000)]
    cost = learnt(pace, work(pace, steps, true))
    assert cost.prompt_s == pytest.approx(true.prompt_s, rel=0.1)
    assert cost.generated_s == pytest.approx(true.generated_s, rel=0.1)


def test_what_the_steps_do_not_tell_apart_costs_the_same() -> None:
    pace = Pace()
    cost = learnt(pace, work(pace, [(0, 8)] * 200, Cost(0.001, 0.02)))
    assert cost.generated_s == pytest.approx(0.02, rel=0.01)
    assert cost.prompt_s == pytest.approx(0.02, rel=0.05)


def test_nothing_is_known_before_the_first_token() -> None:
    pace = Pace()
    assert pace.cost(5) is None
    pace.observe(5, 100, 100)
    pace.observe(6, 100, 100)
    assert pace.cost(7) is None


def test_a_server_that_has_become_slower_is_soon_known_to_be() -> None:
    pace = Pace()
    now = work(pace, [(0, 1)] * 1000, Cost(0.001, 0.05))
    assert learnt(pace, now).generated_s == pytest.approx(0.05, rel=0.02)
    now = work(pace, [(0, 1)] * round(4 * FORGET_S / 0.2), Cost(0.001, 0.2), now)
    assert learnt(pace, now).generated_s == pytest.approx(0.2, rel=0.1)


def test_standing_still_with_work_makes_all_dearer_and_is_forgotten_once_it_works_again() -> None:
    pace = Pace()
    now, total = 0.0, 0
    for _ in range(400):
        now, total = now + 0.05, total + 1
        pace.observe(now, 0, total)
    assert learnt(pace, now + 600).generated_s > 20 * 0.05
    assert pace.standing_s(now + 600) == pytest.approx(600)
    pace.observe(now + 300, 0, total)
    assert pace.standing_s(now + 600) == pytest.approx(600)
    now += 600
    for _ in range(round(4 * FORGET_S / 0.05)):
        now, total = now + 0.05, total + 1
        pace.observe(now, 0, total)
    assert learnt(pace, now).generated_s == pytest.approx(0.05, rel=0.1)


def test_idle_time_costs_nothing() -> None:
    pace = Pace()
    now = work(pace, [(0, 1)] * 200, Cost(0.001, 0.05))
    assert learnt(pace, now + 3600).generated_s == pytest.approx(0.05, rel=0.02)


def test_the_first_step_after_a_pause_counts_from_the_beginning_of_the_work() -> None:
    pace = Pace()
    now = work(pace, [(0, 1)] * 200, Cost(0.001, 0.05))
    for number in range(1, 6):  # requests of a single step each
        now += 1000
        pace.begin(now)
        now += 1
        pace.observe(now, 500 * number, 200)
        pace.pause()
    assert learnt(pace, now).prompt_s == pytest.approx(1 / 500, rel=0.05)


def test_a_new_engine_counts_from_nothing() -> None:
    pace = Pace()
    pace.observe(0, 1000, 1000)
    pace.observe(1, 1000, 1040)
    pace.observe(2, 0, 3)
    assert learnt(pace, 2).generated_s == pytest.approx(1 / 40)
    pace.observe(3, 0, 43)
    assert learnt(pace, 3).generated_s == pytest.approx(1 / 40)


def test_reports_that_come_in_bursts_are_taken_together() -> None:
    pace = Pace()
    pace.observe(0, 0, 0)
    pace.observe(SAMPLE_S / 2, 0, 1000)
    assert pace.cost(SAMPLE_S / 2) is None
    pace.observe(SAMPLE_S, 0, 1001)
    assert learnt(pace, SAMPLE_S).generated_s == pytest.approx(SAMPLE_S / 1001)


def test_who_finds_a_slot_starts_when_the_prompts_before_it_are_computed() -> None:
    ahead = [Work(100, 10), Work(50, 10)]
    assert list(starts([], ahead, Cost(0.01, 1), slots=2)) == [0, 1]
    assert list(starts([], ahead, Cost(0.01, 1), slots=2, after_s=7)) == [7, 8]


def test_who_finds_none_waits_for_the_first_to_end_each_token_taking_as_long_as_there_are_slots() -> None:
    running = [Work(0, 5), Work(0, 20)]
    waiting = [Work(0, 5), Work(0, 100), Work(0, 1)]
    # Five rounds of two tokens; five more for the first that waited; then the second runner's last ten.
    assert list(starts(running, waiting, Cost(0, 1), slots=2)) == [10, 20, 40]


def test_a_pool_that_holds_none_lets_them_start_one_by_one() -> None:
    assert list(starts([], [Work(10, 5), Work(0, 5)], Cost(0.1, 1), slots=0)) == [0, 6]
