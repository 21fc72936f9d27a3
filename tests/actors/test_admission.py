"""Admission tells what can never fit from what has to wait, and both from what cannot wait here now."""

import pytest

from edgekv.actors.admission import RATE_SAMPLE_S, RATE_WINDOW_S, Admission, Claim, Rate
from edgekv.core.step import EngineStats, PoolStats
from edgekv.errors import ContextLengthExceeded, QueueFull
from tests.actors.fakes import make_card

CARD = make_card(context_tokens=512, pool_tokens=1024)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def stats(computed_prompt_tokens: int = 0, generated_tokens: int = 0, free: int = 10, cached: int = 5) -> EngineStats:
    pool = PoolStats(64, free, cached, 64 - free - cached, 16)
    return EngineStats(pool, 0, 0, computed_prompt_tokens=computed_prompt_tokens, generated_tokens=generated_tokens)


def claim(number: int, prompt_tokens: int = 100, max_tokens: int = 20) -> Claim:
    return Claim(number, prompt_tokens, max_tokens)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def admission(clock: Clock) -> Admission:
    return Admission(max_queue=3, clock=clock)


def fill(admission: Admission, *numbers: int) -> None:
    for number in numbers:
        admission.admit([claim(number)], CARD, stats())


def test_exactly_the_limit_fits_and_one_more_never_will(admission: Admission) -> None:
    admission.admit([claim(1, 500, 12)], CARD, None)
    with pytest.raises(ContextLengthExceeded) as caught:
        admission.admit([claim(2, 500, 13)], CARD, None)
    error = caught.value
    assert (error.limit_tokens, error.prompt_tokens, error.completion_tokens) == (512, 500, 13)
    assert "maximum context length is 512 tokens. However, you requested 513 tokens" in str(error)


@pytest.mark.parametrize(
    ("context", "pool", "said", "unsaid"),
    [
        (512, 1024, "set models.demo.context to 600 or more (now 512)", "kv.budget"),
        (1024, 512, "raise kv.budget until the pool holds 600 tokens (now 512)", "models.demo.context"),
        (256, 512, "set models.demo.context to 600 or more (now 256) and raise kv.budget until", "nothing"),
    ],
)
def test_what_never_fits_is_told_which_setting_would_make_it(
    admission: Admission, context: int, pool: int, said: str, unsaid: str
) -> None:
    with pytest.raises(ContextLengthExceeded) as caught:
        admission.admit([claim(1, 500, 100)], make_card(context, pool), None)
    assert said in str(caught.value)
    assert unsaid not in str(caught.value)


def test_a_queue_of_three_takes_three_that_wait(admission: Admission) -> None:
    fill(admission, 1, 2, 3)
    with pytest.raises(QueueFull) as caught:
        fill(admission, 4)
    assert (caught.value.needed_tokens, caught.value.free_tokens) == (120, 15 * 16)
    admission.started(1)
    fill(admission, 4)
    assert (admission.num_open, admission.num_waiting) == (4, 3)


def test_running_sequences_do_not_count_as_waiting(admission: Admission) -> None:
    for number in range(100):
        fill(admission, number)
        admission.started(number)
    assert (admission.num_open, admission.num_waiting) == (100, 0)


def test_a_released_one_makes_room_once(admission: Admission) -> None:
    fill(admission, 1, 2, 3)
    admission.release(2)
    admission.release(2)
    admission.release(77)
    fill(admission, 4)
    with pytest.raises(QueueFull):
        fill(admission, 5)
    admission.release_all([1, 3, 4])
    assert (admission.num_open, admission.num_waiting) == (0, 0)


def test_several_are_let_in_together_or_not_at_all(admission: Admission) -> None:
    fill(admission, 1, 2)
    with pytest.raises(QueueFull) as caught:
        admission.admit([claim(3), claim(4)], CARD, stats())
    assert caught.value.needed_tokens == 240
    with pytest.raises(ContextLengthExceeded):
        admission.admit([claim(3), claim(4, 600)], CARD, stats())
    assert admission.num_open == 2
    admission.admit([claim(3)], CARD, stats())


def test_more_than_the_queue_holds_is_let_in_where_nobody_waits(admission: Admission) -> None:
    """Otherwise it would be told to try again for ever."""
    admission.admit([claim(number) for number in range(5)], CARD, stats())
    assert admission.num_waiting == 5
    with pytest.raises(QueueFull):
        fill(admission, 9)


def test_no_queue_at_all_still_serves_one_after_the_other(clock: Clock) -> None:
    admission = Admission(0, clock)
    fill(admission, 1)
    with pytest.raises(QueueFull):
        fill(admission, 2)
    admission.started(1)
    fill(admission, 2)


def retry_after(admission: Admission) -> float:
    with pytest.raises(QueueFull) as caught:
        fill(admission, 999)
    return caught.value.retry_after_s


def test_retry_after_is_the_queue_at_the_measured_rate(admission: Admission, clock: Clock) -> None:
    fill(admission, 1, 2, 3)  # 360 tokens wait
    for tenth in range(101):
        clock.now = tenth / 10
        admission.observe(stats(computed_prompt_tokens=tenth, generated_tokens=tenth * 3))  # 40 tokens/s
    assert retry_after(admission) == pytest.approx(9, rel=0.01)
    admission.started(1)
    fill(admission, 4)
    admission.started(2)
    admission.started(3)
    admission.admit([claim(5, 400, 100), claim(6, 400, 100)], CARD, stats())  # 1,120 tokens wait
    assert retry_after(admission) == pytest.approx(28, rel=0.01)


def test_retry_after_has_bounds(admission: Admission, clock: Clock) -> None:
    fill(admission, 1, 2, 3)
    assert retry_after(admission) == 1  # never measured: the work has only just begun
    admission.observe(stats())
    clock.now = 1
    admission.observe(stats(generated_tokens=100_000))
    assert retry_after(admission) == 1
    clock.now = 1e6  # the engine has stood still since
    assert retry_after(admission) == 600


def test_the_rate_forgets_what_is_older_than_the_window() -> None:
    rate = Rate()
    total = 0
    for tenth in range(1000):
        total += 100 if tenth < 500 else 1  # 1,000 and then 10 tokens/s
        rate.observe(tenth / 10, total)
    assert rate.per_second(100) == pytest.approx(10, rel=0.02)
    assert len(rate._samples) <= 2 * RATE_WINDOW_S / RATE_SAMPLE_S + 2


def test_idle_time_does_not_lower_the_rate(admission: Admission, clock: Clock) -> None:
    fill(admission, 1)
    for tenth in range(11):
        clock.now = tenth / 10
        admission.observe(stats(generated_tokens=tenth * 4))  # 40 tokens/s
    admission.release(1)
    clock.now = 1000
    admission.observe(stats(generated_tokens=50))  # the last step of the sequence that has gone
    fill(admission, 2, 3, 4)
    assert retry_after(admission) == pytest.approx(9, rel=0.01)
    clock.now = 1001
    admission.observe(stats(generated_tokens=60))
    assert retry_after(admission) == pytest.approx(9, rel=0.01)
    clock.now = 1002
    admission.observe(stats(generated_tokens=180))  # 120 tokens/s now
    assert retry_after(admission) == pytest.approx(3, rel=0.01)


def test_a_new_engine_counts_from_nothing() -> None:
    rate = Rate()
    rate.observe(0, 1000)
    rate.observe(1, 1040)
    rate.observe(2, 3)
    assert rate.per_second(2) == 40
    rate.observe(3, 83)
    assert rate.per_second(3) == 80
