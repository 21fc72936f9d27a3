"""A stream gives its reader everything, in order and once; whoever leaves is noticed once."""

from dataclasses import dataclass, field

import pytest
import trio
import trio.testing

from edgekv.actors.stream import Failed, StreamEvent, TokenStream
from edgekv.core.sequence import FinishReason
from edgekv.core.step import Finished, Sampled, Started, TokenOut

STARTED = Started(1, 0)
DONE = Finished(1, FinishReason.STOP)
LOST = Failed("engine_restarting", "sorry")


def token(number: int) -> TokenOut:
    return TokenOut(1, Sampled(number))


@dataclass
class Owner:
    calls: list[tuple[str, int] | tuple[str, int, bool]] = field(default_factory=list)

    def started(self, sequence_id: int) -> None:
        self.calls.append(("started", sequence_id))

    def ended(self, sequence_id: int, *, unfinished: bool) -> None:
        self.calls.append(("ended", sequence_id, unfinished))


@pytest.fixture
def owner() -> Owner:
    return Owner()


@pytest.fixture
def stream(owner: Owner) -> TokenStream:
    return TokenStream(1, owner)


async def test_what_piled_up_is_taken_at_once_and_in_order(stream: TokenStream) -> None:
    events: list[StreamEvent] = [STARTED, token(1), token(2)]
    for event in events:
        stream.push(event)
    assert stream.backlog == 3
    assert await stream.take() == events
    assert stream.backlog == 0


async def test_take_waits_for_the_next_event(stream: TokenStream, autojump_clock: trio.testing.MockClock) -> None:
    stream.push(STARTED)
    await stream.take()
    with trio.move_on_after(1) as scope:
        await stream.take()
    assert scope.cancelled_caught
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.sleep, 1)
        stream.push(token(1))
        assert await stream.take() == [token(1)]


async def test_a_cancelled_take_loses_nothing(stream: TokenStream) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        stream.push(token(1))
        await stream.take()
    assert await stream.take() == [token(1)]


@pytest.mark.parametrize("last", [DONE, LOST])
async def test_nothing_comes_after_the_last_event(stream: TokenStream, last: StreamEvent) -> None:
    for event in (STARTED, last, token(9), DONE, LOST):
        stream.push(event)
    assert stream.has_ended
    assert await stream.take() == [STARTED, last]
    assert await stream.take() == []
    assert await stream.take() == []


def test_the_owner_hears_of_start_and_end_once(stream: TokenStream, owner: Owner) -> None:
    for event in (STARTED, STARTED, token(1), DONE, LOST):
        stream.push(event)
    stream.close()
    assert owner.calls == [("started", 1), ("ended", 1, False)]
    assert stream.has_started


async def test_closing_early_tells_the_owner_once_that_it_is_unfinished(stream: TokenStream, owner: Owner) -> None:
    stream.push(STARTED)
    stream.close()
    stream.close()
    stream.push(token(1))
    stream.push(DONE)
    assert owner.calls == [("started", 1), ("ended", 1, True)]
    assert stream.backlog == 0
    assert await stream.take() == []


async def test_closing_wakes_a_waiting_reader(stream: TokenStream) -> None:
    taken: list[list[StreamEvent]] = []

    async def read() -> None:
        taken.append(await stream.take())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        stream.close()
    assert taken == [[]]


def test_a_stream_needs_no_owner() -> None:
    stream = TokenStream(7)
    stream.push(STARTED)
    stream.close()
    assert stream.sequence_id == 7
