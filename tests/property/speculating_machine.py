"""The state machine of `elastic_machine` for an engine that verifies what somebody proposes, mostly wrongly."""

import random
from collections.abc import Mapping
from collections.abc import Sequence as Listing
from dataclasses import replace

import torch
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule
from torch import Tensor

from edgekv.core.scheduler import Limits, Scheduler
from edgekv.core.sequence import FinishReason, Sequence, SequenceSpec
from edgekv.core.step import Sampled, StepPlan
from edgekv.engine.core import EngineCore
from edgekv.engine.proposer import Proposer
from edgekv.engine.sampler import NonFiniteLogits, SampleRow
from tests.property.elastic_machine import BLOCK_SIZE, ElasticMachine
from tests.property.pipelined_machine import requests
from tests.property.simulated_stream import alone, next_token


class Chance(Proposer):
    """What the machine proposes."""

    def __init__(self, machine: "SpeculatingMachine") -> None:
        self._machine = machine

    def propose(self, sequences: Listing[Sequence], most: Mapping[int, int]) -> Mapping[int, tuple[int, ...]]:
        return self._machine.propose(sequences, most)

    def observe(self, sequence_id: int, proposed: int, accepted: int) -> None:
        self._machine.observe(sequence_id, proposed, accepted)

    def forget(self, sequence_id: int) -> None:
        self._machine.forget(sequence_id)


