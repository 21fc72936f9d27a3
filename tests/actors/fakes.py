"""A core without a model, and a rig of the real actors around it."""

import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import trio
import trio._core._run as trio_run
import trio.testing

from edgekv.actors.admission import Admission, AdmissionLimits
from edgekv.actors.engine import EngineActor, EngineStatus, Phase
from edgekv.actors.engine_service import EngineService
from edgekv.actors.kernel import GaveUp, Restarts, supervise
from edgekv.actors.messages import Drain
from edgekv.actors.service import ModelCard, SequenceDraft
from edgekv.actors.stream import Failed, StreamEvent, TokenStream
from edgekv.core.sampling import SamplingParams
from edgekv.core.sequence import FinishReason, SequenceSpec
from edgekv.core.step import EngineStats, Finished, PoolStats, Resize, Sampled, Started, StepReport, TokenOut
from edgekv.engine.driver import Core, InlineDriver, MakeCore, MakeDriver, Progress

T = TypeVar("T")

POOL_BLOCKS, BLOCK_SIZE = 2500, 16
FIRST_TOKEN = 100  # a sequence's n-th token is FIRST_TOKEN + n, so that readers can check the order


class OutOfBlocks(Exception):
    """The pool cannot hold the batch."""


@dataclass
class Work:
    """One sequence in the fake core."""

    spec: SequenceSpec
    produced: int = 0


Forward = Callable[[list[SequenceSpec]], None]


class FakeCore:
    """Gives every sequence one token a step. `forward` is called with the batch and may sleep or raise.

    As the engine does, it preempts the youngest when `forward` is out of blocks and ends a lone one.
    """

    def __init__(self, forward: Forward = lambda batch: None) -> None:
        self.forward = forward
        self.work: dict[int, Work] = {}
        self.submitted: list[int] = []
        self.aborted: list[int] = []
        self.orders: list[Resize] = []
        self.steps = self.generated = 0
        self._ended: list[Finished] = []

    @property
    def busy(self) -> bool:
        return bool(self.work or self._ended)

    def submit(self, spec: SequenceSpec) -> None:
        if any(token < 0 for token in spec.prompt):
            raise ValueError("a token id is not in the vocabulary")
        self.submitted.append(spec.id)
        self.work[spec.id] = Work(spec)

    def abort(self, sequence_id: int, reason: FinishReason = FinishReason.ABORT) -> None:
        if self.work.pop(sequence_id, None) is not None:
            self.aborted.append(sequence_id)
            self._ended.append(Finished(sequence_id, reason))

    def resize(self, order: Resize) -> None:
        self.orders.append(order)

    def step(self) -> StepReport:
        batch = list(self.work.values())
        ended, self._ended = self._ended, []
        started: list[Started] = []
        tokens: list[TokenOut] = []
        while batch:
            try:
                self.forward([work.spec for work in batch])
                break
            except OutOfBlocks:
                youngest = batch.pop()
                if not batch:
                    del self.work[youngest.spec.id]
                    ended.append(Finished(youngest.spec.id, FinishReason.OUT_OF_MEMORY))
        for work in batch:
            if work.produced == 0:
                started.append(Started(work.spec.id, cached_tokens=0))
            tokens.append(TokenOut(work.spec.id, Sampled(FIRST_TOKEN + work.produced)))
            work.produced += 1
            if work.produced == work.spec.sampling.max_tokens:
                del self.work[work.spec.id]
                ended.append(Finished(work.spec.id, FinishReason.LENGTH))
        self.steps += 1
        self.generated += len(tokens)
        return StepReport(self.stats(), tuple(started), tuple(tokens), tuple(ended))

    def stats(self) -> EngineStats:
        active = min(len(self.work), POOL_BLOCKS)
        pool = PoolStats(POOL_BLOCKS, POOL_BLOCKS - active, 0, active, BLOCK_SIZE)
        return EngineStats(
            pool, len(self.work), 0, steps=self.steps, generated_tokens=self.generated, most_blocks=POOL_BLOCKS
        )


def make_card(context_tokens: int = 20_000, pool_tokens: int = POOL_BLOCKS * BLOCK_SIZE) -> ModelCard:
    nothing = cast(Any, None)
    model_tokens = 1 << 20
    return ModelCard(
        "demo", ("default",), 0, context_tokens, model_tokens, pool_tokens, BLOCK_SIZE, nothing, nothing, nothing,
        most_pool_tokens=pool_tokens,
    )  # fmt: skip


