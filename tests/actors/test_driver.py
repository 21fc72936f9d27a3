"""Both drivers turn the same crank; the thread never holds up the loop and never outlives its core."""

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio

from edgekv.actors.service import ModelCard
from edgekv.core.step import EngineStats, StepReport
from edgekv.engine.driver import (
    Core,
    Driver,
    InlineDriver,
    LoadProgress,
    MakeCore,
    MakeDriver,
    Progress,
    ThreadDriver,
)
from edgekv.errors import ModelError
from tests.actors.fakes import FakeCore, make_card, make_draft, makes, slow


@dataclass
class Listener:
    """Writes down what it hears; `deaf_to` raises on reports."""

    progress: list[LoadProgress] = field(default_factory=list)
    ready: list[ModelCard] = field(default_factory=list)
    reports: list[StepReport] = field(default_factory=list)
    faults: list[BaseException] = field(default_factory=list)
    raises: Exception | None = None
    changed: trio.Event = field(default_factory=trio.Event)

    def _note(self) -> None:
        self.changed.set()
        self.changed = trio.Event()

    def on_progress(self, progress: LoadProgress) -> None:
        self.progress.append(progress)
        self._note()

    def on_ready(self, facts: ModelCard, stats: EngineStats) -> None:
        self.ready.append(facts)
        self._note()

    def on_report(self, report: StepReport) -> None:
        if self.raises is not None:
            raise self.raises
        self.reports.append(report)
        self._note()

    def on_fault(self, error: BaseException) -> None:
        self.faults.append(error)
        self._note()

    async def until(self, reached: Callable[[], object]) -> None:
        await trio.lowlevel.checkpoint()
        with trio.fail_after(5):
            while True:
                if reached():
                    return
                await self.changed.wait()

    @property
    def finished(self) -> list[int]:
        return [finished.sequence_id for report in self.reports for finished in report.finished]


@pytest.fixture(params=[ThreadDriver, InlineDriver])
def make_driver(request: pytest.FixtureRequest) -> MakeDriver:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


async def test_a_driver_loads_obeys_steps_and_waits(make_driver: MakeDriver) -> None:
    core, listener = FakeCore(), Listener()
    async with trio.open_nursery() as nursery:
        driver = make_driver(makes(core), listener, nursery)
        driver.send(lambda core: core.submit(make_draft(3).with_id(1)))
        driver.send(lambda core: core.submit(make_draft(5).with_id(2)))
        await listener.until(lambda: listener.finished == [1, 2])
        await trio.sleep(0.02)
        assert core.steps == len(listener.reports) == 5  # an idle core is not turned
        driver.send(lambda core: core.submit(make_draft(1).with_id(3)))
        await listener.until(lambda: 3 in listener.finished)
        await driver.aclose()
    assert listener.ready == [make_card()]
    assert listener.progress[-1] == LoadProgress(100, 100, "weights")
    assert listener.faults == []


@pytest.mark.parametrize("where", ["make_core", "command", "step", "listener"])
async def test_an_exception_anywhere_is_one_fault_and_the_end(make_driver: MakeDriver, where: str) -> None:
    bug = ZeroDivisionError(where)

    def fail(*anything: object) -> Any:
        raise bug

    core = FakeCore(fail if where == "step" else lambda batch: None)
    listener = Listener(raises=bug if where == "listener" else None)
    async with trio.open_nursery() as nursery:
        driver = make_driver(fail if where == "make_core" else makes(core), listener, nursery)
        driver.send(lambda core: core.submit(make_draft(30).with_id(1)))
        if where == "command":
            driver.send(fail)
        await listener.until(lambda: listener.faults)
        await driver.aclose()
    assert listener.faults == [bug]


async def test_exiting_the_interpreter_from_the_thread_is_a_fault_too() -> None:
    def forward(batch: object) -> None:
        raise SystemExit(3)

    listener = Listener()
    async with trio.open_nursery() as nursery:
        driver: Driver = ThreadDriver(makes(FakeCore(forward)), listener, nursery)
        driver.send(lambda core: core.submit(make_draft().with_id(1)))
        await listener.until(lambda: listener.faults)
        await driver.aclose()
    assert isinstance(listener.faults[0], SystemExit)


async def test_a_rejected_command_is_told_and_the_core_goes_on(make_driver: MakeDriver) -> None:
    listener, rejected = Listener(), list[Exception]()

    def refuse(core: Core) -> None:
        raise ModelError("not with this model")

    async with trio.open_nursery() as nursery:
        driver = make_driver(makes(FakeCore()), listener, nursery)
        driver.send(refuse, rejected.append)
        driver.send(lambda core: core.submit(make_draft().with_id(1)), rejected.append)
        await listener.until(lambda: listener.finished == [1])
        await driver.aclose()
    assert [str(error) for error in rejected] == ["not with this model"]
    assert listener.faults == []


