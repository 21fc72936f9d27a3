"""`Service` with one engine behind it. Runs in: trio; owns: the sequence ids, and the time for which they may wait."""

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import NoReturn

import trio

from edgekv.actors.admission import RETRY_BOUNDS_S, Admission, Claim
from edgekv.actors.engine import EngineActor, EngineStatus, Phase
from edgekv.actors.fault import DRAINING, GAVE_UP
from edgekv.actors.kernel import ActorGone, MailboxFull
from edgekv.actors.messages import Abort, Expire, Submit
from edgekv.actors.service import Health, MemoryView, ModelCard, SequenceDraft
from edgekv.actors.stream import TokenStream
from edgekv.actors.vram import VramWatch
from edgekv.core.step import EngineStats
from edgekv.errors import NotServing

UNKNOWN_LOAD_S = 5.0
"""What a client is told to wait while nothing is known about how long the loading takes."""


class EngineService:
    """What the HTTP side holds: admits requests, hands them to the engine's actor, and keeps count of their streams."""

    def __init__(self, engine: EngineActor, admission: Admission, watch: VramWatch | None = None) -> None:
        self._engine = engine
        self._admission = admission
        self._watch = watch
        self._ids = count(1)
        self._admitted = trio.Event()

    def card(self) -> ModelCard:
        """See `Service.card`; while the engine restarts the model is still the same."""
        status = self._engine.status.value
        if status.card is None:
            _refuse(status)
        return self._as_it_is(status.card)

    async def open(self, drafts: Sequence[SequenceDraft]) -> list[TokenStream]:
        """See `Service.open`."""
        if not drafts:
            raise ValueError("no drafts to open")
        # The only place where it can be cancelled: nothing has been admitted yet.
        await trio.lowlevel.checkpoint()
        status = self._engine.status.value
        if status.phase is not Phase.SERVING or status.card is None:
            _refuse(status)
        specs = [draft.with_id(next(self._ids)) for draft in drafts]
        ids = [spec.id for spec in specs]
        claims = [Claim(spec.id, len(spec.prompt), spec.sampling.max_tokens, spec.priority) for spec in specs]
        was_idle = not self._admission.num_open
        self._admission.admit(claims, self._as_it_is(status.card), self._engine.stats.value, self.memory())
        self._admitted.set()
        if was_idle and self._watch is not None:
            self._watch.wake()
        streams = [TokenStream(sequence_id, self) for sequence_id in ids]
        try:
            self._engine.post(Submit(tuple(zip(specs, streams, strict=True))))
        except MailboxFull:
            self._admission.release_all(ids)
            raise NotServing("overloaded", "Too many requests arrived at once; please try again.") from None
        except ActorGone:
            self._admission.release_all(ids)
            _refuse(self._engine.status.value)
        return streams

    def _as_it_is(self, card: ModelCard) -> ModelCard:
        """The card with the pool's present size: it may have shrunk since the model was loaded.

        Pinned blocks are not counted: a sequence that begins with them could have more, and is not promised it.
        """
        stats = self._engine.stats.value
        if stats is None:
            return card
        size, pinned = stats.pool.block_size, stats.pinned_blocks
        return replace(
            card,
            pool_tokens=max(0, stats.pool.total_blocks - pinned) * size,
            most_pool_tokens=max(0, stats.most_blocks - pinned) * size,
        )

    def stats(self) -> EngineStats | None:
        """See `Service.stats`."""
        return self._engine.stats.value

    def health(self) -> Health:
        """See `Service.health`; the words are for everybody, so there are no paths and no tracebacks in them."""
        status = self._engine.status.value
        match status.phase:
            case Phase.SERVING if self._watch is not None and self._watch.is_blind:
                return Health("degraded", "the device's memory cannot be read; requests are served as before")
            case Phase.SERVING:
                return Health("ok")
            case Phase.LOADING:
                return Health("loading", _loading(status))
            case Phase.RESTARTING:
                return Health("loading", "the engine crashed and is being restarted")
            case Phase.DRAINING:
                return Health("draining", DRAINING.message)
            case Phase.FAILED:
                return Health("failed", (status.failure or GAVE_UP).message)

    def memory(self) -> MemoryView | None:
        """See `Service.memory`."""
        return None if self._watch is None else self._watch.latest()

    async def expire(self) -> None:
        """Refuse those who have waited too long to start, for as long as the server runs."""
        while True:
            self._admitted = trio.Event()
            with trio.move_on_at(self._admission.next_deadline):
                await self._admitted.wait()
            for sequence_id, told in self._admission.take_overdue():
                with contextlib.suppress(ActorGone):
                    self._engine.insist(Expire(sequence_id, told))

    # ---- StreamOwner

    def started(self, sequence_id: int) -> None:
        """See `StreamOwner.started`."""
        self._admission.started(sequence_id)

    def ended(self, sequence_id: int, *, unfinished: bool) -> None:
        """See `StreamOwner.ended`."""
        self._admission.release(sequence_id)
        if unfinished:
            # An actor that is gone has taken its sequences with it.
            with contextlib.suppress(ActorGone):
                self._engine.insist(Abort(sequence_id))


def _refuse(status: EngineStatus) -> NoReturn:
    match status.phase:
        case Phase.LOADING | Phase.SERVING:
            raise NotServing("model_loading", f"The model is not ready: {_loading(status)}.", _load_s(status))
        case Phase.RESTARTING:
            raise NotServing("engine_restarting", "The engine crashed and is being restarted.", UNKNOWN_LOAD_S)
        case Phase.DRAINING:
            raise NotServing(DRAINING.code, DRAINING.message, UNKNOWN_LOAD_S)
        case Phase.FAILED:
            failure = status.failure or GAVE_UP
            raise NotServing(failure.code, failure.message, RETRY_BOUNDS_S[1])


def _loading(status: EngineStatus) -> str:
    progress = status.progress
    if progress is None:
        return "loading"
    if progress.total_bytes <= 0:
        return progress.stage or "loading"
    return f"{progress.stage}, {100 * progress.done_bytes // progress.total_bytes} % of {progress.total_bytes:,} bytes"


def _load_s(status: EngineStatus) -> float:
    """What is left of the loading at the rate so far."""
    progress = status.progress
    if progress is None or progress.done_bytes <= 0:
        return UNKNOWN_LOAD_S
    elapsed_s = trio.current_time() - status.since
    least, most = RETRY_BOUNDS_S
    left_s = elapsed_s * max(progress.total_bytes - progress.done_bytes, 0) / progress.done_bytes
    return min(most, max(least, left_s))
