"""One source of readings, kept open and asked off the loop.

Runs in: trio (what may block: in a thread); owns: the open reader.

A source has one thread at most. A call that hangs occupies that, and nothing else: nobody waits for it past a deadline,
other sources are asked meanwhile, and once it comes back the source is good again.
"""

import logging
from collections.abc import Callable
from typing import Protocol, TypeVar

import trio

from edgekv.core.reading import Reading
from edgekv.smi.reader import Reader, ReadingFailed, Source

log = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_DELAY_S, MOST_DELAY_S = 0.5, 10.0
CLOSE_S = 0.5


class OffLoop(Protocol):
    """Runs calls that may block, one after the other."""

    async def __call__(self, call: Callable[[], T]) -> T:
        """The call's result, or its exception. Cancelled, it leaves the call alone, and the next waits for that."""
        ...


class InThread:
    """`OffLoop` for calls into a driver."""

    def __init__(self) -> None:
        self._limiter = trio.CapacityLimiter(1)

    async def __call__(self, call: Callable[[], T]) -> T:
        """See `OffLoop`."""
        return await trio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=self._limiter)


class Feed:
    """A source that is opened again, with back-off, whenever it has failed.

    `problem` says in one line why it gives no readings at the moment. `changed` is called when it may have some again.
    """

    def __init__(self, source: Source, off_loop: OffLoop, changed: Callable[[], None]) -> None:
        self.name = source.name
        self.problem: str | None = "is being opened"
        self._open = source.open
        self._off_loop = off_loop
        self._changed = changed
        self._reader: Reader | None = None
        self._hangs = False
        self._trouble = trio.Event()
        self._delay_s = FIRST_DELAY_S

    @property
    def is_ready(self) -> bool:
        """Whether it can be asked."""
        return self._reader is not None and not self._hangs

    @property
    def _is_open(self) -> bool:
        return self._reader is not None

    async def run(self) -> None:
        """Keep the source open until cancelled."""
        try:
            while True:
                await self._keep_open()
                await trio.sleep(self._delay_s)
                self._delay_s = min(2 * self._delay_s, MOST_DELAY_S)
        finally:
            reader, self._reader = self._reader, None
            if reader is not None and not self._hangs:
                with trio.move_on_after(CLOSE_S, shield=True):
                    await self._off_loop(reader.close)

    async def read(self, at: float, deadline_s: float) -> Reading | None:
        """What the device says now; None where it does not say it within `deadline_s`, and `problem` says why."""
        reader = self._reader
        if reader is None or self._hangs:
            return None
        try:
            with trio.move_on_after(deadline_s):
                reading = _possible(await self._off_loop(lambda: reader.read(at)))
                self.problem, self._delay_s = None, FIRST_DELAY_S
                return reading
        except Exception as error:
            self._fail(error)
        else:
            self.problem, self._hangs = f"has not answered for {deadline_s:.2f} s", True
        self._trouble.set()
        return None

    async def _keep_open(self) -> None:
        try:
            reader = await self._off_loop(self._open)
        except Exception as error:
            self._fail(error)
            return
        self._reader, self.problem = reader, None
        while self._is_open:
            self._trouble = trio.Event()
            self._changed()
            await self._trouble.wait()
            if self._hangs:
                await self._off_loop(lambda: None)  # returns as soon as the call that hangs does
                self._hangs = False
        await self._off_loop(reader.close)

    def _fail(self, error: Exception) -> None:
        self._reader = None
        self.problem = " ".join(str(error).split()) or type(error).__name__
        if not isinstance(error, ReadingFailed):
            log.warning("%s: a reading failed as no reading should", self.name, exc_info=error)


def _possible(reading: Reading) -> Reading:
    """A driver in trouble may answer with zeros: then it is as good as none. Raises ReadingFailed."""
    least = min(reading.used_bytes, reading.own_bytes or 0, reading.spilled_own_bytes)
    if reading.total_bytes <= 0 or least < 0:
        raise ReadingFailed(f"says what cannot be: {least:,} bytes of {reading.total_bytes:,}")
    return reading
