"""A source is asked off the loop, and neither one that hangs nor one that fails holds anybody up."""

import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import trio
import trio.testing

from edgekv.actors.feed import MOST_DELAY_S, Feed, InThread, OffLoop
from edgekv.core.reading import Reading
from edgekv.smi.reader import ReadingFailed, Source
from tests.actors.simulated_card import CardReader, Line, SimulatedCard


@asynccontextmanager
async def running(source: Source, off_loop: OffLoop, changed: Callable[[], None] = lambda: None) -> AsyncIterator[Feed]:
    feed = Feed(source, off_loop, changed)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(feed.run)
        yield feed
        nursery.cancel_scope.cancel()


async def opened(feed: Feed) -> None:
    with trio.fail_after(100):
        while not feed.is_ready:  # noqa: ASYNC110 - it has no event
            await trio.sleep(0.005)


async def test_a_source_is_opened_read_and_closed(autojump_clock: trio.testing.MockClock) -> None:
    card = SimulatedCard()
    changes: list[float] = []
    async with running(card.source(), Line(card), lambda: changes.append(trio.current_time())) as feed:
        assert (await feed.read(1.0, 0.25), feed.problem) == (None, "is being opened")
        await opened(feed)
        reading = await feed.read(7.0, 0.25)
        assert reading is not None
        assert (reading.at, reading.used_bytes, feed.problem) == (7.0, card.own_bytes + card.others_bytes, None)
    assert (card.num_open, len(changes)) == (0, 1)


async def test_one_that_cannot_be_opened_is_tried_again_less_and_less_often(
    autojump_clock: trio.testing.MockClock,
) -> None:
    tries: list[float] = []

    def fail() -> SimulatedCard:
        tries.append(trio.current_time())
        raise ReadingFailed("no such\nlibrary")

    async with running(Source("nvml", fail), Line(SimulatedCard())) as feed:  # type: ignore[arg-type]
        await trio.sleep(60)
        assert feed.problem == "no such library"
    waits = [later - sooner for sooner, later in pairwise(tries)]
    assert waits[:5] == pytest.approx([0.5, 1, 2, 4, 8])
    assert waits[5:] == pytest.approx([MOST_DELAY_S] * len(waits[5:]))


async def test_one_whose_driver_vanishes_is_closed_and_opened_when_it_is_back(
    autojump_clock: trio.testing.MockClock,
) -> None:
    card = SimulatedCard()
    async with running(card.source(), Line(card)) as feed:
        await opened(feed)
        card.is_gone = True
        assert await feed.read(0.0, 0.25) is None
        assert (feed.problem, feed.is_ready) == ("the driver has gone", False)
        await trio.sleep(0.1)
        assert card.num_open == 0
        card.is_gone = False
        await opened(feed)
        assert await feed.read(0.0, 0.25) is not None
        assert (feed.problem, card.num_opens) == (None, 2)


async def test_one_that_opens_and_then_fails_is_not_opened_again_and_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    card = SimulatedCard()
    async with running(card.source(), Line(card)) as feed:
        for _ in range(600):
            card.is_gone = False
            await trio.sleep(0.05)
            card.is_gone = True
            await feed.read(0.0, 0.25)
            await trio.sleep(0.05)
    assert card.num_opens <= 10


async def test_one_that_hangs_is_left_alone_until_its_call_comes_back(autojump_clock: trio.testing.MockClock) -> None:
    card = SimulatedCard()
    async with running(card.source(), Line(card)) as feed:
        await opened(feed)
        began = trio.current_time()
        card.hangs_until = began + 5
        assert await feed.read(began, 0.25) is None
        assert trio.current_time() - began == pytest.approx(0.25)
        assert (feed.problem, feed.is_ready) == ("has not answered for 0.25 s", False)
        assert await feed.read(began, 0.25) is None
        assert trio.current_time() - began == pytest.approx(0.25), "it is not even asked"
        await opened(feed)
        assert trio.current_time() - began == pytest.approx(5, abs=0.01)
        assert await feed.read(began, 0.25) is not None
        assert card.num_opens == 1


class Blocking:
    """A driver whose calls block as long as it likes."""

    def __init__(self) -> None:
        self.let_go = threading.Event()
        self.hangs = False
        self.at_once = self.most_at_once = self.num_closed = 0

    def read(self, at: float) -> Reading:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        if self.hangs:
            self.let_go.wait(10)
        self.at_once -= 1
        return Reading(100, 50, 10, "blocking", at)

    def close(self) -> None:
        self.num_closed += 1


async def test_a_call_that_blocks_its_thread_holds_up_neither_the_loop_nor_the_end() -> None:
    driver = Blocking()
    async with running(Source("blocking", lambda: driver), InThread()) as feed:
        await opened(feed)
        assert await feed.read(0.0, 5) is not None
        driver.hangs = True
        began = time.perf_counter()
        for _ in range(10):
            assert await feed.read(0.0, 0.05) is None
        assert time.perf_counter() - began < 1
        driver.hangs = False
        driver.let_go.set()
        await opened(feed)
        assert await feed.read(0.0, 5) is not None
        assert driver.most_at_once == 1
        driver.hangs = True
        driver.let_go.clear()
        assert await feed.read(0.0, 0.05) is None
        began = time.perf_counter()
    assert time.perf_counter() - began < 0.3
    assert driver.num_closed == 0, "a call to a driver that hangs would hang too"
    driver.let_go.set()


async def test_an_error_that_no_source_should_raise_is_one_all_the_same(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> Blocking:
        raise KeyError("amdsmi")

    async with running(Source("amdsmi", broken), Line(SimulatedCard())) as feed:
        await trio.sleep(1)
        assert feed.problem == "'amdsmi'"
    assert "KeyError" in caplog.text


@pytest.mark.parametrize("garbage", [{"total_bytes": 0, "used_bytes": 0}, {"used_bytes": -1}, {"own_bytes": -4096}])
async def test_one_that_says_what_cannot_be_is_left_alone_and_opened_again(
    autojump_clock: trio.testing.MockClock, garbage: dict[str, Any]
) -> None:
    card = SimulatedCard()
    spoilt = True

    class Spoilt(CardReader):
        def read(self, at: float) -> Reading:
            return replace(super().read(at), **garbage) if spoilt else super().read(at)

    async with running(Source("amdsmi", lambda: Spoilt(card, "amdsmi")), Line(card)) as feed:
        await opened(feed)
        assert await feed.read(1.0, 0.25) is None
        assert feed.problem is not None
        assert feed.problem.startswith("says what cannot be: ")
        spoilt = False
        await opened(feed)
        assert await feed.read(2.0, 0.25) is not None
        assert feed.problem is None
