"""Which tokens of which sequences run in the next step.

Runs in: engine thread; owns: the waiting and running sequences (their blocks are `KVCache`'s).

There is no prefill phase and no decode phase: every step takes one token of each decoding sequence first, then chunks
of prompts up to the step's token budget, then admits waiting sequences into what is left.

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

from collections.abc import Mapping
from collections.abc import Sequence as Listing
from dataclasses import dataclass, field

from edgekv.core.kv_cache import KVCache
from edgekv.core.sequence import FinishReason, Sequence, SequenceSpec, Stage
from edgekv.core.step import BlockCopy, Chunk, Finished, Sampled, Started, StepPlan, TokenOut
from edgekv.core.waiting import WaitingLines, rank

SPARED_AFTER = 3


@dataclass(frozen=True, slots=True)
class Limits:
    """How much one step may do.

    `max_step_tokens` bounds every step; `mixed_step_tokens` one with decodes in it, so that a long prompt never holds
    up running streams for longer than that many tokens take. Where decodes are more than half of that, prompts get as
    many tokens again, or many streams would keep out all others. `weights` are the shares in which priorities are let
    in where several wait (see `WaitingLines`).
    """

    max_sequences: int = 16
    max_step_tokens: int = 512
    mixed_step_tokens: int = 128
    weights: Mapping[int, int] = field(default_factory=lambda: {0: 10, 10: 1})

    def step_tokens(self, num_decodes: int) -> int:
        """The most tokens of a step with so many decodes."""
        if num_decodes == 0:
            return self.max_step_tokens
        return min(max(self.mixed_step_tokens, 2 * num_decodes), self.max_step_tokens)


@dataclass(slots=True)
class Counters:
    """Totals since the start; they only grow."""

    prompt_tokens: int = 0
    computed_prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0


@dataclass(frozen=True, slots=True)
class Vacated:
    """Segments that are empty now, and the copies to make before they go."""

    segments: tuple[int, ...]
    copies: tuple[BlockCopy, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a completed step changed, for the report."""

    tokens: tuple[TokenOut, ...] = ()
    finished: tuple[Finished, ...] = ()


