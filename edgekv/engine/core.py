"""One model's engine, synchronous: plan, forward, report.

Runs in: engine thread (or inline in tests); owns: the scheduler and, through the runner, the device memory.
"""

import time
from collections.abc import Callable

from torch import Tensor

from edgekv.core.scheduler import Outcome, Scheduler
from edgekv.core.sequence import FinishReason, SequenceSpec
from edgekv.core.speculation import Controller
from edgekv.core.step import EngineStats, Finished, MemoryStats, Resize, StepPlan, StepReport
from edgekv.engine.in_flight import NOT_FINITE, StepCounts, StepsInFlight
from edgekv.engine.memory_errors import is_out_of_memory
from edgekv.engine.proposer import Proposer
from edgekv.engine.protocols import Chooser, ElasticPool, Forward, Pins, Pipeline
from edgekv.engine.sample_row import sample_rows
from edgekv.engine.sampler import NonFiniteLogits, check_params
from edgekv.engine.shortage import GUARD_S, POOL_SHARE_GIVEN_BACK, Shortage
from edgekv.engine.speculate import Speculation
from edgekv.engine.usable_rows import usable_rows

__all__ = ["GUARD_S", "POOL_SHARE_GIVEN_BACK", "Chooser", "ElasticPool", "EngineCore", "Forward", "Pins"]


