"""One model's engine, synchronous: plan, forward, report.

Runs in: engine thread (or inline in tests); owns: the scheduler and, through the runner, the device memory.
"""

from collections.abc import Sequence as Listing
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from edgekv.core.scheduler import Outcome, Scheduler
from edgekv.core.sequence import FinishReason, SequenceSpec
from edgekv.core.step import EngineStats, Finished, Sampled, StepPlan, StepReport
from edgekv.engine.sampler import NonFiniteLogits, SampleRow, check_params

POOL_SHARE_GIVEN_BACK = 0.1


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


class Shrinkable(Protocol):
    """A pool that can give memory back."""

    @property
    def num_bytes(self) -> int:
        """Bytes that it has."""
        ...

    def shrink(self, scheduler: Scheduler, num_bytes: int) -> int:
        """Give back at least `num_bytes`, or what the promises to admitted sequences allow; the bytes given back."""
        ...


class EngineCore:
    """Schedule, run, sample, report. Every accepted sequence ends in exactly one `Finished`, unless it is aborted.

    Args:
        scheduler: sequences and block tables.
        runner: the model over the KV pool.
        sampler: chooses tokens from logits.
        vocab_size: token ids at or above it are refused.
        pool: what gives memory back when a step finds none; None for a pool of fixed size.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Forward,
        sampler: Chooser,
        vocab_size: int,
        pool: Shrinkable | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.sampler = sampler
        self.vocab_size = vocab_size
        self.pool = pool
        self._steps = 0
        self._refused: list[Finished] = []
        self._aborted = False

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do or to say."""
        return self.scheduler.busy or bool(self._refused) or self._aborted

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
        self._aborted |= self.scheduler.abort(sequence_id)

    def stats(self) -> EngineStats:
        """Counts as of now."""
        counters, cache = self.scheduler.counters, self.scheduler.cache
        return EngineStats(
            pool=cache.pool.stats(),
            running=self.scheduler.num_running,
            waiting=self.scheduler.num_waiting,
            steps=self._steps,
            prompt_tokens=counters.prompt_tokens,
            computed_prompt_tokens=counters.computed_prompt_tokens,
            cached_prompt_tokens=counters.cached_prompt_tokens,
            generated_tokens=counters.generated_tokens,
            preemptions=counters.preemptions,
            evictions=cache.prefix.evictions if cache.prefix is not None else 0,
            misses=dict(self.scheduler.misses),
        )

    def step(self) -> StepReport:
        """Run one step.

        Out of memory in it, the next call tries again with one sequence less, or, where there was only one, with a
        pool smaller by POOL_SHARE_GIVEN_BACK. A sequence for which neither is possible ends.
        """
        refused, self._refused, self._aborted = tuple(self._refused), [], False
        plan = self.scheduler.plan()
        if plan.chunks:
            self._steps += 1
            outcome = self._run(plan)
        else:
            stuck = self.scheduler.hopeless()
            outcome = Outcome(finished=self._give_up_for_memory(stuck))
        return StepReport(
            stats=self.stats(),
            started=self.scheduler.take_started(),
            tokens=outcome.tokens,
            finished=refused + outcome.finished,
        )

    def _run(self, plan: StepPlan) -> Outcome:
        try:
            logits = self.runner.forward(plan)
            return self._choose(plan, logits)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
        if self.scheduler.retreat(plan) or self._give_memory_back():
            return Outcome()
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

    def _give_memory_back(self) -> bool:
        if self.pool is None:
            return False
        return self.pool.shrink(self.scheduler, int(self.pool.num_bytes * POOL_SHARE_GIVEN_BACK)) > 0

    def _give_up_for_memory(self, sequence_ids: Listing[int]) -> tuple[Finished, ...]:
        detail = "not enough memory to run this sequence, even alone"
        return self.scheduler.give_up(sequence_ids, FinishReason.OUT_OF_MEMORY, detail)


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether it is the host's or the device's allocator that failed (torch's CPU allocator raises RuntimeError)."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
