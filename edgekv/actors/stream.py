"""What one sequence has to say, until its reader takes it. Runs in: trio; owns: the events that have piled up.

The engine pushes and never waits; the reader takes everything that has piled up since it last looked. What can pile
up is bounded by the sequence's own `max_tokens`.
"""

from dataclasses import dataclass
from typing import Protocol, TypeAlias

import trio

from edgekv.core.step import Finished, Started, TokenOut


@dataclass(frozen=True, slots=True)
class Failed:
    """The sequence was lost through no fault of its own (HTTP 503; 429 for kv_cache_full).

    `code` is engine_restarting, device_lost, draining, rejected, or kv_cache_full for one that has waited too long to
    start; `message` is for the person who asked, who may try again after `retry_after_s`.
    """

    code: str
    message: str
    retry_after_s: float = 1.0


StreamEvent: TypeAlias = Started | TokenOut | Finished | Failed


class StreamOwner(Protocol):
    """Who wants to know how a stream fares. Neither call may raise."""

    def started(self, sequence_id: int) -> None:
        """The sequence no longer waits: it was scheduled for the first time."""

    def ended(self, sequence_id: int, *, unfinished: bool) -> None:
        """Called exactly once per stream; `unfinished` when the reader left before the sequence's last event."""


class TokenStream:
    """A coalescing outbox between one sequence and its one reader.

    Invariant: at most one of the events is a `Finished` or `Failed`, nothing follows it, and nothing follows `close`.

        while events := await stream.take():
            for event in events: ...
    """

    def __init__(self, sequence_id: int, owner: StreamOwner | None = None) -> None:
        self.sequence_id = sequence_id
        self._owner = owner
        self._events: list[StreamEvent] = []
        self._wake = trio.Event()
        self._started = False
        self._ended = False

    @property
    def has_started(self) -> bool:
        """Whether the sequence has been scheduled."""
        return self._started

    @property
    def has_ended(self) -> bool:
        """Whether the last event has been pushed or the reader has closed; later events are ignored."""
        return self._ended

    @property
    def backlog(self) -> int:
        """Events pushed and not taken."""
        return len(self._events)

    def push(self, event: StreamEvent) -> None:
        """Add one event for the reader. Never raises, never waits; ignored once the stream has ended."""
        if self._ended:
            return
        self._events.append(event)
        self._wake.set()
        if isinstance(event, Started) and not self._started:
            self._started = True
            if self._owner is not None:
                self._owner.started(self.sequence_id)
        elif isinstance(event, Finished | Failed):
            self._end(unfinished=False)

    async def take(self) -> list[StreamEvent]:
        """Wait for events and return all there are, in order; an empty list means that no more will come.

        A cancelled `take` loses nothing.
        """
        await self._wake.wait()
        events, self._events = self._events, []
        if not self._ended:
            self._wake = trio.Event()
        return events

    def close(self) -> None:
        """The reader has gone: drop what is left, and abort the sequence if it had not finished.

        Idempotent, never raises, never waits: it belongs in a `finally`.
        """
        self._events.clear()
        if not self._ended:
            self._end(unfinished=True)

    def _end(self, *, unfinished: bool) -> None:
        self._ended = True
        self._wake.set()
        if self._owner is not None:
            self._owner.ended(self.sequence_id, unfinished=unfinished)