def make_draft(max_tokens: int = 5, prompt_tokens: int = 4, priority: int = 0) -> SequenceDraft:
    return SequenceDraft(tuple(range(prompt_tokens)), SamplingParams(max_tokens=max_tokens), priority)


def makes(*cores: FakeCore | Exception) -> MakeCore[ModelCard]:
    """A `make_core` that hands out `cores` one after the other and then its last for ever; it raises an exception."""
    left = list(cores)

    def make_core(progress: Progress) -> tuple[Core, ModelCard]:
        progress(50, 100, "weights")
        core = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(core, Exception):
            raise core
        progress(100, 100, "weights")
        return core, make_card()

    return make_core


@dataclass
class Rig:
    """The real actors around fake cores."""

    make_core: MakeCore[ModelCard]
    make_driver: MakeDriver = InlineDriver
    max_queue: int = 1000
    max_wait_s: dict[int, float] = field(default_factory=dict)
    restarts: Restarts = Restarts(first_delay_s=0.05)  # noqa: RUF009 - frozen
    capacity: int = 256
    gave_up: GaveUp | None = None
    admission: Admission = field(init=False)
    engine: EngineActor = field(init=False)
    service: EngineService = field(init=False)

    def __post_init__(self) -> None:
        self.admission = Admission(AdmissionLimits(self.max_queue, self.max_wait_s))
        self.engine = EngineActor(
            self.make_core, self.make_driver, capacity=self.capacity, on_step=self.admission.observe
        )
        self.service = EngineService(self.engine, self.admission)

    async def run(self) -> None:
        await trio.lowlevel.checkpoint()
        try:
            await supervise(self.engine, self.restarts)
        except GaveUp as error:
            self.gave_up = error

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Rig"]:
        """The engine serves; at the end it is cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.run)
            nursery.start_soon(self.service.expire)
            await self.reach(Phase.SERVING)
            yield self
            nursery.cancel_scope.cancel()

    async def reach(self, phase: Phase) -> EngineStatus:
        """Wait for the engine to be in `phase`."""
        with trio.fail_after(10):
            return await self.engine.status.wait_for(lambda status: status.phase is phase)

    def drain(self, grace_s: float) -> None:
        self.engine.insist(Drain(grace_s))


async def read_all(stream: TokenStream, within_s: float = 10) -> list[StreamEvent]:
    """Every event until the end, which has to come."""
    events: list[StreamEvent] = []
    with trio.fail_after(within_s):
        while taken := await stream.take():
            events += taken
    return events


def token_ids(events: list[StreamEvent]) -> list[int]:
    return [event.sampled.token_id for event in events if isinstance(event, TokenOut)]


def check_whole(events: list[StreamEvent], max_tokens: int) -> Finished | Failed:
    """A stream that was read to its end says: started, its tokens in order, then one last word, which is returned."""
    last = events[-1]
    assert isinstance(last, Finished | Failed)
    assert not any(isinstance(event, Finished | Failed) for event in events[:-1])
    tokens = token_ids(events)
    assert tokens == list(range(FIRST_TOKEN, FIRST_TOKEN + len(tokens)))
    if tokens:
        assert [index for index, event in enumerate(events) if isinstance(event, Started)] == [0]
    if isinstance(last, Finished) and last.reason is FinishReason.LENGTH:
        assert len(tokens) == max_tokens
    return last


def slow(seconds: float = 0.001) -> Forward:
    """A forward pass that takes time, for real threads."""
    return lambda batch: time.sleep(seconds)


def run_seeded(seed: int, scenario: Callable[[random.Random], Awaitable[T]]) -> T:
    """Run `scenario` on a mock clock, with every choice of trio's scheduler and of the scenario drawn from `seed`."""
    before = trio_run._ALLOW_DETERMINISTIC_SCHEDULING
    trio_run._ALLOW_DETERMINISTIC_SCHEDULING = True
    trio_run._r.seed(seed)
    try:
        return trio.run(scenario, random.Random(seed), clock=trio.testing.MockClock(autojump_threshold=0))
    finally:
        trio_run._ALLOW_DETERMINISTIC_SCHEDULING = before
