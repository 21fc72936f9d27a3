"""One model's engine, synchronous: plan, forward, report.

Runs in: engine thread (or inline in tests); owns: the scheduler and, through the runner, the device memory.
"""

import time
from collections.abc import Callable
from collections.abc import Sequence as Listing
from dataclasses import replace
from typing import Protocol

from torch import Tensor

from edgekv.core.scheduler import Outcome, Scheduler
from edgekv.core.sequence import FinishReason, SequenceSpec
from edgekv.core.step import EngineStats, Finished, MemoryStats, Resize, Sampled, StepPlan, StepReport
from edgekv.engine.sampler import NonFiniteLogits, SampleRow, check_params
from edgekv.engine.segment_memory import is_out_of_memory

POOL_SHARE_GIVEN_BACK = 0.1
GUARD_S = 1.0  # for the memory guard to see that others took memory: several of its periods


class Forward(Protocol):
    """Runs a planned step through the model."""

    def forward(self, plan: StepPlan) -> Tensor:  # [chunks that sample, vocab] float32
        """Logits of each sampling chunk's last token, in the plan's order."""
        ...


class Chooser(Protocol):
    """Chooses the next tokens."""

    def sample(self, logits: Tensor, rows: list[SampleRow]) -> list[Sampled]:
        """One token for each row. Raises NonFiniteLogits naming the rows that have no usable distribution."""
        ...


class ElasticPool(Protocol):
    """A pool that can give memory back and take some; `Segments` is one, and says more of each."""

    @property
    def num_bytes(self) -> int:
        """Bytes that it has."""
        ...

    def shrink(self, scheduler: Scheduler, num_bytes: int, *, keep_promises: bool, slow_first: bool = False) -> int:
        """Give back at least `num_bytes`, or what can be; the bytes given back."""
        ...

    def grow(self, num_bytes: int) -> object:
        """Take at most `num_bytes`."""
        ...

    def stay_small(self) -> None:
        """Never grow beyond what it has now."""
        ...

    def set_budget(self, num_bytes: int) -> None:
        """The most that may be leased in all from now on."""
        ...

    def memory(self, scheduler: Scheduler, *, num_resizes: int, held: bool) -> MemoryStats:
        """Where the device's memory is."""
        ...


class Pins(Protocol):
    """What is kept in the prefix cache by name; `PinnedPrefixes` is one."""

    def observe(self, now_s: float, spare_blocks: Callable[[], int]) -> None:
        """The present: some pins may end with it, others come back into as many blocks as `spare_blocks` says."""
        ...


