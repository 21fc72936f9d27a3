"""The actor that stands between the requests and one engine. Runs in: trio; owns: the open streams and the driver."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from enum import Enum, auto
from itertools import chain
from typing import TypeAlias

import trio

from edgekv.actors.fault import DRAINING, GAVE_UP, judge
from edgekv.actors.kernel import Actor
from edgekv.actors.latest import Latest
from edgekv.actors.messages import Abort, Drain, Expire, Submit
from edgekv.actors.service import ModelCard
from edgekv.actors.stream import Failed, TokenStream
from edgekv.core.sequence import FinishReason, SequenceSpec
from edgekv.core.step import EngineStats, Finished, Resize, Started, StepReport, TokenOut
from edgekv.engine.driver import Command, Driver, LoadProgress, MakeCore, MakeDriver, Rejected, ThreadDriver

EngineMessage: TypeAlias = Submit | Abort | Expire | Resize | Drain

STOP_S = 5.0
"""How long a driver may take to come back from the step it is in."""


class EngineCrashed(Exception):
    """The engine's thread was ended by something that is no `Exception`."""


class Phase(Enum):
    """What the engine is doing, as a whole. Only FAILED follows DRAINING, and nothing follows FAILED."""

    LOADING = auto()
    SERVING = auto()
    RESTARTING = auto()
    DRAINING = auto()
    FAILED = auto()


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """The engine's phase and since when (trio's clock), with a sentence for the log where there is something to say.

    `card` stays once it is known; `progress` is of the latest loading; `failure` is what FAILED means for a request.
    """

    phase: Phase = Phase.LOADING
    since: float = 0.0
    detail: str = ""
    progress: LoadProgress | None = None
    card: ModelCard | None = None
    failure: Failed | None = None