class SpeculatingMachine(ElasticMachine):
    """Requests with draws and stops, aborts, orders and faults, while proposals come that are right by chance.

    Each sequence has the output that it would have alone; memory holds what it must behind every step.
    """

    scheduler_class: type[Scheduler] = Scheduler
    accepted = rejected = ends_within = 0

    @initialize(
        segments=st.integers(3, 6),
        more=st.integers(0, 6),
        limits=st.builds(Limits, st.integers(1, 6), st.integers(1, 40), st.integers(1, 24)),
        prefix=st.booleans(),
        right=st.sampled_from([0.0, 0.5, 0.8, 1.0]),
        first=st.lists(requests, min_size=1, max_size=3),
    )
    def build(
        self, segments: int, more: int, limits: Limits, prefix: bool, right: float, first: list[SequenceSpec]
    ) -> None:
        super().build(segments, more, limits, prefix)
        self.scheduler = self.scheduler_class(self.cache, limits)
        self.core = EngineCore(self.scheduler, self, self, vocab_size=4, pool=self.segments, proposer=Chance(self))
        self.right, self.chance = right, random.Random(7)
        self.spoilt: dict[int, int] = {}  # the tokens that it may still say, then comes a bad row
        self.aborted: set[int] = set()
        self.forgotten: set[int] = set()
        for spec in first:
            self._submit(spec)

    # ---- what the engine runs on

    def propose(self, sequences: Listing[Sequence], most: Mapping[int, int]) -> Mapping[int, tuple[int, ...]]:
        found: dict[int, tuple[int, ...]] = {}
        for sequence in sequences:
            assert most[sequence.id] < sequence.spec.sampling.max_tokens - sequence.num_output
            tokens = list(sequence.tokens)
            for _ in range(min(most[sequence.id], self.chance.randrange(10))):
                token = next_token(tuple(tokens), len(tokens) - sequence.num_prompt, sequence.spec.sampling)
                tokens.append(token if self.chance.random() < self.right else self.chance.randrange(4))
            found[sequence.id] = tuple(tokens[len(sequence.tokens) :])
        return found

    def observe(self, sequence_id: int, proposed: int, accepted: int) -> None:
        assert 0 <= accepted <= proposed
        type(self).accepted += accepted
        type(self).rejected += proposed - accepted

    def forget(self, sequence_id: int) -> None:
        self.forgotten.add(sequence_id)

    def forward(self, plan: StepPlan) -> Tensor:
        if self.fails:
            raise torch.OutOfMemoryError("no room for the step")
        self.memory.forget_free_blocks()
        self.memory.copy(list(plan.copies))
        for chunk in plan.chunks:
            assert tuple(chunk.sequence.block_table) == chunk.block_table, "the plan shows another table"
            supposed = replace(chunk.sequence, tokens=[*chunk.sequence.tokens, *chunk.proposed])
            assert tuple(supposed.tokens[chunk.start : chunk.end]) == chunk.token_ids
            self.memory.compute(supposed, chunk.start, chunk.end)
        assert plan.num_tokens <= max(self.scheduler.limits.step_tokens(0), len(plan.chunks))
        self._rows = [chunk.sequence.id for chunk in plan.sampling for _ in range(chunk.sampled)]
        return torch.arange(plan.num_sampled)

    def sample(self, logits: Tensor, rows: list[SampleRow]) -> list[Sampled]:
        assert len(logits) == len(rows)
        # Of a spoilt sequence every row after a while is bad, and the device says so for all of them at once.
        bad = tuple(i for i, row in enumerate(rows) if self._rows[int(logits[i])] in self.spoilt and row.num_output > 2)
        if bad:
            raise NonFiniteLogits(bad, len(rows))
        return [Sampled(next_token(tuple(row.tokens), row.num_output, row.params)) for row in rows]

    # ---- what happens

    @rule(spec=requests)
    def submit(self, spec: SequenceSpec) -> None:
        self._submit(spec)

    @rule(which=st.integers(0, 30))
    def spoil(self, which: int) -> None:
        """What the model says of a sequence, perhaps one to come, is not finite from its fourth token on."""
        self.spoilt.setdefault(which, max(3, len(self.outputs.get(which, []))))

    @rule(which=st.integers(0, 100))
    def abort(self, which: int) -> None:
        number = which % max(1, len(self.wanted))
        if number in self.wanted and number not in self.too_long and number not in self.ended:
            self.core.abort(number)
            self.ended[number] += 1
            self.aborted.add(number)

    def _submit(self, spec: SequenceSpec) -> None:
        spec = replace(spec, id=len(self.wanted))
        self.wanted[spec.id] = spec
        if len(spec.prompt) + spec.sampling.max_tokens > self.cache.pool.most_blocks * BLOCK_SIZE:
            self.too_long.add(spec.id)
        self.core.submit(spec)

    def _step(self) -> None:
        report = self.core.step()
        news: dict[int, int] = {}
        for out in report.tokens:
            number = out.sequence_id
            assert number not in self.ended, "a token after the end"
            output = self.outputs.setdefault(number, [])
            output.append(out.sampled.token_id)
            news[number] = news.get(number, 0) + 1
            spec = self.wanted[number]
            assert output == alone(spec.prompt, spec.sampling)[: len(output)], f"sequence {number} says another's words"
        for last in report.finished:
            self.ended[last.sequence_id] += 1
            type(self).ends_within += news.get(last.sequence_id, 0) > 1
            assert last.sequence_id in self.forgotten | self.too_long, "the proposer is not told of an end"
            self._judge(last.sequence_id, last.reason, last.detail)

    def _judge(self, number: int, reason: FinishReason, detail: str) -> None:
        spec, output = self.wanted[number], self.outputs.get(number, [])
        if reason is FinishReason.ERROR:
            assert ("never fit" in detail) == (number in self.too_long), detail
            assert number in self.too_long or self.spoilt[number] == len(output), "a used row, and no other"
        elif reason is FinishReason.OUT_OF_MEMORY:
            assert self.fails, "only a step that fails by itself ends a sequence"
        else:
            assert output == alone(spec.prompt, spec.sampling)
            stopped = len(output) > spec.sampling.min_tokens and output[-1] in spec.sampling.stop_token_ids
            assert (reason is FinishReason.STOP) == stopped

    @invariant()
    def no_block_is_kept_for_proposals(self) -> None:
        if hasattr(self, "core"):
            assert self.aborted <= self.forgotten
            for sequence in self.scheduler.running:
                blocks = self.cache.blocks_for(len(sequence.tokens))
                assert len(sequence.block_table) <= blocks, f"sequence {sequence.id} keeps a block too many"
