"""The whole server with its memory guard: it ends when it is told to, whatever the driver does."""

import signal
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio

from edgekv.actors.root import Exit, run_server
from edgekv.actors.service import Service
from edgekv.core.pressure import PressurePolicy
from edgekv.core.reading import Reading
from edgekv.core.spill import Headroom
from edgekv.smi.reader import Reader, Source
from tests.actors.fakes import FakeCore, check_whole, make_draft, makes, read_all
from tests.actors.test_root import FakeHTTP, until

GIB = 1 << 30


class Driver:
    """Says what it reads at once, or never."""

    def __init__(self, name: str, let_go: threading.Event | None = None) -> None:
        self.name, self.let_go = name, let_go

    def read(self, at: float) -> Reading:
        if self.let_go is not None:
            self.let_go.wait(20)
        return Reading(16 * GIB, 4 * GIB, 2 * GIB, self.name, at)

    def close(self) -> None:
        pass


def source(name: str, opened: Callable[[], Reader]) -> Source:
    return Source(name, opened)


async def serve(visit: Callable[[Service], Awaitable[None]], **changes: Any) -> Exit:
    settings: dict[str, Any] = {
        "make_core": makes(FakeCore()),
        "serve_http": FakeHTTP([visit]),
        "max_queue": 64,
        "max_wait_s": {0: 60.0},
        "grace_s": 5.0,
        "policy": PressurePolicy(Headroom.of(16 * GIB)),
        "device": "a card",
    }
    with trio.fail_after(20):
        tasks = trio.lowlevel.current_statistics().tasks_living
        ended = await run_server(**(settings | changes))
        assert trio.lowlevel.current_statistics().tasks_living == tasks
    return ended


async def test_a_driver_that_hangs_for_good_holds_up_neither_requests_nor_the_end() -> None:
    let_go = threading.Event()
    asked_to_end: list[float] = []

    async def visit(service: Service) -> None:
        def sees_the_card() -> bool:
            view = service.memory()
            return view is not None and view.reading is not None

        await until(sees_the_card)
        view = service.memory()
        assert view is not None
        assert view.reading is not None
        assert (view.device, view.reading.source) == ("a card", "a way that works")
        await until(lambda: service.health().status == "ok")
        (stream,) = await service.open([make_draft(20)])
        check_whole(await read_all(stream), 20)
        asked_to_end.append(time.perf_counter())
        signal.raise_signal(signal.SIGTERM)

    sources = [
        source("a way that hangs", lambda: Driver("hangs", let_go)),
        source("a way that works", lambda: Driver("a way that works")),
    ]
    assert await serve(visit, sources=sources) == Exit(0)
    assert time.perf_counter() - asked_to_end[0] < 3
    let_go.set()


async def test_a_driver_that_hangs_while_it_is_opened_is_only_not_there() -> None:
    let_go = threading.Event()

    def open_never() -> Reader:
        let_go.wait(20)
        return Driver("late")

    async def visit(service: Service) -> None:
        await until(lambda: service.health().status == "ok")
        view = service.memory()
        assert view is not None
        assert (view.reading, view.problem) == (None, "slow: is being opened")
        signal.raise_signal(signal.SIGTERM)

    assert await serve(visit, sources=[source("slow", open_never)]) == Exit(0)
    let_go.set()


async def test_a_guard_that_keeps_crashing_costs_the_guard_alone(caplog: pytest.LogCaptureFixture) -> None:
    policy = PressurePolicy(Headroom.of(16 * GIB))

    def crash(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError("a bug")

    policy.observe = crash  # type: ignore[method-assign]

    async def visit(service: Service) -> None:
        await until(lambda: service.health().status == "ok" and "the memory guard crashed" in caplog.text)
        (stream,) = await service.open([make_draft(20)])
        check_whole(await read_all(stream), 20)
        signal.raise_signal(signal.SIGTERM)

    sources = [source("good", lambda: Driver("good"))]
    assert await serve(visit, policy=policy, sources=sources) == Exit(0)
