"""An actor is reached through its mailbox alone; supervision restarts it with back-off, and not for ever."""

import pytest
import trio
import trio.testing

from edgekv.actors.kernel import Actor, ActorGone, GaveUp, MailboxFull, Restarts, supervise


class Fragile(Actor[int]):
    """Remembers what it heard; dies of negative numbers."""

    fatal: type[Exception] = KeyError

    def __init__(self, capacity: int = 64) -> None:
        super().__init__("fragile", capacity)
        self.heard: list[int] = []
        self.missed: list[int] = []
        self.crashes: list[tuple[float, str, float | None]] = []

    def receive(self, message: int) -> None:
        if message == -99:
            raise self.fatal("fatal")
        if message < 0:
            raise ValueError(message)
        self.heard.append(message)

    def unheard(self, message: int) -> None:
        self.missed.append(message)

    def crashed(self, error: Exception, restart_in_s: float | None) -> None:
        self.crashes.append((trio.current_time(), type(error).__name__, restart_in_s))

    def is_fatal(self, error: Exception) -> bool:
        return isinstance(error, self.fatal)


async def test_messages_are_received_in_order() -> None:
    actor = Fragile()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(supervise, actor)
        for number in range(10):
            actor.post(number)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert actor.heard == list(range(10))


def test_a_full_mailbox_refuses_but_not_what_insists() -> None:
    actor = Fragile(capacity=2)
    actor.post(1)
    actor.post(2)
    with pytest.raises(MailboxFull):
        actor.post(3)
    actor.insist(4)
    actor.close()
    assert actor.missed == [1, 2, 4]


async def test_a_restart_keeps_the_mailbox(autojump_clock: trio.testing.MockClock) -> None:
    actor = Fragile()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(supervise, actor)
        for number in (1, -1, 2, 3):
            actor.post(number)
        await trio.sleep(10)
        nursery.cancel_scope.cancel()
    assert actor.heard == [1, 2, 3]


async def test_the_delay_doubles_and_the_fourth_crash_in_a_minute_is_the_last(
    autojump_clock: trio.testing.MockClock,
) -> None:
    actor = Fragile()
    start = trio.current_time()
    for _ in range(5):
        actor.post(-1)
    with pytest.raises(GaveUp, match="fragile gave up after 4 crashes: -1") as caught:
        await supervise(actor, Restarts(limit=3, within_s=60, first_delay_s=0.5))
    assert isinstance(caught.value.error, ValueError)
    assert [(at - start, delay) for at, _, delay in actor.crashes] == [(0, 0.5), (0.5, 1), (1.5, 2), (3.5, None)]


async def test_crashes_that_are_long_past_do_not_count(autojump_clock: trio.testing.MockClock) -> None:
    actor = Fragile()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(supervise, actor)
        for _ in range(20):
            actor.post(-1)
            await trio.sleep(31)
        actor.post(7)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert actor.heard == [7]
    assert {delay for _, _, delay in actor.crashes[2:]} == {1.0}  # the one half a minute ago still counts


async def test_a_fatal_error_is_not_tried_again() -> None:
    actor = Fragile()
    actor.post(-99)
    with pytest.raises(GaveUp, match="after 1 crash"):
        await supervise(actor)
    assert [delay for _, _, delay in actor.crashes] == [None]


async def test_the_end_hands_back_what_was_never_heard_and_refuses_more() -> None:
    actor = Fragile()
    for number in (-99, 5, 6):
        actor.post(number)
    with pytest.raises(GaveUp):
        await supervise(actor)
    assert actor.missed == [5, 6]
    with pytest.raises(ActorGone):
        actor.post(1)
    with pytest.raises(ActorGone):
        actor.insist(1)


async def test_cancelling_the_supervisor_ends_the_mailbox_too(autojump_clock: trio.testing.MockClock) -> None:
    actor = Fragile()
    for number in (-1, 5):
        actor.post(number)
    with trio.move_on_after(0.1):
        await supervise(actor)  # in its back-off by now
    assert actor.missed == [5]


async def test_errors_in_groups_are_told_apart_by_what_is_in_them() -> None:
    class InNursery(Fragile):
        async def run(self) -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.lowlevel.checkpoint)
                nursery.start_soon(super().run)

    actor = InNursery()
    actor.post(-99)
    with pytest.raises(GaveUp) as caught:
        await supervise(actor)
    assert type(caught.value.error) is KeyError
