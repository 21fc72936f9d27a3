"""The real actors around the real engine on a simulated card, watched by the real guard, all on a mock clock."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial

import trio

from edgekv.actors.admission import Admission, AdmissionLimits
from edgekv.actors.engine import EngineActor, Phase
from edgekv.actors.engine_service import EngineService
from edgekv.actors.kernel import keep_running, supervise
from edgekv.actors.service import MemoryEvent
from edgekv.actors.vram import VramWatch
from edgekv.core.pressure import PressurePolicy
from edgekv.core.spill import Headroom
from edgekv.engine.driver import InlineDriver
from edgekv.smi.reader import Source
from tests.actors.simulated_card import Line, SimulatedCard, SimulatedEngine

UNIX_TIME = 1.8e9


class Guarded:
    """A server without HTTP. `sources`: ways to read, each with the card that it reads; by default one, of `card`."""

    def __init__(
        self,
        card: SimulatedCard,
        sources: Sequence[tuple[Source, SimulatedCard]] | None = None,
        *,
        engine: SimulatedEngine | None = None,
        max_queue: int = 1000,
        max_wait_s: Mapping[int, float] | None = None,
        step_s: float = 0.01,
    ) -> None:
        self.card = card
        self.simulated = engine or SimulatedEngine(card)
        self.admission = Admission(AdmissionLimits(max_queue, max_wait_s or {}))
        self.engine = EngineActor(
            self.simulated.make, partial(InlineDriver, step_s=step_s), on_step=self.admission.observe
        )
        self.policy = PressurePolicy(Headroom.of(card.total_bytes))
        pairs = [(card.source(), card)] if sources is None else list(sources)
        lines = iter([Line(read) for _, read in pairs])
        self.watch = VramWatch(
            self.engine,
            [source for source, _ in pairs],
            self.policy,
            "a simulated card",
            is_busy=lambda: self.admission.num_open > 0,
            unix_time=lambda: UNIX_TIME + trio.current_time(),
            off_loop=lambda: next(lines),
        )
        self.service = EngineService(self.engine, self.admission, self.watch)

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Guarded"]:
        """The engine serves and the card has been read; at the end all is cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(supervise, self.engine)
            nursery.start_soon(keep_running, "the memory guard", self.watch.run)
            nursery.start_soon(self.service.expire)
            await self.engine.status.wait_for(lambda status: status.phase is Phase.SERVING)
            await self.watch.view.wait_for(lambda view: view.reading is not None)
            yield self
            nursery.cancel_scope.cancel()

    @property
    def events(self) -> tuple[MemoryEvent, ...]:
        """What the guard has told."""
        return self.watch.view.value.events

    def told(self, kind: str) -> list[MemoryEvent]:
        """Its events of one kind."""
        return [event for event in self.events if event.kind == kind]