class EngineCore:
    """Schedule, run, sample, report. Every accepted sequence ends in exactly one `Finished`, unless it is aborted.

    Args:
        scheduler: sequences and block tables.
        runner: the model over the KV pool.
        sampler: chooses tokens from logits.
        vocab_size: token ids at or above it are refused.
        pool: what gives memory back and takes some; None for a pool of fixed size.
        clock: seconds, for pins that end and for reasons that say how long ago something was.
        pipeline: what runs and samples steps on a device that works by itself; then `runner` and `sampler` are not
            used, and while the core is busy a step may be in flight.
        proposer: guesses next tokens, which steps verify.
        controller: how many of these are worth their time; None: as many as there is room for.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Forward,
        sampler: Chooser,
        vocab_size: int,
        pool: ElasticPool | None = None,
        clock: Callable[[], float] = time.monotonic,
        pipeline: Pipeline | None = None,
        proposer: Proposer | None = None,
        controller: Controller | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.sampler = sampler
        self.vocab_size = vocab_size
        self.pool = pool
        self.clock = clock
        self.proposer = proposer
        self._pins: Pins | None = None
        self._counts = StepCounts()
        self._speculation: Speculation | None = None
        if proposer is not None:
            self._speculation = Speculation(scheduler, proposer, controller, lambda: self.clock())
        self._shortage = Shortage(scheduler, pool, self._speculation)
        self._in_flight: StepsInFlight | None = None
        if pipeline is not None:
            self._in_flight = StepsInFlight(scheduler, pipeline, self._shortage, self._counts, self._speculation)
        self._settled = Outcome()
        self._refused: list[Finished] = []
        self._has_news = False
        self._held = self._resized = False
        self._num_resizes = 0
        self._memory_stats: MemoryStats | None = None
        self._memory_as_of: tuple[int, int, int, bool] | None = None

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do or to say; while steps are held there is only something to say."""
        has_news = self._has_news or bool(self._refused) or self._settled != Outcome()
        in_flight = self._in_flight is not None and self._in_flight.busy
        return has_news or in_flight or (self.scheduler.busy and not self._held)

    def keep(self, pins: Pins) -> None:
        """Look after these pins from now on."""
        self._pins = pins

    def submit(self, spec: SequenceSpec) -> None:
        """Queue a sequence.

        One that can never run is reported as finished with an error, never raised: it must not hurt the others.
        """
        try:
            if not all(0 <= token < self.vocab_size for token in spec.prompt):
                raise ValueError(f"a prompt token id is outside the vocabulary of {self.vocab_size}")
            check_params(spec.sampling, self.vocab_size)
            self.scheduler.submit(spec)
        except ValueError as error:
            self._refused.append(Finished(spec.id, FinishReason.ERROR, str(error)))

    def abort(self, sequence_id: int, reason: FinishReason = FinishReason.ABORT) -> None:
        """End a sequence now; its blocks are free when this returns. Nothing happens if it has ended already.

        The next step has at least that to report: the blocks in use and the sequences running are fewer. Nothing of the
        sequence is reported any more.
        """
        self._settled = self._settled.without(sequence_id)
        self._has_news |= self.scheduler.abort(sequence_id)
        self._forget([sequence_id])

    def settle(self) -> None:
        """Wait for the step in flight, if there is one: nothing uses the device then, until the next step.

        To be called before anything but a step touches the pool's memory. The next step reports what came of it.
        """
        if self._in_flight is not None:
            self._settled = self._settled.then(self._in_flight.settle(self.clock))

    def resize(self, order: Resize) -> None:
        """Give memory back or take some, now; between steps only.

        For others' need the pool shrinks below what it has promised: sequences wait for it to grow again. The next
        step reports what came of an order that shrinks, grows, or changes whether steps are held.
        """
        self._shortage.guarded()
        if order.shrink_bytes or order.hold:
            self._shortage.over()
        resizes = bool(order.shrink_bytes or order.grow_bytes)
        self._resized |= resizes
        self._has_news |= resizes or order.hold != self._held
        self._held = order.hold
        self._tell_time()
        if resizes or order.hold:
            self.settle()
        self._num_resizes += resizes
        if self.pool is None:
            return
        self.pool.set_budget(order.budget_bytes)
        if order.shrink_bytes:
            # Steps are held when memory of ours is not where it should be; then it matters which segments go.
            self.pool.shrink(self.scheduler, order.shrink_bytes, keep_promises=False, slow_first=order.hold)
        if order.grow_bytes:
            self.pool.grow(order.grow_bytes)

    def stats(self) -> EngineStats:
        """Counts as of now."""
        counters, cache = self.scheduler.counters, self.scheduler.cache
        return EngineStats(
            pool=cache.pool.stats(),
            running=self.scheduler.num_running,
            waiting=self.scheduler.num_waiting,
            steps=self._counts.steps,
            forward_s=self._counts.forward_s,
            prompt_tokens=counters.prompt_tokens,
            computed_prompt_tokens=counters.computed_prompt_tokens,
            cached_prompt_tokens=counters.cached_prompt_tokens,
            generated_tokens=counters.generated_tokens,
            proposed_tokens=counters.proposed_tokens,
            accepted_tokens=counters.accepted_tokens,
            preemptions=counters.preemptions,
            evictions=cache.prefix.evictions if cache.prefix is not None else 0,
            misses=dict(self.scheduler.misses),
            memory=self._memory(),
            most_blocks=cache.pool.most_blocks,
            pinned_blocks=cache.pinned_blocks,
            ahead_steps=self._counts.ahead_steps,
            speculation=None if self._speculation is None else self._speculation.stats(),
        )

    def step(self) -> StepReport:
        """Run one step; while steps are held, and right after a resize, only report.

        Out of memory in it, the next call tries again with one sequence less, or, where there was only one, with a
        pool smaller by POOL_SHARE_GIVEN_BACK; under a memory guard not before that has had its chance. A sequence for
        which neither is possible ends.
        """
        begun_s = self.clock()
        refused, self._refused, self._has_news = tuple(self._refused), [], False
        outcome, self._settled = self._settled, Outcome()
        self._tell_time()
        # Whoever ordered a resize waits to hear of it, and a step may take long.
        resized, self._resized = self._resized, False
        if not (self._held or resized):
            outcome = outcome.then(self._advance() if self._in_flight is None else self._in_flight.advance(self.clock))
        self._forget([last.sequence_id for last in outcome.finished])
        report = StepReport(
            stats=self.stats(),
            started=self.scheduler.take_started(),
            tokens=outcome.tokens,
            finished=refused + outcome.finished,
        )
        if self._speculation is not None:
            self._speculation.took(self.clock() - begun_s)
        return report

    def _tell_time(self) -> None:
        now_s = self.clock()
        self.scheduler.cache.tell_time(now_s)
        if self._pins is not None:
            self._pins.observe(now_s, lambda: self.scheduler.spare_blocks)

    def _advance(self) -> Outcome:
        plan = self.scheduler.plan(self._speculation.proposals() if self._speculation is not None else {})
        if not plan.chunks:
            return self._shortage.give_up(self.scheduler.hopeless())
        self._counts.steps += 1
        try:
            begun_s = self.clock()
            logits = self.runner.forward(plan)
            self._counts.forward_s += self.clock() - begun_s
            outcome = self._choose(plan, logits)
            if self._speculation is not None:
                self._speculation.observe(plan, outcome, None)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        else:
            self._shortage.over()
            return outcome
        return self._shortage.relieve(plan, self.clock)

    def _choose(self, plan: StepPlan, logits: Tensor) -> Outcome:
        rows = sample_rows(plan)
        try:
            return self.scheduler.complete(plan, self.sampler.sample(logits, rows) if rows else [])
        except NonFiniteLogits as error:
            usable = usable_rows(plan, error.rows)
        kept = list(usable.rows)
        finished = self.scheduler.give_up(usable.lost, FinishReason.ERROR, NOT_FINITE)
        chosen = self.sampler.sample(logits[kept], [rows[row] for row in kept]) if kept else []
        return Outcome(finished=finished).then(self.scheduler.complete(usable.plan, chosen))

    def _forget(self, sequence_ids: list[int]) -> None:
        if self._speculation is not None:
            self._speculation.forget(sequence_ids)

    def _memory(self) -> MemoryStats | None:
        if self.pool is None:
            return None
        # It changes seldom, and is asked for at every step.
        as_of = self.pool.version, self.scheduler.cache.pinned_blocks, self._num_resizes, self._held
        if self._memory_stats is None or self._memory_as_of != as_of:
            self._memory_stats = self.pool.memory(self.scheduler, num_resizes=self._num_resizes, held=self._held)
            self._memory_as_of = as_of
        return self._memory_stats
