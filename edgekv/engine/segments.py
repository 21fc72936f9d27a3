"""The pool comes and goes by whole segments: lease, memory and block numbers in step.

Runs in: engine thread; owns: the segments' leases.
"""

from edgekv.core.block_pool import BlockPool
from edgekv.core.ledger import Lease, Ledger
from edgekv.core.scheduler import Scheduler
from edgekv.engine.kv_pool import KVPool


class Segments:
    """Every segment of one pool.

    Invariant: the block pool, the memory and the leases have the same segments under the same indices.
    """

    def __init__(self, blocks: BlockPool, memory: KVPool, ledger: Ledger) -> None:
        self._blocks = blocks
        self._memory = memory
        self._ledger = ledger
        self._leases: dict[int, Lease] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes leased for all segments."""
        return sum(lease.num_bytes for lease in self._leases.values())

    def add(self, num_blocks: int, lease: Lease) -> None:
        """One more segment, on a lease that covers it. Raises MemoryError, or torch's like, keeping nothing."""
        if lease.num_bytes != num_blocks * self._memory.block_bytes:
            raise ValueError(f"a lease of {lease.num_bytes} bytes for {num_blocks} blocks")
        index = self._memory.add_segment(num_blocks)
        if self._blocks.add_segment(num_blocks) != index:
            raise AssertionError("the pool and its memory number their segments differently")
        self._leases[index] = lease

    def shrink(self, scheduler: Scheduler, num_bytes: int) -> int:
        """Give back segments until at least `num_bytes` are free; between steps only. Returns the bytes given back.

        Fewer than asked, perhaps none, where an admitted sequence could then no longer finish.
        """
        given_back = 0
        while given_back < num_bytes:
            vacated = scheduler.vacate_segment()
            if vacated is None:
                break
            index, copies = vacated
            self._memory.copy(copies)
            self._blocks.remove_segment(index)
            self._memory.remove_segment(index)
            lease = self._leases.pop(index)
            self._ledger.release(lease)
            given_back += lease.num_bytes
        return given_back
