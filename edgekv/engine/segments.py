"""The pool comes and goes by whole segments: lease, memory and block numbers in step.

Runs in: engine thread; owns: the segments' leases, and the count of what was given back and taken.
"""

from collections.abc import Sequence as Listing
from dataclasses import dataclass
from typing import Any, Protocol

from edgekv.core.block_pool import BlockPool
from edgekv.core.ledger import Lease, Ledger
from edgekv.core.pressure import PoolFacts
from edgekv.core.roster import Vacated
from edgekv.core.step import MemoryStats
from edgekv.engine.canary import slow_segments, time_reads
from edgekv.engine.kv_pool import BlockMemory
from edgekv.engine.memory_errors import is_out_of_memory
from edgekv.engine.settings import KV_LEASE
from edgekv.errors import OverBudget


@dataclass(frozen=True, slots=True)
class Growth:
    """What a growth came to; `shortfall` says why it is less than was asked for and allowed."""

    num_bytes: int
    shortfall: str | None = None


class BlockHolder(Protocol):
    """Who holds a pool's blocks, and can leave some of them: see `Scheduler`."""

    @property
    def floor_blocks(self) -> int:
        """What `vacate` leaves of the pool at least."""
        ...

    def vacate(self, num_blocks: int, *, keep_promises: bool, first: Listing[int] = ()) -> Vacated:
        """Empty segments of `num_blocks` or a little more."""
        ...


