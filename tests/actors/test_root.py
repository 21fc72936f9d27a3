"""The server starts in order, drains when asked, and says with its exit code how it ended."""

import logging
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio
import trio.lowlevel

from edgekv.actors import engine as engine_module
from edgekv.actors.engine import EngineStatus, Phase
from edgekv.actors.fault import DRAINING
from edgekv.actors.kernel import Restarts
from edgekv.actors.latest import Latest
from edgekv.actors.root import SWITCH_INTERVAL_S, Exit, run_server
from edgekv.actors.service import ModelCard, Service
from edgekv.actors.stream import Failed, StreamEvent, TokenStream
from edgekv.core.sequence import FinishReason
from edgekv.core.step import Finished
from edgekv.engine.driver import Core, DeviceLost, Progress
from edgekv.errors import ModelError, NotServing, OverBudget
from edgekv.http.listen import CannotListen
from tests.actors.fakes import FakeCore, check_whole, make_card, make_draft, makes, read_all, slow

Visit = Callable[[Service], Awaitable[None]]


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    threads, interval = set(threading.enumerate()), sys.getswitchinterval()
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert set(threading.enumerate()) <= threads
    assert sys.getswitchinterval() == interval
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


@dataclass
class FakeHTTP:
    """Runs `visitors` as if they had connected, and ends when it is asked to and they have left."""

    visitors: list[Visit] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)

    async def __call__(self, service: Service, *, listening: trio.Event, shutdown: trio.Event) -> None:
        self.seen.append(f"listening while {service.health().status}")
        listening.set()
        async with trio.open_nursery() as nursery:
            for visitor in self.visitors:
                nursery.start_soon(visitor, service)
            await shutdown.wait()
            self.seen.append(f"asked to end while {service.health().status}")
        self.seen.append("ended")


async def until(reached: Callable[[], bool]) -> None:
    with trio.fail_after(5):
        while True:
            await trio.sleep(0.002)
            if reached():
                return


async def until_ready(service: Service) -> None:
    await until(lambda: service.health().status == "ok")


async def terminate(service: Service) -> None:
    await until_ready(service)
    signal.raise_signal(signal.SIGTERM)


async def serve(http: Any, *cores: FakeCore | Exception, **changes: Any) -> Exit:
    settings: dict[str, Any] = {
        "make_core": makes(*(cores or [FakeCore()])),
        "serve_http": http,
        "max_queue": 64,
        "grace_s": 10.0,
        "restarts": Restarts(first_delay_s=0.01),
    }
    with trio.fail_after(20):
        tasks = trio.lowlevel.current_statistics().tasks_living
        ended = await run_server(**(settings | changes))
        assert trio.lowlevel.current_statistics().tasks_living == tasks
    return ended


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_ends_an_idle_server_cleanly(number: signal.Signals) -> None:
    async def visit(service: Service) -> None:
        await until_ready(service)
        assert sys.getswitchinterval() == pytest.approx(SWITCH_INTERVAL_S)
        signal.raise_signal(number)

    http = FakeHTTP([visit])
    assert await serve(http) == Exit(0)
    assert http.seen == ["listening while loading", "asked to end while draining", "ended"]


async def test_under_load_the_open_finish_and_the_new_are_refused() -> None:
    ends: list[Finished | Failed] = []
    refused: list[str] = []

    async def read(service: Service) -> None:
        await until_ready(service)
        (stream,) = await service.open([make_draft(60)])
        ends.append(check_whole(await read_all(stream), 60))

    async def late(service: Service) -> None:
        await until_ready(service)
        await trio.sleep(0.02)
        signal.raise_signal(signal.SIGTERM)
        await until(lambda: service.health().status == "draining")
        try:
            await service.open([make_draft()])
        except NotServing as error:
            refused.append(error.code)

    assert await serve(FakeHTTP([read] * 20 + [late]), FakeCore(slow(0.002))) == Exit(0)
    assert [end.reason for end in ends if isinstance(end, Finished)] == [FinishReason.LENGTH] * 20
    assert refused == ["draining"]


