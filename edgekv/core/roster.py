"""Who waits and who runs, and how a sequence comes and goes.

Runs in: engine thread; owns: the waiting and running sequences (their blocks are `KVCache`'s).

Why an admitted sequence finishes, in a pool that has come back to its size (`most_blocks`):

- Alone, it fits: one that could not hold all its tokens then is refused at submission.
- Running, it is preempted a bounded number of times. A preemption takes the sequence with the least to recompute among
  those of the lowest priority; but whoever was preempted SPARED_AFTER times is taken only when all that run are such,
  and of those the youngest goes. So each sequence is taken SPARED_AFTER times and then only beside older spared ones,
  which are finitely many; the oldest of them is never taken while another runs, it goes on and ends.
- Waiting, its turn comes: lines of priorities share the turns by weight, in a line the preempted ones are first, and
  whoever has the turn waits for blocks and is not overtaken.

While the pool is smaller than that, because others need the memory, a sequence that does not fit it at all is passed
over, so that those that do can run. That costs it nothing: no order could run it now. With the pool back it is at its
place in the line again, before all that came later.
"""

from collections.abc import Sequence as Listing
from dataclasses import dataclass

from edgekv.core.kv_cache import KVCache
from edgekv.core.limits import Limits
from edgekv.core.prefilling import PrefillingKeys
from edgekv.core.sequence import Sequence, SequenceSpec, Stage
from edgekv.core.step import BlockCopy
from edgekv.core.waiting import WaitingLines

SPARED_AFTER = 3


@dataclass(slots=True)
class Counters:
    """Totals since the start; they only grow."""

    prompt_tokens: int = 0
    computed_prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generated_tokens: int = 0
    proposed_tokens: int = 0
    accepted_tokens: int = 0
    preemptions: int = 0


@dataclass(frozen=True, slots=True)
class Vacated:
    """Segments that are empty now, and the copies to make before they go."""

    segments: tuple[int, ...]
    copies: tuple[BlockCopy, ...]