async def test_closing_stops_between_steps_and_nothing_is_heard_after(make_driver: MakeDriver) -> None:
    core, listener = FakeCore(slow(0.002)), Listener()
    async with trio.open_nursery() as nursery:
        driver = make_driver(makes(core), listener, nursery)
        driver.send(lambda core: core.submit(make_draft(100_000).with_id(1)))
        await listener.until(lambda: len(listener.reports) >= 3)
        await driver.aclose()
        heard, steps = len(listener.reports), core.steps
        await trio.sleep(0.03)
        assert (len(listener.reports), core.steps) == (heard, steps)


async def test_loading_and_stepping_do_not_hold_up_the_loop() -> None:
    def load(progress: Progress) -> tuple[Core, ModelCard]:
        time.sleep(0.3)
        return FakeCore(slow(0.3)), make_card()

    listener, longest, last = Listener(), 0.0, time.perf_counter()
    async with trio.open_nursery() as nursery:
        driver = ThreadDriver(load, listener, nursery)
        driver.send(lambda core: core.submit(make_draft(1).with_id(1)))
        while not listener.finished:
            await trio.sleep(0.002)
            last, before = time.perf_counter(), last
            longest = max(longest, last - before)
        await driver.aclose()
    assert longest < 0.25


async def test_closing_while_loading_stops_at_the_next_progress() -> None:
    def load(progress: Progress) -> tuple[Core, ModelCard]:
        for done in range(1000):
            time.sleep(0.005)
            try:
                progress(done, 1000, "weights")
            except Exception as error:  # as a loader would that wraps whatever goes wrong
                raise ModelError("wrapped") from error
        raise AssertionError("loaded to the end")

    listener = Listener()
    async with trio.open_nursery() as nursery:
        driver = ThreadDriver(load, listener, nursery)
        await listener.until(lambda: listener.progress)
        with trio.fail_after(1):
            await driver.aclose()
    assert listener.faults == []


async def test_a_stuck_thread_is_left_behind_when_closing_is_cancelled() -> None:
    in_step, let_go, listener = trio.Event(), threading.Event(), Listener()
    token = trio.lowlevel.current_trio_token()

    def stuck(batch: object) -> None:
        token.run_sync_soon(in_step.set)
        let_go.wait(10)

    async with trio.open_nursery() as nursery:
        driver = ThreadDriver(makes(FakeCore(stuck)), listener, nursery)
        driver.send(lambda core: core.submit(make_draft().with_id(1)))
        await in_step.wait()
        with trio.move_on_after(0.05) as scope:
            await driver.aclose()
        assert scope.cancelled_caught
        let_go.set()
        await driver.aclose()
    assert listener.reports == []  # what it said afterwards was not heard


@pytest.mark.parametrize("ends_by", ["fault", "close"])
async def test_the_core_is_let_go_with_its_thread(ends_by: str) -> None:
    class Owner:
        """Stands for what holds the device's memory, in a cycle as real ones are."""

        def __init__(self, core: FakeCore) -> None:
            self.core = core

    def forward(batch: object) -> None:
        if ends_by == "fault":
            raise RuntimeError("bug")

    alive: list[weakref.ref[FakeCore]] = []

    def load(progress: Progress) -> tuple[Core, ModelCard]:
        core = FakeCore(forward)
        core.owner = Owner(core)  # type: ignore[attr-defined]
        alive.append(weakref.ref(core))
        return core, make_card()

    listener = Listener()
    gc.disable()
    try:
        async with trio.open_nursery() as nursery:
            driver = ThreadDriver(load, listener, nursery)
            driver.send(lambda core: core.submit(make_draft().with_id(1)))
            await listener.until(lambda: listener.faults or listener.finished)
            await driver.aclose()
            assert alive[0]() is None
    finally:
        gc.enable()
    assert [type(error) for error in listener.faults] == ([RuntimeError] if ends_by == "fault" else [])


async def test_a_core_that_waits_does_not_flood_the_loop() -> None:
    class Waiting(FakeCore):
        def step(self) -> StepReport:
            self.steps += 1
            return StepReport(self.stats())

    core, listener = Waiting(), Listener()
    async with trio.open_nursery() as nursery:
        driver = ThreadDriver(makes(core), listener, nursery)
        driver.send(lambda core: core.submit(make_draft().with_id(1)))
        await trio.sleep(0.1)
        await driver.aclose()
    assert 2 <= core.steps <= 100


def test_a_run_that_ends_without_closing_does_not_leave_the_thread_alive() -> None:
    async def careless(make_core: MakeCore[ModelCard]) -> None:
        async with trio.open_nursery() as nursery:
            ThreadDriver(make_core, Listener(), nursery).send(lambda core: core.submit(make_draft(10**9).with_id(1)))
            await trio.sleep(0.01)

    trio.run(careless, makes(FakeCore(slow(0.001))))
    for thread in threading.enumerate():
        if thread.name == "edgekv-engine":
            thread.join(2)