class Scheduler:
    """Waiting and running sequences, and the choice among them.

    Invariant: a sequence is in exactly one of waiting and running until it finishes, and holds blocks only while it
    runs. `plan` and `complete` (or `retreat`) alternate.
    """

    def __init__(self, cache: KVCache, limits: Limits) -> None:
        self.cache = cache
        self.limits = limits
        self.counters = Counters()
        self.misses: dict[str, int] = {}
        self._waiting = WaitingLines(limits.weights)
        self._running: dict[int, Sequence] = {}
        self._prefilling_keys: dict[bytes, int] = {}
        self._started: list[Started] = []
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

    def plan(self) -> StepPlan:
        """Choose the next step. Empty when nothing can run (then whoever waits cannot fit: see `hopeless`)."""
        chunks: dict[int, Chunk] = {}
        preempted: list[int] = []
        copies: list[BlockCopy] = []
        ordered = sorted(self._running.values(), key=rank)
        for sequence in ordered:
            if sequence.num_uncomputed == 1 and self._make_room(sequence, chunks, preempted):
                chunks[sequence.id] = self._chunk(sequence, 1)
        budget = self.limits.step_tokens(len(chunks)) - len(chunks)
        for sequence in ordered:
            if budget > 0 and sequence.stage is Stage.RUNNING and sequence.id not in chunks:
                chunk = self._chunk(sequence, budget)
                chunks[sequence.id] = chunk
                budget -= len(chunk.token_ids)
        if not preempted:
            copies = self._admit(chunks, budget)
        self.counters.preemptions += len(preempted)
        return StepPlan(tuple(copies), tuple(chunks.values()), tuple(preempted))

    def complete(self, plan: StepPlan, sampled: Listing[Sampled]) -> Outcome:
        """Take a step's results: `sampled` has one entry for each chunk that samples, in the plan's order."""
        self.cache.unpin()
        tokens: list[TokenOut] = []
        finished: list[Finished] = []
        results = iter(sampled)
        for chunk in plan.chunks:
            sequence = chunk.sequence
            prompt_left = max(0, sequence.num_prompt - chunk.start)
            self.counters.computed_prompt_tokens += min(prompt_left, len(chunk.token_ids))
            sequence.num_computed = chunk.end
            self.cache.publish(sequence)
            self._forget_prefilled(chunk)
            if not chunk.samples:
                continue
            choice = next(results)
            sequence.tokens.append(choice.token_id)
            self.counters.generated_tokens += 1
            reason = _finish_reason(sequence)
            tokens.append(TokenOut(sequence.id, choice, is_stop=reason is FinishReason.STOP))
            if reason is not None:
                self._stop_running(sequence, Stage.FINISHED)
                finished.append(Finished(sequence.id, reason))
        return Outcome(tuple(tokens), tuple(finished))

    def give_up(self, sequence_ids: Listing[int], reason: FinishReason, detail: str) -> tuple[Finished, ...]:
        """End sequences that a fault has hit; the others are not disturbed, and nothing they left is reused."""
        finished: list[Finished] = []
        for sequence_id in sequence_ids:
            # One at a time: what several of them share is withdrawn with the last that holds it.
            if sequence_id in self._running:
                self.cache.distrust(self._running[sequence_id])
            if self.abort(sequence_id):
                finished.append(Finished(sequence_id, reason, detail))
        return tuple(finished)

    def retreat(self, plan: StepPlan) -> bool:
        """A step found too little memory and did not happen: plan it again with one sequence less.

        The sequence that is cheapest to lose is preempted, and nobody is admitted in its place until another sequence
        has ended, or the same step would fail again for ever. False, and nothing preempted, where only one runs.
        """
        self.cache.unpin()
        most_running = len(self._running) - 1
        copied = {copy.target for copy in plan.copies}
        for sequence in self.running:
            if copied.intersection(sequence.block_table):
                # Whether the copy was made is not known, so what it brought does not count as computed.
                sequence.num_computed -= sequence.num_computed % self.cache.block_size
                self._preempt(sequence)
        if most_running == 0:
            return False
        while len(self._running) > most_running:
            self._preempt(max(self._running.values(), key=_cheapness))
            self.counters.preemptions += 1
        self._most_running = most_running
        return True

    def vacate(self, num_blocks: int, *, keep_promises: bool, first: Listing[int] = ()) -> Vacated:
        """Empty the segments that cost least, of `num_blocks` or a little more; between steps only.

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
            self._preempt(max(victims, key=_cheapness))
            self.counters.preemptions += 1
        return Vacated(segments, tuple(self.cache.vacate(segments, self._running.values())))

    def take_started(self) -> tuple[Started, ...]:
        """The sequences scheduled for the first time since the last call."""
        started, self._started = tuple(self._started), []
        return started

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
        assert set(self._prefilling_keys.values()) <= self._running.keys(), "a key is awaited from nobody"

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

    def _admit(self, chunks: dict[int, Chunk], budget: int) -> list[BlockCopy]:
        copies: list[BlockCopy] = []
        for sequence in self._waiting.turns():
            if budget <= 0 or len(self._running) >= (self._most_running or self.limits.max_sequences):
                break
            room = self.cache.pool.total_blocks - self._pinned_for_others(sequence)
            if self.cache.blocks_for(len(sequence.tokens)) > room:
                continue  # it waits for the pool to grow, and nobody waits for it meanwhile
            match = self.cache.match(sequence)
            if self._comes_soon(sequence, len(match.nodes)):
                continue  # its prefix is being computed for another: waiting costs less than computing it twice
            # One block in reserve for each running sequence, so that admitting does not preempt at the next boundary.
            if not self.cache.can_admit(sequence, match, reserve_blocks=len(self._running)):
                break  # first come, first served: nobody overtakes a sequence that waits for memory
            self._waiting.serve(sequence)
            copies += self.cache.admit(sequence, match)
            self._running[sequence.id] = sequence
            sequence.stage = Stage.RUNNING
            self._note_start(sequence, match.miss)
            self._announce_prefill(sequence)
            chunks[sequence.id] = self._chunk(sequence, budget)
            budget -= len(chunks[sequence.id].token_ids)
        return copies

    def _make_room(self, sequence: Sequence, chunks: dict[int, Chunk], preempted: list[int]) -> bool:
        """Give a decoding sequence the block its next token needs. False if it had to be preempted itself."""
        while sequence.stage is Stage.RUNNING and not self.cache.can_grow(sequence):
            victim = max(self._running.values(), key=_cheapness)
            chunks.pop(victim.id, None)
            self._preempt(victim)
            preempted.append(victim.id)
        if sequence.stage is not Stage.RUNNING:
            return False
        self.cache.grow(sequence)
        return True

    def _chunk(self, sequence: Sequence, most_tokens: int) -> Chunk:
        start = sequence.num_computed
        end = min(len(sequence.tokens), start + most_tokens)
        return Chunk(
            sequence=sequence,
            start=start,
            token_ids=tuple(sequence.tokens[start:end]),
            block_table=tuple(sequence.block_table),
            samples=end == len(sequence.tokens),
        )

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
        for key in [k for k, owner in self._prefilling_keys.items() if owner == sequence.id]:
            del self._prefilling_keys[key]

    def _note_start(self, sequence: Sequence, miss: str | None) -> None:
        if sequence.cached_tokens is not None:
            return  # resumed
        sequence.cached_tokens = sequence.num_computed
        self.counters.cached_prompt_tokens += sequence.num_computed
        self._started.append(Started(sequence.id, sequence.num_computed, miss))
        if miss is not None:
            kind = miss.split(":")[0]
            self.misses[kind] = self.misses.get(kind, 0) + 1

    def _comes_soon(self, sequence: Sequence, matched_blocks: int) -> bool:
        keys = sequence.block_keys
        return matched_blocks < len(keys) and keys[matched_blocks] in self._prefilling_keys

    def _announce_prefill(self, sequence: Sequence) -> None:
        first = sequence.num_computed // self.cache.block_size
        for key in sequence.block_keys[first:]:
            self._prefilling_keys.setdefault(key, sequence.id)

    def _forget_prefilled(self, chunk: Chunk) -> None:
        if self._prefilling_keys:
            size, sequence = self.cache.block_size, chunk.sequence
            for key in sequence.block_keys[chunk.start // size : chunk.end // size]:
                if self._prefilling_keys.get(key) == sequence.id:
                    del self._prefilling_keys[key]


def _cheapness(sequence: Sequence) -> tuple[bool, int, int, int]:
    """The greatest is preempted first: lowest priority, then least to recompute, then the youngest.

    The spared come after all others, whatever their priority, and of them the youngest is first.
    """
    if sequence.num_preemptions >= SPARED_AFTER:
        return False, 0, 0, sequence.arrival
    return True, sequence.spec.priority, -sequence.num_computed, sequence.arrival


def _finish_reason(sequence: Sequence) -> FinishReason | None:
    sampling = sequence.spec.sampling
    if sequence.tokens[-1] in sampling.stop_token_ids and sequence.num_output > sampling.min_tokens:
        return FinishReason.STOP
    return FinishReason.LENGTH if sequence.num_output >= sampling.max_tokens else None
