"""A device that works by itself, in the order in which it was given work, and no sooner than somebody must have it.

Its memory is plain: every slot of a block holds the whole context that its key and value were computed from. A step
reads all slots before its own, so that a wrong block, a stale slot or a step out of order ends in a token that no
sequence has.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch

from edgekv.core.block_pool import BlockPool, BlockState
from edgekv.core.kv_cache import KVCache
from edgekv.core.sampling import SamplingParams
from edgekv.core.sequence import Sequence
from edgekv.core.step import UNKNOWN, BlockCopy, Chunk, Sampled, StepPlan
from edgekv.engine.protocols import Pending
from edgekv.engine.sample_row import SampleRow
from edgekv.engine.sampler import NonFiniteLogits

VOCAB_SIZE, WRONG = 4, 3

Context = tuple[int, ...]


def next_token(context: Context, num_output: int, params: SamplingParams) -> int:
    """What the model says after a context: depends on every token in it, and on the draw."""
    drawn = sum(position * token for position, token in enumerate(context, 7)) + params.seed * (num_output + 1)
    token = drawn % 3
    return (token + 1) % 3 if num_output < params.min_tokens and token in params.stop_token_ids else token


def alone(prompt: Context, params: SamplingParams) -> list[int]:
    """The output of a sequence that nobody disturbs."""
    output: list[int] = []
    while len(output) < params.max_tokens:
        output.append(next_token((*prompt, *output), len(output), params))
        if output[-1] in params.stop_token_ids and len(output) > params.min_tokens:
            break
    return output


@dataclass(frozen=True)
class _Row:
    """A `SampleRow` as it was when its step was begun."""

    params: SamplingParams
    tokens: Context
    num_prompt: int
    num_output: int


@dataclass(eq=False)
class Job:
    """A step on the device."""

    stream: "Stream"
    plan: StepPlan
    rows: list[_Row]
    after: "Job | None"
    free: list[int]
    fails: bool
    done: bool = False
    sampled: dict[Sequence, int] = field(default_factory=dict)
    bad: set[int] = field(default_factory=set)

    def result(self, without: Collection[int] = ()) -> list[Sampled]:
        self.stream.run(self)
        if self.fails:
            self.stream.unread.remove(self)
            self.stream.fell_short()
        bad = tuple(sorted(self.bad - set(without)))
        if bad:
            raise NonFiniteLogits(bad, len(self.rows))
        self.stream.unread.remove(self)
        tokens = [self.sampled[chunk.sequence] for chunk in self.plan.sampling]
        return [Sampled(token) for row, token in enumerate(tokens) if row not in without]


class Stream:
    """The queue of steps, the memory, and what may go wrong.

    Args:
        cache: tells which blocks are free when a step is begun; what they held is lost in it.
        segments: those that the memory has, at any time.
    """

    def __init__(self, cache: KVCache, segments: Callable[[], Mapping[int, object]]) -> None:
        self.cache = cache
        self.segments = segments
        self.slots: dict[tuple[int, int], Context] = {}
        self.queue: list[Job] = []
        self.unread: list[Job] = []
        self.is_quick = False
        self.spoilt: set[int] = set()
        self.begin_fails: Callable[[bool], bool] = lambda ahead: False
        self.result_fails: Callable[[bool], bool] = lambda ahead: False
        self.short = False

    @property
    def pool(self) -> BlockPool:
        return self.cache.pool

    def begin(self, plan: StepPlan, rows: list[SampleRow], after: Pending | None) -> Job:
        assert plan.chunks, "a step of nothing"
        assert after is (self.unread[-1] if self.unread else None), "it is told another step as the one before"
        assert len(self.unread) < 2, "more than one step is in flight"
        if self.begin_fails(after is not None):
            self.fell_short()
        assert len(rows) == len(plan.sampling)
        kept = [_Row(row.params, tuple(row.tokens), row.num_prompt, row.num_output) for row in rows]
        blocks = {block for block, _ in self.slots}
        free = [block for block in blocks if self.pool.state(block) is BlockState.FREE]
        assert after is None or isinstance(after, Job)
        job = Job(self, plan, kept, after, free, self.result_fails(after is not None))
        self.queue.append(job)
        self.unread.append(job)
        if self.is_quick:
            self.run(job)
        return job

    def fell_short(self) -> None:
        self.short = True
        raise torch.OutOfMemoryError("no room for the step")

    def run(self, until: Job | None = None) -> None:
        """Do the work up to a step, or all of it."""
        while self.queue and not (until is not None and until.done):
            job = self.queue.pop(0)
            self._run(job)
            job.done = True

    def copy_now(self, copies: Collection[BlockCopy]) -> None:
        """Not in the order of the steps: whoever copies so must have waited for them."""
        found = {(c.target, slot): self.slots.get((c.source, slot)) for c in copies for slot in range(c.num_tokens)}
        for place, context in found.items():
            self._write(place, context)

    def forget_segment(self, segment: int) -> None:
        size = self.pool.segment_blocks
        self.slots = {place: context for place, context in self.slots.items() if place[0] // size != segment}

    def holds(self, sequence: Sequence) -> bool:
        """Whether the memory has what the sequence has computed, by its block table."""
        tokens, table = tuple(sequence.tokens), sequence.block_table
        return all(self.slots.get(self._place(table, p)) == tokens[: p + 1] for p in range(sequence.num_computed))

    def _run(self, job: Job) -> None:
        for block in job.free:
            for slot in range(self.pool.block_size):
                self.slots.pop((block, slot), None)
        for copy in job.plan.copies:
            for slot in range(copy.num_tokens):
                self._write((copy.target, slot), None if job.fails else self.slots.get((copy.source, slot)))
        contexts: list[Context | None] = []
        written: set[tuple[int, int]] = set()
        for chunk in job.plan.chunks:
            token_ids = [self._known(token, chunk, job) for token in chunk.token_ids]
            context = self._read(chunk.block_table, chunk.start)
            for position, token in enumerate(token_ids, chunk.start):
                place = self._place(chunk.block_table, position)
                assert place not in written, "two rows of a step write to one slot"
                written.add(place)
                spoilt = job.fails or (chunk.samples and chunk.sequence.id in self.spoilt)
                context = None if context is None or spoilt else (*context, token)
                self._write(place, context)
            contexts.append(context)
        row = 0
        for chunk, context in zip(job.plan.chunks, contexts, strict=True):
            if chunk.samples:
                if chunk.sequence.id in self.spoilt:
                    job.bad.add(row)
                job.sampled[chunk.sequence] = 0 if job.fails else self._sample(context, job.rows[row])
                row += 1

    def _known(self, token: int, chunk: Chunk, job: Job) -> int:
        if token != UNKNOWN:
            return token
        assert job.after is not None
        return job.after.sampled[chunk.sequence]

    def _sample(self, context: Context | None, row: _Row) -> int:
        if context is None or row.num_output != len(context) - row.num_prompt:
            return WRONG
        if row.tokens != context[: len(row.tokens)] or len(context) - len(row.tokens) > 1:
            return WRONG
        return next_token(context, row.num_output, row.params)

    def _read(self, table: tuple[int, ...], num_tokens: int) -> Context | None:
        """The context of so many slots, if each goes on from the one before."""
        context: Context = ()
        for position in range(num_tokens):
            found = self.slots.get(self._place(table, position))
            if found is None or len(found) != position + 1 or found[:-1] != context:
                return None
            context = found
        return context

    def _place(self, table: Collection[int], position: int) -> tuple[int, int]:
        size = self.pool.block_size
        return list(table)[position // size], position % size

    def _write(self, place: tuple[int, int], context: Context | None) -> None:
        assert place[0] // self.pool.segment_blocks in self.segments(), "a step writes to memory that was given back"
        if context is None:
            self.slots.pop(place, None)
        else:
            self.slots[place] = context