async def test_after_the_grace_what_is_left_is_ended_and_http_can_still_say_so() -> None:
    said: list[StreamEvent] = []

    async def read(service: Service) -> None:
        await until_ready(service)
        (stream,) = await service.open([make_draft(10_000)])
        await stream.take()
        signal.raise_signal(signal.SIGTERM)
        events = await read_all(stream)
        await trio.sleep(0.05)  # the last bytes on their way
        said.append(events[-1])

    assert await serve(FakeHTTP([read]), FakeCore(slow()), grace_s=0.1) == Exit(0)
    assert said == [Finished(1, FinishReason.ABORT, "the server is shutting down")]


async def test_a_second_signal_ends_at_once() -> None:
    said: list[StreamEvent] = []

    async def read(service: Service) -> None:
        await until_ready(service)
        (stream,) = await service.open([make_draft(10_000)])
        signal.raise_signal(signal.SIGTERM)
        await trio.sleep(0.05)
        signal.raise_signal(signal.SIGTERM)
        with trio.CancelScope(shield=True):
            said.append((await read_all(stream))[-1])

    started = time.perf_counter()
    assert (await serve(FakeHTTP([read]), FakeCore(slow()), grace_s=1000)).code == 128 + signal.SIGTERM
    assert time.perf_counter() - started < 5
    assert said == [DRAINING]


async def test_a_signal_while_loading_does_not_wait_for_the_model() -> None:
    def load(progress: Progress) -> tuple[Core, ModelCard]:
        for done in range(10_000):
            time.sleep(0.002)
            progress(done, 10_000, "weights")
        raise AssertionError("loaded to the end")

    async def visit(service: Service) -> None:
        await until(lambda: "weights" in service.health().detail)
        with pytest.raises(NotServing):
            service.card()
        signal.raise_signal(signal.SIGINT)

    assert await serve(FakeHTTP([visit]), make_core=load) == Exit(0)


async def test_a_signal_while_restarting_does_not_wait_for_the_next_life() -> None:
    async def visit(service: Service) -> None:
        await until_ready(service)
        (stream,) = await service.open([make_draft(10)])
        await read_all(stream)
        signal.raise_signal(signal.SIGTERM)

    ended = await serve(FakeHTTP([visit]), FakeCore(crash), restarts=Restarts(first_delay_s=1000))
    assert ended == Exit(0)


def crash(batch: object) -> None:
    raise ZeroDivisionError("a bug")


def lose_the_device(batch: object) -> None:
    raise DeviceLost("the device fell off the bus")


@pytest.mark.parametrize(
    "error",
    [ModelError("config.json: no hidden_size"), OverBudget("weights", 10, 5, 8), FileNotFoundError("model.bin")],
)
async def test_a_model_that_cannot_be_loaded_is_exit_1_with_its_message(error: Exception) -> None:
    http = FakeHTTP()
    assert await serve(http, error) == Exit(1, str(error))
    assert http.seen[-2:] == ["asked to end while failed", "ended"]


async def ask(service: Service) -> None:
    """Ask until the engine is lost; it is sorry each time."""
    await trio.lowlevel.checkpoint()
    while service.health().status != "failed":
        try:
            (stream,) = await service.open([make_draft(10)])
            assert isinstance((await read_all(stream))[-1], Failed)
        except NotServing:
            await trio.sleep(0.002)


async def test_an_engine_that_keeps_crashing_is_exit_70() -> None:
    assert await serve(FakeHTTP([ask]), FakeCore(crash)) == Exit(70, "a bug")


async def test_a_lost_device_is_exit_70() -> None:
    assert await serve(FakeHTTP([ask]), FakeCore(lose_the_device)) == Exit(70, "the device fell off the bus")


async def test_a_model_that_cannot_be_loaded_again_is_exit_70() -> None:
    ended = await serve(FakeHTTP([ask]), FakeCore(crash), ModelError("the file has gone"))
    assert ended == Exit(70, "the file has gone")