class EngineCore:
    """Schedule, run, sample, report. Every accepted sequence ends in exactly one `Finished`, unless it is aborted.

    Args:
        scheduler: sequences and block tables.
        runner: the model over the KV pool.
        sampler: chooses tokens from logits.
        vocab_size: token ids at or above it are refused.
        pool: what gives memory back and takes some; None for a pool of fixed size.
        clock: seconds, for pins that end and for reasons that say how long ago something was.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Forward,
        sampler: Chooser,
        vocab_size: int,
        pool: ElasticPool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.sampler = sampler
        self.vocab_size = vocab_size
        self.pool = pool
        self.clock = clock
        self._pins: Pins | None = None
        self._steps = 0
        self._forward_s = 0.0
        self._refused: list[Finished] = []
        self._has_news = False
        self._held = self._resized = False
        self._num_resizes = 0
        self._is_guarded = False
        self._full_since_s: float | None = None

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do or to say; while steps are held there is only something to say."""
        return self._has_news or bool(self._refused) or (self.scheduler.busy and not self._held)

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

        The next step has at least that to report: the blocks in use and the sequences running are fewer.
        """
        self._has_news |= self.scheduler.abort(sequence_id)

    def resize(self, order: Resize) -> None:
        """Give memory back or take some, now; between steps only.

        For others' need the pool shrinks below what it has promised: sequences wait for it to grow again. The next
        step reports what came of an order that shrinks, grows, or changes whether steps are held.
        """
        self._is_guarded = True
        if order.shrink_bytes or order.hold:
            self._full_since_s = None  # it has seen to it; whether that helps is for the next step to find out
        resizes = bool(order.shrink_bytes or order.grow_bytes)
        self._resized |= resizes
        self._has_news |= resizes or order.hold != self._held
        self._held = order.hold
        self._tell_time()
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
            steps=self._steps,
            forward_s=self._forward_s,
            prompt_tokens=counters.prompt_tokens,
            computed_prompt_tokens=counters.computed_prompt_tokens,
            cached_prompt_tokens=counters.cached_prompt_tokens,
            generated_tokens=counters.generated_tokens,
            preemptions=counters.preemptions,
            evictions=cache.prefix.evictions if cache.prefix is not None else 0,
            misses=dict(self.scheduler.misses),
            memory=self._memory(),
            most_blocks=cache.pool.most_blocks,
            pinned_blocks=cache.pinned_blocks,
        )

    def step(self) -> StepReport:
        """Run one step; while steps are held, and right after a resize, only report.

        Out of memory in it, the next call tries again with one sequence less, or, where there was only one, with a
        pool smaller by POOL_SHARE_GIVEN_BACK; under a memory guard not before that has had its chance. A sequence for
        which neither is possible ends.
        """
        refused, self._refused, self._has_news = tuple(self._refused), [], False
        self._tell_time()
        # Whoever ordered a resize waits to hear of it, and a step may take long.
        resized, self._resized = self._resized, False
        outcome = Outcome() if self._held or resized else self._advance()
        return StepReport(
            stats=self.stats(),
            started=self.scheduler.take_started(),
            tokens=outcome.tokens,
            finished=refused + outcome.finished,
        )

    def _tell_time(self) -> None:
        now_s = self.clock()
        self.scheduler.cache.tell_time(now_s)
        if self._pins is not None:
            self._pins.observe(now_s, lambda: self.scheduler.spare_blocks)

    def _advance(self) -> Outcome:
        plan = self.scheduler.plan()
        if not plan.chunks:
            return Outcome(finished=self._give_up_for_memory(self.scheduler.hopeless()))
        self._steps += 1
        return self._run(plan)

    def _run(self, plan: StepPlan) -> Outcome:
        try:
            begun_s = self.clock()
            logits = self.runner.forward(plan)
            self._forward_s += self.clock() - begun_s
            outcome = self._choose(plan, logits)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        else:
            self._full_since_s = None
            return outcome
        if self.scheduler.retreat(plan) or self._is_for_the_guard() or self._give_memory_back():
            return Outcome()
        self._full_since_s = None
        return Outcome(finished=self._give_up_for_memory([chunk.sequence.id for chunk in plan.chunks]))

    def _choose(self, plan: StepPlan, logits: Tensor) -> Outcome:
        sampling = [chunk for chunk in plan.chunks if chunk.samples]
        rows = [SampleRow(c.sequence.spec.sampling, c.sequence.tokens, c.sequence.num_prompt) for c in sampling]
        try:
            return self.scheduler.complete(plan, self.sampler.sample(logits, rows) if rows else [])
        except NonFiniteLogits as error:
            bad = set(error.rows)
        lost = [sampling[row].sequence.id for row in sorted(bad)]
        kept = [row for row in range(len(rows)) if row not in bad]
        finished = self.scheduler.give_up(lost, FinishReason.ERROR, "the model's output is not finite")
        survivors = replace(plan, chunks=tuple(c for c in plan.chunks if c.sequence.id not in lost))
        chosen = self.sampler.sample(logits[kept], [rows[row] for row in kept]) if kept else []
        outcome = self.scheduler.complete(survivors, chosen)
        return Outcome(outcome.tokens, finished + outcome.finished)

    def _is_for_the_guard(self) -> bool:
        """Whether it may be that others just took memory: then the guard lends it to them, which lasts no longer.

        What is given back here is lost for good.
        """
        now_s = self.clock()
        if self._full_since_s is None:
            self._full_since_s = now_s
        return self._is_guarded and now_s - self._full_since_s < GUARD_S

    def _give_memory_back(self) -> bool:
        if self.pool is None:
            return False
        blocks = self.scheduler.cache.pool
        # A pool that is small because others need memory grows again: then what was promised is only late.
        lent = blocks.total_blocks < blocks.most_blocks
        num_bytes = int(self.pool.num_bytes * POOL_SHARE_GIVEN_BACK)
        given_back = self.pool.shrink(self.scheduler, num_bytes, keep_promises=not lent)
        if given_back and not lent:
            self.pool.stay_small()
        return given_back > 0 or lent

    def _memory(self) -> MemoryStats | None:
        if self.pool is None:
            return None
        return self.pool.memory(self.scheduler, num_resizes=self._num_resizes, held=self._held)

    def _give_up_for_memory(self, sequence_ids: Listing[int]) -> tuple[Finished, ...]:
        detail = "not enough memory to run this sequence, even alone"
        return self.scheduler.give_up(sequence_ids, FinishReason.OUT_OF_MEMORY, detail)
