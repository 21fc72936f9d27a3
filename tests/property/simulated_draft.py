"""A draft model on a plain memory: each slot remembers the whole context that its keys and values were computed from.

It may be given several steps before anybody waits for the first, run short of memory, or come to nothing for one of the
sequences.
"""

import random
from collections.abc import Collection
from dataclasses import dataclass, field, replace

import torch

from edgekv.core.kv_cache import KVCache
from edgekv.core.sequence import Sequence
from edgekv.core.step import UNKNOWN, Chunk, Sampled, StepPlan
from edgekv.engine.protocols import Pending
from edgekv.engine.sample_row import SampleRow
from edgekv.engine.sampler import NonFiniteLogits
from tests.property.simulated_memory import SimulatedMemory
from tests.property.simulated_stream import next_token


@dataclass(eq=False)
class DraftJob:
    device: "DraftDevice"
    tokens: list[int] = field(default_factory=list)
    last: dict[Sequence, int] = field(default_factory=dict)
    bad: set[int] = field(default_factory=set)
    fails: bool = False

    def result(self, without: Collection[int] = ()) -> list[Sampled]:
        if self.fails:
            self.device.read(self)
            raise torch.OutOfMemoryError("no room for the draft's step")
        bad = self.bad - set(without)
        if bad:
            raise NonFiniteLogits(tuple(sorted(bad)), len(self.tokens))
        self.device.read(self)
        return [Sampled(token) for row, token in enumerate(self.tokens) if row not in without]


class DraftDevice:
    """A `Pipeline`; it chooses by itself where it `overlaps`.

    Args:
        cache: the draft's; what its free blocks held is lost in every step.
        right: how likely it chooses what the target would.
        vocab_size: the tokens that it knows; no other may be put to it.
    """

    def __init__(self, cache: KVCache, *, right: float, overlaps: bool, vocab_size: int, most_tokens: int) -> None:
        self.memory = SimulatedMemory(cache)
        self.right, self.overlaps, self.vocab_size = right, overlaps, vocab_size
        self.most_tokens = most_tokens
        self.chance = random.Random(11)
        self.unread: list[DraftJob] = []
        self.contexts: dict[Sequence, list[int]] = {}
        self.fails_in: int | None = None  # steps; then it fails, as it is begun or as it is read
        self.fails_late = False
        self.spoils_in: int | None = None  # rows; then one is bad
        self.spoilt: set[Sequence] = set()
        self.copies = self.read_tokens = 0

    def begin(self, plan: StepPlan, rows: list[SampleRow], after: Pending | None) -> DraftJob:
        assert plan.chunks, "a step of nothing"
        assert after is (self.unread[-1] if self.unread else None), "it is told another step as the one before"
        assert not self.unread or self.overlaps
        assert plan.num_tokens <= self.most_tokens
        assert len(rows) == plan.num_sampled
        job = DraftJob(self)
        if self._counts_down():
            if not self.fails_late:
                raise torch.OutOfMemoryError("no room for the draft's step")
            job.fails = True
        self.unread.append(job)
        self.memory.forget_free_blocks()
        self.memory.copy(list(plan.copies))
        self.copies += len(plan.copies)
        following = iter(rows)
        for chunk in plan.chunks:
            tokens = self._compute(chunk, after)
            self.read_tokens += len(chunk.token_ids) if not chunk.sampled else 0
            for _ in range(chunk.sampled):
                self._choose(job, chunk, tokens, next(following))
        return job

    def read(self, job: DraftJob) -> None:
        if job in self.unread:
            assert self.unread.pop(0) is job, "steps are read in the order in which they were begun"

    def _compute(self, chunk: Chunk, after: Pending | None) -> list[int]:
        own, start = chunk.sequence, chunk.start
        assert tuple(own.block_table) == chunk.block_table, "the plan shows another table"
        assert chunk.token_ids
        assert UNKNOWN not in chunk.token_ids or isinstance(after, DraftJob)
        assert UNKNOWN not in chunk.token_ids[1:]
        ids = [after.last[own] if token == UNKNOWN else token for token in chunk.token_ids]  # type: ignore[union-attr]
        before = own.tokens[:start] if start < len(own.tokens) else self.contexts[own]
        assert len(before) == start, "a step is missing before this one"
        known = own.tokens[start : chunk.end]
        assert ids[: len(known)] == known, "it reads what the sequence does not say"
        assert max(ids) < self.vocab_size, "it reads what it does not know"
        tokens = self.contexts[own] = [*before, *ids]
        if start < len(own.tokens):
            self.spoilt.discard(own)
        if own not in self.spoilt:
            self.memory.compute(replace(own, tokens=tokens), start, chunk.end)
        return tokens

    def _choose(self, job: DraftJob, chunk: Chunk, tokens: list[int], row: SampleRow) -> None:
        assert list(row.tokens) == tokens[: len(row.tokens)], "the sampler is told another past"
        assert len(row.tokens) + row.num_unknown == len(tokens)
        assert self.overlaps or row.num_unknown == 0
        assert all(token < self.vocab_size for token, _ in row.params.logit_bias)
        token = next_token(tuple(tokens), row.num_output, row.params)
        if self.chance.random() >= self.right:
            token = self.chance.randrange(self.vocab_size)
        if self._spoils() or chunk.sequence in self.spoilt:
            self.spoilt.add(chunk.sequence)
            job.bad.add(len(job.tokens))
            for position in range(chunk.start, chunk.end):
                block, slot = divmod(position, self.memory.cache.block_size)
                self.memory.slots.pop((chunk.block_table[block], slot), None)
        job.tokens.append(min(token, self.vocab_size - 1))
        job.last[chunk.sequence] = job.tokens[-1]

    def _spoils(self) -> bool:
        self.spoils_in = None if self.spoils_in is None else self.spoils_in - 1
        if self.spoils_in is None or self.spoils_in >= 0:
            return False
        self.spoils_in = None
        return True

    def _counts_down(self) -> bool:
        if self.fails_in is None:
            return False
        self.fails_in -= 1
        if self.fails_in >= 0:
            return False
        self.fails_in = None
        return True