class EngineActor(Actor[EngineMessage]):
    """Hands sequences to the engine, and to each sequence's stream what the engine has to say about it.

    Invariant: every stream of a received `Submit` is in `_streams` until its last event was pushed or its reader closed
    it. However a life ends, the streams still there are told so; a `Submit` still in the mailbox waits for the next.
    """

    def __init__(
        self,
        make_core: MakeCore[ModelCard],
        make_driver: MakeDriver = ThreadDriver,
        *,
        name: str = "engine",
        capacity: int = 256,
        on_step: Callable[[StepReport], None] = lambda report: None,
    ) -> None:
        super().__init__(name, capacity)
        self.status = Latest(EngineStatus())
        self.stats: Latest[EngineStats | None] = Latest(None)
        self.is_stuck = False
        self._make_core = make_core
        self._make_driver = make_driver
        self._on_step = on_step
        self._streams: dict[int, TokenStream] = {}
        self._driver: Driver | None = None
        self._is_ready = False
        self._fault: Exception | None = None
        self._faulted = trio.Event()
        self._grace_s: float | None = None
        self._drain_asked = trio.Event()
        self._drained = trio.Event()

    # ---- a life

    def living(self) -> AbstractAsyncContextManager[None]:
        """A driver for as long as the life lasts; a fault ends it, and is raised."""
        return self._live()

    @asynccontextmanager
    async def _live(self) -> AsyncIterator[None]:
        self._is_ready, self._fault, self._faulted = False, None, trio.Event()
        self._enter(Phase.LOADING, progress=None)
        last_words = DRAINING
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._end_by_fault, nursery.cancel_scope)
                nursery.start_soon(self._end_by_drain, nursery.cancel_scope)
                self._driver = self._make_driver(self._make_core, self, nursery)
                try:
                    yield
                finally:
                    self.is_stuck = True
                    with trio.move_on_after(STOP_S, shield=True):
                        await self._driver.aclose()
                        self.is_stuck = False
                    nursery.cancel_scope.cancel()
            if self._fault is not None:
                raise self._fault
        except Exception as error:
            last_words = judge(error, loading=not self._is_ready).told
            raise
        finally:
            self._driver = None
            self._end_all(lambda stream: last_words)

    async def _end_by_fault(self, life: trio.CancelScope) -> None:
        await self._faulted.wait()
        life.cancel()

    async def _end_by_drain(self, life: trio.CancelScope) -> None:
        await self._drain_asked.wait()
        with trio.move_on_after(self._grace_s or 0.0):
            await self._drained.wait()
        # A stream that has said something ends like any other, so that its reader can finish its answer.
        self._end_all(
            lambda stream: (
                Finished(stream.sequence_id, FinishReason.ABORT, "the server is shutting down")
                if stream.has_started
                else DRAINING
            )
        )
        life.cancel()

    # ---- the mailbox

    def receive(self, message: EngineMessage) -> None:
        """See `messages`."""
        match message:
            case Submit(pairs):
                # A reader may have left, and closed its stream, while the message was in the mailbox.
                wanted = [(spec, stream) for spec, stream in pairs if not stream.has_ended]
                self._streams.update((spec.id, stream) for spec, stream in wanted)
                if self._grace_s is None:
                    for spec, _ in wanted:
                        self._submit(spec)
                else:
                    for _, stream in wanted:
                        self._end(stream, DRAINING)
            case Abort(sequence_id, reason):
                if self._streams.pop(sequence_id, None) is not None:
                    self._send(lambda core: core.abort(sequence_id, reason))
                    self._note_drained()
            case Expire(sequence_id, told):
                late = self._streams.get(sequence_id)
                if late is not None and not late.has_started:
                    self._send(lambda core: core.abort(sequence_id))
                    self._end(late, told)
            case Resize():
                # One from before this engine was there speaks of the memory of another.
                if self._is_ready:
                    self._send(lambda core: core.resize(message))
            case Drain(grace_s):
                self._grace_s = grace_s
                self._enter(Phase.DRAINING)
                self._drain_asked.set()
                self._note_drained()

    def unheard(self, message: EngineMessage) -> None:
        """The sequences of a `Submit` that came too late are told so."""
        if isinstance(message, Submit):
            for _, stream in message.pairs:
                stream.push(self.status.value.failure or DRAINING)

    def close(self) -> None:
        """The end of the last life."""
        super().close()
        self._enter(Phase.DRAINING)

    # ---- supervision

    def is_fatal(self, error: Exception) -> bool:
        """A stuck thread still holds the device, and a draining engine has nothing left to live for."""
        return self.is_stuck or self._grace_s is not None or judge(error, loading=not self._is_ready).fatal

    def crashed(self, error: Exception, restart_in_s: float | None) -> None:
        """Publish what became of the engine."""
        detail = str(error) or type(error).__name__
        if restart_in_s is not None:
            self._enter(Phase.RESTARTING, detail=detail)
        else:
            verdict = judge(error, loading=not self._is_ready)
            self._enter(Phase.FAILED, detail=detail, failure=verdict.told if verdict.fatal else GAVE_UP)

    # ---- the driver's listener: called in trio between our own tasks' turns

    def on_progress(self, progress: LoadProgress) -> None:
        """See `Listener`."""
        self.status.set(replace(self.status.value, progress=progress))

    def on_ready(self, facts: ModelCard, stats: EngineStats) -> None:
        """See `Listener`."""
        self._is_ready = True
        self.stats.set(stats)
        self._enter(Phase.SERVING, card=facts)

    def on_report(self, report: StepReport) -> None:
        """Give each event to its stream; those of aborted sequences find none."""
        self.stats.set(report.stats)
        self._on_step(report)
        spoken: chain[Started | TokenOut] = chain(report.started, report.tokens)
        for event in spoken:
            if (stream := self._streams.get(event.sequence_id)) is not None:
                stream.push(event)
        for last in report.finished:
            if (stream := self._streams.get(last.sequence_id)) is not None:
                self._end(stream, last)

    def on_fault(self, error: BaseException) -> None:
        """See `Listener`."""
        self._fault = error if isinstance(error, Exception) else EngineCrashed(repr(error))
        self._faulted.set()

    # ---- streams

    def _submit(self, spec: SequenceSpec) -> None:
        def rejected(error: Exception) -> None:
            if (stream := self._streams.get(spec.id)) is not None:
                self._end(stream, Failed("rejected", str(error)))

        self._send(lambda core: core.submit(spec), rejected)

    def _send(self, command: Command, rejected: Rejected | None = None) -> None:
        assert self._driver is not None, "messages are received only within a life"
        self._driver.send(command, rejected)

    def _end(self, stream: TokenStream, event: Finished | Failed) -> None:
        self._streams.pop(stream.sequence_id, None)
        stream.push(event)
        self._note_drained()

    def _end_all(self, last_event: Callable[[TokenStream], Finished | Failed]) -> None:
        for stream in list(self._streams.values()):
            self._end(stream, last_event(stream))

    def _note_drained(self) -> None:
        if self._grace_s is not None and not self._streams:
            self._drained.set()

    # ---- status

    def _enter(self, phase: Phase, **changes: object) -> None:
        status = self.status.value
        if status.phase is Phase.FAILED or (status.phase is Phase.DRAINING and phase is not Phase.FAILED):
            return
        changed = replace(status, phase=phase, since=trio.current_time(), detail="")
        self.status.set(replace(changed, **changes))  # type: ignore[arg-type]
