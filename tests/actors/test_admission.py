"""Admission tells what can never fit from what has to wait, and both from what cannot wait here now."""

import random
import re
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest

from edgekv.actors.admission import Admission, AdmissionLimits, Claim
from edgekv.actors.pace import Cost
from edgekv.actors.service import MemoryView
from edgekv.core.pressure import Decision
from edgekv.core.spill import Condition, State
from edgekv.core.step import EngineStats, PoolStats, StepReport
from edgekv.errors import ContextLengthExceeded, QueueFull
from tests.actors.fakes import make_card
from tests.actors.simulated_server import Server

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
    return Admission(AdmissionLimits(max_queue=3), clock)


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
    admission = Admission(AdmissionLimits(0), clock)
    fill(admission, 1)
    with pytest.raises(QueueFull):
        fill(admission, 2)
    admission.started(1)
    fill(admission, 2)


def test_each_priority_waits_as_long_as_the_nearest_that_is_named() -> None:
    limits = AdmissionLimits(3, {0: 60.0, 10: 600.0})
    assert [limits.wait_s(priority) for priority in (-3, 0, 4, 6, 10, 99)] == [60, 60, 60, 600, 600, 600]
    assert AdmissionLimits(3).wait_s(5) == float("inf")


def test_what_does_not_fit_a_pool_that_was_shrunk_is_told_who_has_the_memory(admission: Admission) -> None:
    shrunk = replace(CARD, context_tokens=4096, pool_tokens=256)
    decision = Decision(Condition(State.CRITICAL, ""), 0, 4 << 30, 5 << 30, hold=False, patience_s=40.0)
    view = MemoryView("a card", 512 << 20, decision=decision)
    with pytest.raises(QueueFull) as caught:
        admission.admit([claim(1, 300, 100)], shrunk, stats(), view)
    assert (caught.value.needed_tokens, caught.value.free_tokens, caught.value.retry_after_s) == (400, 240, 40)
    assert str(caught.value) == (
        "The KV cache is down to 256 of 1,024 tokens while other programs hold 4.00 GiB of the device: this request "
        "needs 400 tokens of KV cache and 240 are free. Try again in 40 s."
    )
    with pytest.raises(QueueFull, match="down to 256 of 1,024 tokens: this request"):
        admission.admit([claim(1, 300, 100)], shrunk, stats())
    with pytest.raises(ContextLengthExceeded, match="maximum context length is 1024 tokens"):
        admission.admit([claim(1, 1000, 100)], shrunk, stats(), view)
    admission.admit([claim(1, 200, 56)], shrunk, stats(), view)


# ---- how long it takes


def busy_server(limits: AdmissionLimits, **changes: Any) -> Server:
    """A server that has worked for a while, with all slots taken and one more waiting."""
    server = Server(limits, **({"slots": 4, "cost": Cost(0.001, 0.005)} | changes))
    for _ in range(3):
        with suppress(QueueFull):
            for _ in range(8):
                server.ask(100, 60)
        server.work_off()
    with suppress(QueueFull):
        for _ in range(server.slots + 1):
            server.ask(200, 300)
    server.step()
    return server


def refused(server: Server, prompt_tokens: int = 100, max_tokens: int = 50, priority: int = 0) -> QueueFull:
    """What a client is told once the queue takes no more."""
    for _ in range(1000):
        try:
            server.ask(prompt_tokens, max_tokens, priority)
        except QueueFull as error:
            return error
    raise AssertionError("a thousand were let in")


def is_admitted(server: Server, priority: int = 0) -> bool:
    try:
        server.ask(100, 50, priority)
    except QueueFull:
        return False
    return True


def test_who_could_not_start_in_time_is_refused_at_once_with_the_numbers() -> None:
    server = busy_server(AdmissionLimits(1000, {0: 10.0}))
    error = refused(server)
    assert re.match(
        r"It would be about 1\d s until this request starts, and it may wait 10 s: this request", str(error)
    )
    server.work_off()
    assert is_admitted(server)


def test_who_is_let_in_starts_in_time() -> None:
    server = busy_server(AdmissionLimits(1000, {0: 10.0}))
    refused(server)
    last = server.waiting[-1]
    asked_at = server.now
    while last in server.waiting:
        server.step()
    assert 5 < server.now - asked_at <= 10 * 1.2


def test_the_urgent_are_not_kept_out_by_a_queue_of_those_who_can_wait() -> None:
    server = busy_server(AdmissionLimits(1000, {0: 10.0, 10: 60.0}))
    assert refused(server, priority=10).retry_after_s >= 1
    assert is_admitted(server, priority=0)


def one_slot(limits: AdmissionLimits) -> Server:
    """A server that runs one at a time, 20 ms a token, and is known to; its only sequence has 50 tokens to go."""
    server = Server(limits, slots=1, cost=Cost(1e-4, 0.02))
    for _ in range(2):
        server.ask(10, 100)
        with suppress(QueueFull):
            server.ask(10, 100)
        server.work_off()
    server.ask(10, 50)
    server.step()
    return server