class Segments:
    """Every segment of one pool.

    Invariant: the block pool, the memory and the leases have the same segments under the same indices.

    Args:
        blocks: the pool's blocks as numbers.
        memory: what they stand for.
        ledger: of the device.
        ceiling_blocks: the most that the pool may grow to; None for no more than it once had.
        lease_name: what its segments are called on the ledger.
    """

    def __init__(
        self,
        blocks: BlockPool,
        memory: BlockMemory[Any],
        ledger: Ledger,
        *,
        ceiling_blocks: int | None = None,
        lease_name: str = KV_LEASE,
    ) -> None:
        self._blocks = blocks
        self._memory = memory
        self._lease_name = lease_name
        self._ledger = ledger
        self._ceiling_blocks = ceiling_blocks
        self._leases: dict[int, Lease] = {}
        self._given_back_bytes = 0
        self._taken_bytes = 0
        self._shortfall: str | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes leased for all segments."""
        return sum(lease.num_bytes for lease in self._leases.values())

    @property
    def version(self) -> int:
        """See `ElasticPool`."""
        return self._ledger.version

    @property
    def ceiling_bytes(self) -> int:
        """The most that the pool may grow to."""
        return max(self._ceiling_blocks or 0, self._blocks.most_blocks) * self._memory.block_bytes

    @property
    def segment_bytes(self) -> int:
        """Bytes of a whole segment."""
        return self._memory.segment_blocks * self._memory.block_bytes

    @property
    def given_back_bytes(self) -> int:
        """In all so far."""
        return self._given_back_bytes

    @property
    def taken_bytes(self) -> int:
        """In all so far."""
        return self._taken_bytes

    def add(self, num_blocks: int, lease: Lease) -> None:
        """One more segment, on a lease that covers it. Raises MemoryError, or torch's like, keeping nothing."""
        if lease.num_bytes != num_blocks * self._memory.block_bytes:
            raise ValueError(f"a lease of {lease.num_bytes} bytes for {num_blocks} blocks")
        index = self._memory.add_segment(num_blocks)
        if self._blocks.add_segment(num_blocks) != index:
            raise AssertionError("the pool and its memory number their segments differently")
        self._leases[index] = lease

    def shrink(self, scheduler: BlockHolder, num_bytes: int, *, keep_promises: bool, slow_first: bool = False) -> int:
        """Give back segments of at least `num_bytes`; between steps only. Returns the bytes given back.

        With `keep_promises` fewer than asked, perhaps none, where an admitted sequence could then no longer finish.
        Without, sequences are preempted, all of them if need be, and wait until the pool has grown again; only pinned
        blocks stay. `slow_first`: segments that are slow to read go first, because they have left the card.
        """
        slow = slow_segments(time_reads(self._memory.allocated, self._memory.device)) if slow_first else ()
        num_blocks = -(-num_bytes // self._memory.block_bytes)
        vacated = scheduler.vacate(num_blocks, keep_promises=keep_promises, first=slow)
        self._memory.copy(vacated.copies)
        given_back = sum(self._remove(index) for index in vacated.segments)
        self._given_back_bytes += given_back
        return given_back

    def spare(self) -> int:
        """See `ElasticPool`; what is cached is evicted as blocks are needed."""
        return 0

    def grow(self, num_bytes: int) -> Growth:
        """Take segments of at most `num_bytes` in all, up to the ceiling; only the last below it may be smaller."""
        taken, block_bytes = 0, self._memory.block_bytes
        shortfall: str | None = None
        while shortfall is None:
            missing = self.ceiling_bytes // block_bytes - self._blocks.total_blocks
            num_blocks = min(missing, self._memory.segment_blocks)
            if num_blocks < 1 or taken + num_blocks * block_bytes > num_bytes:
                break
            shortfall = self._take(num_blocks)
            if shortfall is None:
                taken += num_blocks * block_bytes
        self._taken_bytes += taken
        self._shortfall = shortfall
        return Growth(taken, shortfall)

    def stay_small(self) -> None:
        """What the pool has lost does not come back: what it has now is its ceiling."""
        self._blocks.forget_growth()
        self._ceiling_blocks = None

    def set_budget(self, num_bytes: int) -> None:
        """The ledger's, as far as what is leased allows."""
        self._ledger.set_budget(num_bytes)

    def memory(self, scheduler: BlockHolder, *, num_resizes: int, held: bool) -> MemoryStats:
        """Where the device's memory is."""
        ledger, block_bytes = self._ledger, self._memory.block_bytes
        facts = PoolFacts(
            kv_bytes=self._blocks.total_blocks * block_bytes,
            leased_bytes=ledger.leased_bytes,
            segment_bytes=self.segment_bytes,
            ceiling_bytes=self.ceiling_bytes,
            floor_bytes=scheduler.floor_blocks * block_bytes,
            given_back_bytes=self._given_back_bytes,
            taken_bytes=self._taken_bytes,
            num_resizes=num_resizes,
        )
        return MemoryStats(
            leases=ledger.statement(),
            budget_bytes=ledger.budget_bytes,
            wanted_budget_bytes=ledger.budget_bytes - ledger.owed_bytes,
            facts=facts,
            earmarks=ledger.earmarks,
            held=held,
            shortfall=self._shortfall,
        )

    def check_integrity(self) -> None:
        """Raise AssertionError where the invariant does not hold."""
        self._ledger.check_integrity()
        sizes = {index: lease.num_bytes // self._memory.block_bytes for index, lease in self._leases.items()}
        assert sizes == self._memory.segments == self._blocks.segments, "leases, memory and blocks differ"
        leased = sum(lease.num_bytes for lease in self._ledger.leases(self._lease_name))
        assert leased == self.num_bytes == self._memory.num_bytes, f"{leased} bytes leased, {self.num_bytes} in use"

    def _remove(self, index: int) -> int:
        self._blocks.remove_segment(index)
        self._memory.remove_segment(index)
        lease = self._leases.pop(index)
        self._ledger.release(lease)
        return lease.num_bytes

    def _take(self, num_blocks: int) -> str | None:
        """One more segment; why not, where there is none to be had."""
        try:
            lease = self._ledger.reserve(self._lease_name, num_blocks * self._memory.block_bytes)
        except OverBudget as error:
            return str(error)
        try:
            self.add(num_blocks, lease)
        except (MemoryError, RuntimeError) as error:
            self._ledger.release(lease)
            if not is_out_of_memory(error):
                raise
            return f"{lease.num_bytes:,} bytes were within the budget, but the device had them not: {error}"
        return None
