"""What can be given back of a device where a draft model has memory beside the target's pool.

Runs in: engine thread; owns: nothing (both keep what they have).

    given back    by the draft first, then by the target's pool
    taken again   by the target's pool up to what was planned for it, then by the draft, then by the pool beyond that
"""

from collections.abc import Callable
from dataclasses import replace

from edgekv.core.step import MemoryStats
from edgekv.engine.draft_memory import DraftMemory
from edgekv.engine.segments import BlockHolder, Growth, Segments


class SharedMemory:
    """An `ElasticPool` of both. Neither ever has what was planned for the other.

    Args:
        target: the target's segments.
        draft: the draft's memory.
        planned_bytes: what was planned for the target's pool.
        is_busy: whether requests run.
    """

    def __init__(
        self,
        target: Segments,
        draft: DraftMemory,
        planned_bytes: int,
        is_busy: Callable[[], bool] = lambda: False,
    ) -> None:
        self.target, self.draft = target, draft
        self._planned_bytes, self._is_busy = planned_bytes, is_busy
        self._shortfall: str | None = None

    @property
    def num_bytes(self) -> int:
        """See `ElasticPool`."""
        return self.target.num_bytes + self.draft.num_bytes

    @property
    def version(self) -> int:
        """See `ElasticPool`."""
        return self.target.version

    def shrink(self, scheduler: BlockHolder, num_bytes: int, *, keep_promises: bool, slow_first: bool = False) -> int:
        """See `ElasticPool`."""
        given_back = self.draft.shrink(num_bytes)
        if given_back < num_bytes:
            given_back += self.target.shrink(
                scheduler, num_bytes - given_back, keep_promises=keep_promises, slow_first=slow_first
            )
        return given_back

    def spare(self) -> int:
        """See `ElasticPool`: the draft's keys and values, and when these are gone the rest of it."""
        spared = self.draft.shrink(self.draft.kv_bytes or self.draft.num_bytes)
        if spared:
            self.draft.wait()
        return spared

    def grow(self, num_bytes: int) -> Growth:
        """See `ElasticPool`."""
        taken = Growth(0)
        if self._owed_bytes:
            taken = self.target.grow(min(num_bytes, self._owed_bytes))
        if taken.shortfall is None and self._owed_bytes < self.target.segment_bytes:
            taken = _both(taken, self.draft.grow(num_bytes - taken.num_bytes, is_busy=self._is_busy()))
        if taken.shortfall is None and self.draft.next_bytes == 0:
            taken = _both(taken, self.target.grow(num_bytes - taken.num_bytes))
        self._shortfall = taken.shortfall
        return taken

    def stay_small(self) -> None:
        """See `ElasticPool`."""
        self.target.stay_small()
        self.draft.stay_small()

    def set_budget(self, num_bytes: int) -> None:
        """See `ElasticPool`."""
        self.target.set_budget(num_bytes)

    def memory(self, scheduler: BlockHolder, *, num_resizes: int, held: bool) -> MemoryStats:
        """See `ElasticPool`."""
        stats, draft = self.target.memory(scheduler, num_resizes=num_resizes, held=held), self.draft
        facts = stats.facts
        comes_next = draft.next_bytes if self._owed_bytes < facts.segment_bytes else 0
        facts = replace(
            facts,
            kv_bytes=facts.kv_bytes + draft.num_bytes,
            segment_bytes=comes_next or facts.segment_bytes,
            ceiling_bytes=facts.ceiling_bytes + draft.ceiling_bytes,
            given_back_bytes=facts.given_back_bytes + draft.given_back_bytes,
            taken_bytes=facts.taken_bytes + draft.taken_bytes,
        )
        return replace(stats, facts=facts, shortfall=self._shortfall)

    def check_integrity(self) -> None:
        """Raise AssertionError where an invariant does not hold."""
        self.target.check_integrity()
        self.draft.check_integrity()

    @property
    def _owed_bytes(self) -> int:
        """What the target's pool may have again before the draft."""
        return max(0, min(self._planned_bytes, self.target.ceiling_bytes) - self.target.num_bytes)


def _both(one: Growth, other: Growth) -> Growth:
    return Growth(one.num_bytes + other.num_bytes, other.shortfall)