def test_a_full_queue_is_no_shorter_for_being_let_in_too_late() -> None:
    server = one_slot(AdmissionLimits(2, {0: 10.0}))
    server.ask(10, 400)
    server.step()
    server.ask(10, 200)
    retry_s = refused(server).retry_after_s
    assert retry_s == pytest.approx(1 + 8 + 4 - 10, rel=0.1)
    server.work(1.5)
    assert server.admission.num_waiting == 1
    assert not is_admitted(server)
    server.work(retry_s - 1.5 + 0.3)
    assert is_admitted(server)


def test_nobody_is_sent_away_for_longer_than_somebody_is_in_the_way() -> None:
    server = one_slot(AdmissionLimits(1000, {0: 10.0}))
    server.ask(10, 3000)
    server.step()
    retry_s = refused(server).retry_after_s
    assert retry_s == pytest.approx(1, abs=0.2)
    server.work(retry_s + 0.3)
    assert is_admitted(server)


def test_what_a_prompt_costs_is_learnt_from_requests_that_come_one_at_a_time() -> None:
    server = Server(AdmissionLimits(1000), slots=4, cost=Cost(0.004, 0.02))
    for _ in range(20):
        server.ask(100, 10)
        server.work_off()
        server.now += 60
    cost = server.admission._pace.cost(server.now)
    assert cost is not None
    assert cost.prompt_s == pytest.approx(0.004, rel=0.1)


def test_the_forecast_is_of_what_is_used_and_not_of_what_is_asked_for() -> None:
    server = busy_server(AdmissionLimits(1000, {0: 600.0}), used=0.3)
    for _ in range(8):
        last = server.ask(100, 300)
    server.step()
    (forecast_s, _), asked_at = server.admission._forecast([Claim(0, 100, 300)], 600.0), server.now
    while last in server.waiting:
        server.step()
    assert 0.7 < forecast_s / (server.now - asked_at) < 1.5


def refused_server(seed: int, used: float) -> tuple[Server, float]:
    """A server at work that takes no more, and what it says when to come back."""
    dice = random.Random(seed)
    limits = AdmissionLimits(dice.choice([4, 12, 1000]), {0: dice.uniform(5, 40)})
    cost = Cost(dice.uniform(1e-4, 2e-3), dice.uniform(2e-3, 2e-2))
    server = busy_server(limits, slots=dice.randint(1, 8), cost=cost, used=used)
    for _ in range(4):
        error = refused(server, dice.randint(1, 400), dice.randint(20, 400))
        server.step()  # only a step shows that nobody else can start now
    return server, error.retry_after_s


@pytest.mark.parametrize("seed", range(40))
def test_who_comes_back_after_retry_after_is_admitted_and_was_not_told_to_wait_twice_too_long(seed: int) -> None:
    server, retry_s = refused_server(seed, used=1.0)
    if retry_s > 2:
        server.work(0.45 * retry_s)
        assert not is_admitted(server), "it could have come much sooner"
        server.work(0.55 * retry_s)
    server.work(retry_s)
    assert is_admitted(server), f"{retry_s:.1f} s were not enough"


@pytest.mark.parametrize("seed", range(40))
def test_where_answers_end_earlier_than_they_may_the_forecast_learns_by_how_much(seed: int) -> None:
    server, retry_s = refused_server(seed, used=0.6)
    server.work(2 * retry_s + 0.1 * server.limits.wait_s(0))
    assert is_admitted(server), f"{retry_s:.1f} s were not nearly enough"


def test_retry_after_has_bounds(clock: Clock) -> None:
    admission = Admission(AdmissionLimits(3), clock)
    fill(admission, 1, 2, 3)

    def retry_after() -> float:
        with pytest.raises(QueueFull) as caught:
            fill(admission, 999)
        return caught.value.retry_after_s

    assert retry_after() == 1  # never measured: the work has only just begun
    admission.observe(StepReport(stats()))
    clock.now = 1
    admission.observe(StepReport(stats(generated_tokens=100_000)))
    assert retry_after() == 1
    clock.now = 1e9  # the engine has stood still since
    assert retry_after() == 600


def test_who_has_waited_too_long_is_named_once(clock: Clock) -> None:
    admission = Admission(AdmissionLimits(10, {0: 5.0, 10: 60.0}), clock)
    assert admission.next_deadline == float("inf")
    fill(admission, 1, 2, 3)
    clock.now = 4
    admission.admit([Claim(4, 100, 20, priority=10), claim(5)], CARD, None)
    admission.started(1)
    assert admission.next_deadline == 5
    assert admission.take_overdue() == []
    clock.now = 5
    assert [number for number, _ in admission.take_overdue()] == [2, 3]
    assert admission.take_overdue() == []
    assert admission.next_deadline == 9
    clock.now = 64
    assert [number for number, _ in admission.take_overdue()] == [4, 5]
    assert admission.num_open == 5, "they are open until they have been told"
