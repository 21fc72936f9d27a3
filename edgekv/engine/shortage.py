"""What a step that finds too little memory leads to. Runs in: engine thread; owns: since when memory is short."""

from collections.abc import Callable
from collections.abc import Sequence as Listing

from edgekv.core.scheduler import Outcome, Scheduler
from edgekv.core.sequence import FinishReason
from edgekv.core.step import StepPlan
from edgekv.engine.protocols import ElasticPool
from edgekv.engine.speculate import Speculation

POOL_SHARE_GIVEN_BACK = 0.1
GUARD_S = 1.0  # for the memory guard to see that others took memory: several of its periods


class Shortage:
    """Out of memory in a step, the next is tried without proposals, without what no sequence needs, with one sequence
    less, or with less of a pool.

    Args:
        scheduler: the engine's.
        pool: what gives memory back; None for a pool of fixed size.
        speculation: whose proposals make steps larger; None where there are none.
    """

    def __init__(self, scheduler: Scheduler, pool: ElasticPool | None, speculation: Speculation | None = None) -> None:
        self._scheduler = scheduler
        self._pool = pool
        self._speculation = speculation
        self._is_guarded = False
        self._since_s: float | None = None

    def guarded(self) -> None:
        """There is a memory guard: it is to have its chance before anything is given back for good."""
        self._is_guarded = True

    def over(self) -> None:
        """A step was done, or the guard has seen to the memory: whether that helps is for the next step to find out."""
        self._since_s = None

    def relieve(self, plan: StepPlan, clock: Callable[[], float]) -> Outcome:
        """The step did not happen: see to it that the next one can, or end the sequences that it was for."""
        if self._speculation is not None and any(chunk.proposed for chunk in plan.chunks):
            self._speculation.stop_for_a_while()
            self._scheduler.undo(plan)
            return Outcome()
        if self._pool is not None and self._pool.spare():
            self._scheduler.undo(plan)
            return Outcome()
        if self._scheduler.retreat(plan) or self._is_for_the_guard(clock()) or self._give_memory_back():
            return Outcome()
        self.over()
        return self.give_up([chunk.sequence.id for chunk in plan.chunks])

    def give_up(self, sequence_ids: Listing[int]) -> Outcome:
        """End sequences for which there is no memory."""
        detail = "not enough memory to run this sequence, even alone"
        return Outcome(finished=self._scheduler.give_up(sequence_ids, FinishReason.OUT_OF_MEMORY, detail))

    def _is_for_the_guard(self, now_s: float) -> bool:
        """Whether it may be that others just took memory: then the guard lends it to them, which lasts no longer.

        What is given back here is lost for good.
        """
        if self._since_s is None:
            self._since_s = now_s
        return self._is_guarded and now_s - self._since_s < GUARD_S

    def _give_memory_back(self) -> bool:
        if self._pool is None:
            return False
        blocks = self._scheduler.cache.pool
        # A pool that is small because others need memory grows again: then what was promised is only late.
        lent = blocks.total_blocks < blocks.most_blocks
        num_bytes = int(self._pool.num_bytes * POOL_SHARE_GIVEN_BACK)
        given_back = self._pool.shrink(self._scheduler, num_bytes, keep_promises=not lent)
        if given_back and not lent:
            self._pool.stay_small()
        return given_back > 0 or lent