async def test_a_port_that_is_taken_is_exit_1_and_nothing_is_loaded() -> None:
    async def http(service: Service, *, listening: trio.Event, shutdown: trio.Event) -> None:
        await trio.sleep(0.05)
        raise OSError(98, "Address already in use")

    loaded: list[bool] = []

    def load(progress: Progress) -> tuple[Core, ModelCard]:
        loaded.append(True)
        return FakeCore(), make_card()

    assert await serve(http, make_core=load) == Exit(1, "[Errno 98] Address already in use")
    assert loaded == []


async def test_an_error_meant_for_a_person_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    async def http(service: Service, *, listening: trio.Event, shutdown: trio.Event) -> None:
        await trio.lowlevel.checkpoint()
        raise CannotListen("127.0.0.1", 80, PermissionError(13, "Permission denied"))

    ended = await serve(http)
    assert (ended.code, ended.reason.startswith("Cannot listen on 127.0.0.1 port 80: ")) == (1, True)
    assert await serve(FakeHTTP(), ModelError("no such folder")) == Exit(1, "no such folder")
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []
    assert (await serve(FakeHTTP(), DeviceLost("gone"))).code == 70
    assert "gone" in caplog.text


async def test_a_bug_in_the_http_server_is_exit_70_and_ends_the_streams() -> None:
    streams: list[TokenStream] = []

    async def http(service: Service, *, listening: trio.Event, shutdown: trio.Event) -> None:
        listening.set()
        await until_ready(service)
        streams.extend(await service.open([make_draft(10_000)]))
        await streams[0].take()
        raise ZeroDivisionError("a bug in the HTTP server")

    assert await serve(http, FakeCore(slow())) == Exit(70, "a bug in the HTTP server")
    assert (await read_all(streams[0]))[-1] == DRAINING


async def test_an_http_server_that_ends_by_itself_is_exit_70() -> None:
    async def http(service: Service, *, listening: trio.Event, shutdown: trio.Event) -> None:
        listening.set()
        await until_ready(service)

    assert (await serve(http)).code == 70


async def test_an_http_server_that_does_not_end_is_cancelled() -> None:
    async def stay(service: Service) -> None:
        await trio.sleep_forever()

    assert await serve(FakeHTTP([terminate, stay]), http_grace_s=0.05) == Exit(0)


async def test_a_thread_that_is_stuck_on_its_device_is_exit_70(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "STOP_S", 0.05)
    in_step, let_go = trio.Event(), threading.Event()
    token = trio.lowlevel.current_trio_token()

    def stuck(batch: object) -> None:
        token.run_sync_soon(in_step.set)
        let_go.wait(10)

    async def visit(service: Service) -> None:
        await until_ready(service)
        (stream,) = await service.open([make_draft(10)])
        await in_step.wait()
        signal.raise_signal(signal.SIGTERM)
        assert await read_all(stream) == [DRAINING]

    ended = await serve(FakeHTTP([visit]), FakeCore(stuck), grace_s=0.05)
    assert ended == Exit(70, "the engine's thread did not come back from a step")
    let_go.set()
    for thread in threading.enumerate():
        if thread.name == "edgekv-engine":
            thread.join(5)


async def test_who_watches_sees_the_loading_and_may_fail() -> None:
    seen: list[EngineStatus] = []

    def load(progress: Progress) -> tuple[Core, ModelCard]:
        for done in range(5):
            progress(done, 5, "weights")
            time.sleep(0.01)
        return FakeCore(), make_card()

    async def watch(status: Latest[EngineStatus]) -> None:
        async for value in status.watch():
            seen.append(value)
            if value.phase is Phase.SERVING:
                raise BrokenPipeError("the terminal has gone")

    assert await serve(FakeHTTP([terminate]), make_core=load, watch=watch) == Exit(0)
    done = [value.progress.done_bytes for value in seen if value.progress is not None]
    assert done == sorted(done)
    assert len(set(done)) >= 3
    assert seen[-1].card == make_card()
