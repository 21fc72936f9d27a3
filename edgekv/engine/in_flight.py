"""One step in flight: a device that works by itself does not wait for Python.

Runs in: engine thread; owns: the step that the device was given and nobody has read.

    host    plan 1, begin 1, plan 2, begin 2 ... read 1 | report 1, plan 3, begin 3 ... read 2 | report 2, plan 4, ...
    device                [------- step 1 -------][------- step 2 -------][------- step 3 -------]

Step 2 is planned before anybody knows what step 1 samples. So some of its rows turn out to be for nobody, because step
1 ended their sequence, or somebody has meanwhile. Such a row is dropped when step 2 is read, and what it wrote does no
harm: its key and value lie in a slot behind all that its sequence had published, and whoever gets the block next writes
it in a later step. That holds as long as all use of the blocks is in the order of the steps. So before anything else
reads, moves or frees them, the step in flight is settled.

Who proposes tokens has to know all of them. So while proposals pay, steps are done one by one:

    host    propose, plan 1, begin 1, read 1 | report 1, propose, plan 2, begin 2, read 2 | ...
    device                   [--- step 1 ---]                             [--- step 2 ---]
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from edgekv.core.scheduler import Outcome, Scheduler
from edgekv.core.sequence import FinishReason
from edgekv.core.step import StepPlan
from edgekv.engine.memory_errors import is_out_of_memory
from edgekv.engine.protocols import Pending, Pipeline
from edgekv.engine.sample_row import sample_rows
from edgekv.engine.sampler import NonFiniteLogits
from edgekv.engine.shortage import Shortage
from edgekv.engine.speculate import Speculation
from edgekv.engine.usable_rows import usable_rows

NOT_FINITE = "the model's output is not finite"

Clock: TypeAlias = Callable[[], float]


@dataclass(slots=True)
class StepCounts:
    """What `EngineStats` says of steps; all of it only grows."""

    steps: int = 0
    ahead_steps: int = 0
    forward_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Flight:
    plan: StepPlan
    pending: Pending
    is_ahead: bool


class StepsInFlight:
    """Plans steps, hands them to a pipeline and reads them.

    Invariant: between calls at most one step has been begun and not read, and all steps before it are completed.

    Args:
        scheduler: the engine's.
        pipeline: the model on its device.
        shortage: what to do about too little memory.
        counts: where steps are counted.
        speculation: whom to ask for proposals, and to tell what steps took; None: nobody proposes.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        pipeline: Pipeline,
        shortage: Shortage,
        counts: StepCounts,
        speculation: Speculation | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._pipeline = pipeline
        self._shortage = shortage
        self._counts = counts
        self._speculation = speculation
        self._flight: _Flight | None = None
        self._completed_s = -math.inf  # the step before

    @property
    def busy(self) -> bool:
        """Whether a step is in flight."""
        return self._flight is not None

    def advance(self, clock: Clock) -> Outcome:
        """Complete a step, having begun the one after it before, where that can be and nothing is to be proposed."""
        if self._flight is not None and not self._scheduler.still_running(self._flight.plan).chunks:
            self.settle(clock)
        if self._flight is None:
            plan = self._scheduler.plan({} if self._speculation is None else self._speculation.proposals())
            if not plan.chunks:
                return self._shortage.give_up(self._scheduler.hopeless())
            self._counts.steps += 1
            try:
                self._flight = self._begin(plan, None, clock)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                return self._shortage.relieve(plan, clock)
        ahead = self._begin_ahead(self._flight, clock) if self._goes_ahead(self._flight.plan) else None
        return self._complete(self._flight, ahead, clock)

    def settle(self, clock: Clock) -> Outcome:
        """Complete what is in flight, if anything is, and begin nothing."""
        return Outcome() if self._flight is None else self._complete(self._flight, None, clock)

    def _goes_ahead(self, plan: StepPlan) -> bool:
        """Whether the step after this one can do without knowing what it samples."""
        if any(chunk.proposed for chunk in plan.chunks):
            return False  # and whether to propose again depends on what becomes of these
        return self._speculation is None or not self._speculation.wants()

    def _begin(self, plan: StepPlan, after: Pending | None, clock: Clock) -> _Flight:
        rows = sample_rows(plan)
        begun_s = clock()
        pending = self._pipeline.begin(plan, rows, after)
        self._counts.forward_s += clock() - begun_s
        return _Flight(plan, pending, after is not None)

    def _begin_ahead(self, flight: _Flight, clock: Clock) -> _Flight | None:
        plan = self._scheduler.plan_ahead(flight.plan)
        if plan is None:
            return None
        try:
            ahead = self._begin(plan, flight.pending, clock)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return None  # there may be room for one step and not for two
        self._counts.steps += 1
        self._counts.ahead_steps += 1
        return ahead

    def _complete(self, flight: _Flight, ahead: _Flight | None, clock: Clock) -> Outcome:
        self._flight = ahead
        try:
            outcome = self._read(flight)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        else:
            self._shortage.over()
            self._observe(flight, outcome, clock)
            return outcome
        # What the step after it computed, it computed from what was never written.
        if ahead is not None:
            self._forget(ahead)
        plan = self._scheduler.still_running(flight.plan)
        return self._shortage.relieve(plan, clock) if plan.chunks else Outcome()

    def _read(self, flight: _Flight) -> Outcome:
        plan, given_up = flight.plan, Outcome()
        whose = [chunk.sequence for chunk in plan.sampling for _ in range(chunk.sampled)]
        gone = {row for row, sequence in enumerate(whose) if not self._scheduler.runs(sequence)}
        try:
            sampled = flight.pending.result(without=gone)
        except NonFiniteLogits as error:
            usable = usable_rows(plan, set(error.rows) - gone)
            plan, kept = usable.plan, set(usable.rows) - gone
            given_up = Outcome(finished=self._scheduler.give_up(usable.lost, FinishReason.ERROR, NOT_FINITE))
            sampled = flight.pending.result(without=set(range(len(whose))) - kept)
        return given_up.then(self._scheduler.complete(self._scheduler.still_running(plan), sampled))

    def _observe(self, flight: _Flight, outcome: Outcome, clock: Clock) -> None:
        if self._speculation is None:
            return
        now_s = clock()
        # Of one that was begun ahead, what the host does is hidden behind the step before it, for which it had to wait.
        # Of any other it is not, and whoever makes the report knows how long it all took.
        if flight.is_ahead:
            self._speculation.observe(flight.plan, outcome, now_s - self._completed_s)
        else:
            is_alone = not any(chunk.proposed for chunk in flight.plan.chunks)
            self._speculation.observe(flight.plan, outcome, None, is_alone=is_alone)
        self._completed_s = now_s

    def _forget(self, ahead: _Flight) -> None:
        """Wait for a step that was begun in vain, so that the memory which it uses is nobody's any more."""
        self._flight = None
        try:
            ahead.pending.result(without=range(ahead.plan.num_sampled))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
