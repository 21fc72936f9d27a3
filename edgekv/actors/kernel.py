"""What an actor is and who keeps it alive. Runs in: trio; owns: mailboxes."""

import contextlib
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import trio

log = logging.getLogger(__name__)

MessageT = TypeVar("MessageT")

FIRST_DELAY_S, MOST_DELAY_S = 0.5, 30.0


class MailboxFull(Exception):
    """The actor has more to do than it was meant to have waiting; nothing was delivered."""


class ActorGone(Exception):
    """The actor has ended for good; nothing was delivered."""


class GaveUp(Exception):
    """An actor will not be restarted; `error` is what it last died of."""

    def __init__(self, name: str, error: Exception, num_crashes: int) -> None:
        super().__init__(f"{name} gave up after {num_crashes} {'crash' if num_crashes == 1 else 'crashes'}: {error}")
        self.name, self.error, self.num_crashes = name, error, num_crashes


@dataclass(frozen=True, slots=True)
class Restarts:
    """An actor is restarted at most `limit` times within `within_s` seconds, after a delay that doubles each time."""

    limit: int = 3
    within_s: float = 60.0
    first_delay_s: float = 0.5


class Actor(ABC, Generic[MessageT]):
    """A task that owns its state and is reached only through its mailbox.

    The mailbox outlives restarts; it closes, and what is left in it is handed to `unheard`, when the actor ends.
    """

    def __init__(self, name: str, capacity: int = 64) -> None:
        self.name = name
        self._capacity = capacity
        self._post, self._inbox = trio.open_memory_channel[MessageT](math.inf)

    def post(self, message: MessageT) -> None:
        """Deliver now or raise `MailboxFull` or `ActorGone`; a sender never waits for a receiver."""
        if self._inbox.statistics().current_buffer_used >= self._capacity:
            raise MailboxFull(self.name)
        self.insist(message)

    def insist(self, message: MessageT) -> None:
        """Deliver past the capacity; for messages that take work away, which are no more than those that brought it.

        Raises `ActorGone`.
        """
        try:
            self._post.send_nowait(message)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise ActorGone(self.name) from None

    async def run(self) -> None:
        """One life: receive until cancelled, or until `living` ends it."""
        async with self.living():
            async for message in self._inbox:
                self.receive(message)

    def close(self) -> None:
        """End the mailbox for good."""
        with contextlib.suppress(trio.WouldBlock, trio.EndOfChannel, trio.ClosedResourceError):
            while True:
                self.unheard(self._inbox.receive_nowait())
        self._inbox.close()
        self._post.close()

    @asynccontextmanager
    async def _plainly(self) -> AsyncIterator[None]:
        yield

    def living(self) -> AbstractAsyncContextManager[None]:
        """What surrounds one life: acquired before the first message, released after the last."""
        return self._plainly()

    @abstractmethod
    def receive(self, message: MessageT) -> None:
        """Handle one message; an exception ends this life.

        It cannot wait: no cancellation comes between taking a message out of the mailbox and acting on it, so none is
        lost. What takes time belongs to tasks of `living`.
        """

    def unheard(self, message: MessageT) -> None:
        """A message that came too late; must not raise."""

    def crashed(self, error: Exception, restart_in_s: float | None) -> None:
        """A life ended with `error`; None when there will be no other. Must not raise."""

    def is_fatal(self, error: Exception) -> bool:
        """Whether another life would be in vain."""
        return False


async def supervise(actor: Actor[MessageT], policy: Restarts = Restarts()) -> None:
    """Run `actor`, and run it again after each `Exception`, with back-off; returns when a life ends without one.

    Raises `GaveUp` when the error is fatal to the actor or when it crashed once more than `policy.limit` times within
    `policy.within_s`. The mailbox is closed in any case.
    """
    crashes: list[float] = []
    try:
        while True:
            try:
                await actor.run()
                return
            except Exception as raised:
                error = _root_of(raised)
            now = trio.current_time()
            crashes = [*(at for at in crashes if now - at < policy.within_s), now]
            if actor.is_fatal(error) or len(crashes) > policy.limit:
                actor.crashed(error, None)
                raise GaveUp(actor.name, error, len(crashes)) from error
            delay_s = policy.first_delay_s * 2 ** (len(crashes) - 1)
            log.error("%s crashed (%d), restarts in %.1f s", actor.name, len(crashes), delay_s, exc_info=error)
            actor.crashed(error, delay_s)
            await trio.sleep(delay_s)
    finally:
        actor.close()


async def keep_running(name: str, task: Callable[[], Awaitable[None]]) -> None:
    """Run `task` until it ends by itself, again after each `Exception`, with back-off: what the server can be without
    for a while, and must not end by.
    """
    delay_s = FIRST_DELAY_S
    while True:
        started = trio.current_time()
        try:
            await task()
            return
        except Exception:
            if trio.current_time() - started > MOST_DELAY_S:
                delay_s = FIRST_DELAY_S
            log.exception("%s crashed, restarts in %.1f s", name, delay_s)
        await trio.sleep(delay_s)
        delay_s = min(2 * delay_s, MOST_DELAY_S)


def _root_of(error: Exception) -> Exception:
    """The first exception in `error` that is no group."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error