class Roster:
    """Waiting and running sequences.

    Invariant: a sequence is in exactly one of waiting and running until it finishes, and holds blocks only while it
    runs.
    """

    def __init__(self, cache: KVCache, limits: Limits) -> None:
        self.cache = cache
        self.limits = limits
        self.counters = Counters()
        self._waiting = WaitingLines(limits.weights)
        self._running: dict[int, Sequence] = {}
        self._prefilling_keys = PrefillingKeys(cache.block_size)
        self._arrivals = 0
        self._most_running: int | None = None

    @property
    def busy(self) -> bool:
        """Whether any sequence is unfinished."""
        return len(self._waiting) > 0 or bool(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that hold no block."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._running)

    @property
    def running(self) -> Listing[Sequence]:
        """The sequences that hold blocks, for integrity checks."""
        return list(self._running.values())

    @property
    def floor_blocks(self) -> int:
        """What `vacate` leaves of the pool at least, in whole segments: pinned blocks stay."""
        pinned = self.cache.pinned_blocks
        if pinned == 0:
            return 0
        pool = self.cache.pool
        sizes = pool.segments
        return pool.total_blocks - sum(sizes[i] for i in self._cheapest_segments(pool.total_blocks, pinned, ()))

    @property
    def spare_blocks(self) -> int:
        """How many blocks more could be pinned, and every admitted sequence still finish."""
        return self.cache.pool.most_blocks - self._largest_need_blocks()

    def runs(self, sequence: Sequence) -> bool:
        """Whether this very sequence holds blocks, not one that came after it under the same id."""
        return self._running.get(sequence.id) is sequence

    def submit(self, spec: SequenceSpec) -> None:
        """Queue a sequence. Raises ValueError for a prompt or a length that cannot be served."""
        if not spec.prompt:
            raise ValueError(f"sequence {spec.id} has an empty prompt")
        if spec.sampling.max_tokens < 1:
            raise ValueError(f"sequence {spec.id}: max_tokens is {spec.sampling.max_tokens}, must be at least 1")
        sequence = Sequence.from_spec(spec, self._arrivals + 1)
        longest = (self.cache.pool.most_blocks - self._pinned_for_others(sequence)) * self.cache.block_size
        if len(spec.prompt) + spec.sampling.max_tokens > longest:
            raise ValueError(
                f"sequence {spec.id}: {len(spec.prompt)} + {spec.sampling.max_tokens} tokens never fit "
                f"a pool of {longest} tokens"
            )
        most = self.limits.context_tokens
        if most is not None and len(spec.prompt) + spec.sampling.max_tokens > most:
            raise ValueError(
                f"sequence {spec.id}: {len(spec.prompt)} + {spec.sampling.max_tokens} tokens are more than the context "
                f"of {most} tokens"
            )
        if spec.id in self._running or any(s.id == spec.id for s in self._waiting):
            raise ValueError(f"sequence {spec.id} is here already")
        self._arrivals += 1
        self.counters.prompt_tokens += len(spec.prompt)
        self._waiting.add(sequence)

    def abort(self, sequence_id: int) -> bool:
        """Drop a sequence and free its blocks at once. False if it is not here (it ended already)."""
        if sequence_id in self._running:
            self._stop_running(self._running[sequence_id], Stage.FINISHED)
            return True
        for sequence in self._waiting:
            if sequence.id == sequence_id:
                self._waiting.remove(sequence)
                sequence.stage = Stage.FINISHED
                return True
        return False

    def vacate(self, num_blocks: int, *, keep_promises: bool, first: Listing[int] = ()) -> Vacated:
        """Empty the segments that cost least, of `num_blocks` or a little more; with no step under way only.

        Preempts those that are cheapest to lose while the other segments cannot take the held blocks. Gives less, down
        to nothing, where what would be left could not hold pinned blocks or, with `keep_promises`, the longest of the
        admitted sequences. Segments `first` go before all others.
        """
        pool = self.cache.pool
        sizes = pool.segments
        # Pinned blocks stay, so nobody has to go for the place that they keep.
        least = self._largest_need_blocks() if keep_promises else self.cache.pinned_blocks
        while True:
            segments = self._cheapest_segments(num_blocks, least, first)
            left = pool.total_blocks - sum(sizes[index] for index in segments)
            if pool.active_blocks <= left:
                break
            # Whoever does not fit alone has to go in any case; perhaps the others need not then.
            victims = [s for s in self._running.values() if len(s.block_table) > left] or self._running.values()
            self._preempt(max(victims, key=cheapness))
            self.counters.preemptions += 1
        return Vacated(segments, tuple(self.cache.vacate(segments, self._running.values())))

    def hopeless(self) -> Listing[int]:
        """Whose turn it is, when nothing runs and it still cannot be admitted: the pool has become too small for it.

        Nobody while the pool is smaller than it may be: its blocks come back, and who waits for them is only late.
        """
        pool = self.cache.pool
        if self._running or pool.total_blocks < pool.most_blocks:
            return []
        head = next(self._waiting.turns(), None)
        if head is None or self.cache.can_admit(head, self.cache.match(head), reserve_blocks=0):
            return []
        return [head.id]

    def check_integrity(self) -> None:
        """Raise AssertionError where an invariant does not hold."""
        self.cache.check_integrity(self._running.values())
        for sequence in self._running.values():
            assert sequence.stage is Stage.RUNNING, f"sequence {sequence.id} runs as {sequence.stage}"
            assert sequence.num_uncomputed >= 1, f"sequence {sequence.id} has nothing left to compute"
        self._waiting.check_integrity()
        for sequence in self._waiting:
            waits = sequence.stage in (Stage.WAITING, Stage.PREEMPTED)
            assert waits, f"sequence {sequence.id} waits as {sequence.stage}"
            assert not sequence.block_table, f"sequence {sequence.id} waits with blocks"
        self._prefilling_keys.check_integrity(self._running.keys())

    def _is_full(self) -> bool:
        """Whether as many run as may, however many blocks there are."""
        return len(self._running) >= (self._most_running or self.limits.max_sequences)

    def _preempt(self, sequence: Sequence) -> None:
        self._stop_running(sequence, Stage.PREEMPTED)
        sequence.num_preemptions += 1
        self._waiting.add(sequence)

    def _stop_running(self, sequence: Sequence, stage: Stage) -> None:
        del self._running[sequence.id]
        if stage is Stage.FINISHED:
            self._most_running = None
        self.cache.release(sequence)
        sequence.stage = stage
        self._prefilling_keys.drop(sequence)

    def _largest_need_blocks(self) -> int:
        needs = (s.num_prompt + s.spec.sampling.max_tokens for s in (*self._waiting, *self._running.values()))
        return self.cache.blocks_for(max(needs, default=1)) + self.cache.pinned_blocks

    def _pinned_for_others(self, sequence: Sequence) -> int:
        """Pinned blocks that the sequence cannot share: they are no room for it, ever."""
        if self.cache.pinned_blocks == 0:
            return 0
        return self.cache.pinned_blocks - sum(node.pins > 0 for node in self.cache.match(sequence).nodes)

    def _cheapest_segments(self, num_blocks: int, least_blocks: int, first: Listing[int]) -> tuple[int, ...]:
        """Segments to remove, in the order of their cost, so that at least `least_blocks` are left."""
        pool, chosen, removed = self.cache.pool, list[int](), 0
        sizes = pool.segments
        for index in sorted(pool.emptiest_segments(), key=lambda index: index not in first):
            if removed >= num_blocks:
                break
            if pool.total_blocks - removed - sizes[index] >= least_blocks:
                chosen.append(index)
                removed += sizes[index]
        return tuple(chosen)


def cheapness(sequence: Sequence) -> tuple[bool, int, int, int]:
    """The greatest is preempted first: lowest priority, then least to recompute, then the youngest.

    The spared come after all others, whatever their priority, and of them the youngest is first.
    """
    if sequence.num_preemptions >= SPARED_AFTER:
        return False, 0, 0, sequence.arrival
    return True, sequence.spec.priority, -sequence.num_computed, sequence.arrival
