"""The state machine that drives a whole engine, without a model, whose memory is taken away and given back at will."""

from collections import Counter
from collections.abc import Callable

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from edgekv.core.block_pool import BlockPool
from edgekv.core.kv_cache import KVCache
from edgekv.core.ledger import Ledger
from edgekv.core.prefix_cache import PrefixCache
from edgekv.core.sampling import SamplingParams
from edgekv.core.scheduler import Limits, Scheduler
from edgekv.core.sequence import FinishReason, SequenceSpec
from edgekv.core.step import Resize, Sampled, StepPlan
from edgekv.engine.core import EngineCore
from edgekv.engine.kv_pool import KVPool, PoolShape
from edgekv.engine.sampler import SampleRow
from edgekv.engine.segments import Segments
from tests.property.simulated_memory import SimulatedMemory

BLOCK_SIZE, SEGMENT_BLOCKS = 4, 4
SEGMENT_BYTES = SEGMENT_BLOCKS * BLOCK_SIZE * 2 * 4
WEIGHT_BYTES = 1000
COMMON = [0, 1, 2, 2, 1, 0, 0, 1, 1, 2, 0, 2, 1, 1, 0, 2, 2, 0, 1, 2]


def next_token(tokens: list[int]) -> int:
    """What the sequence goes on with depends on every token before."""
    return sum(position * token for position, token in enumerate(tokens, 7)) % 3


class ScarceMemory(KVPool):
    """A device that other programs fill, so that it may have room for fewer segments than the budget says."""

    most_segments = 100
    forget: Callable[[int], None]

    def remove_segment(self, index: int) -> None:
        super().remove_segment(index)
        self.forget(index)

    def add_segment(self, num_blocks: int) -> int:
        if len(self.segments) >= self.most_segments:
            raise torch.OutOfMemoryError("the card is full")
        return super().add_segment(num_blocks)


class ElasticMachine(RuleBasedStateMachine):
    """Requests, steps, orders of every kind and failing steps, in any order."""

    ledger_class: type[Ledger] = Ledger
    segments_class: type[Segments] = Segments
    operations = 0

    @initialize(
        segments=st.integers(3, 6),
        more=st.integers(0, 6),
        limits=st.builds(Limits, st.integers(1, 6), st.integers(1, 40), st.integers(1, 8)),
        prefix=st.booleans(),
    )
    def build(self, segments: int, more: int, limits: Limits, prefix: bool) -> None:
        """A pool that may grow by `more` blocks, so that its last segment may be a small one."""
        blocks = BlockPool(block_size=BLOCK_SIZE, segment_blocks=SEGMENT_BLOCKS)
        cpu = torch.device("cpu")
        shape = PoolShape(1, 1, 1)
        self.device = ScarceMemory(
            shape, dtype=torch.float32, device=cpu, block_size=BLOCK_SIZE, segment_blocks=SEGMENT_BLOCKS, commit=False
        )
        self.ledger = self.ledger_class(WEIGHT_BYTES + 100 * SEGMENT_BYTES)
        self.ledger.reserve("weights", WEIGHT_BYTES)
        ceiling = segments * SEGMENT_BLOCKS + more
        self.segments = self.segments_class(blocks, self.device, self.ledger, ceiling_blocks=ceiling)
        for _ in range(segments):
            self.segments.add(SEGMENT_BLOCKS, self.ledger.reserve("kv.target", SEGMENT_BYTES))
        self.least_tokens = segments * SEGMENT_BLOCKS * BLOCK_SIZE
        self.cache = KVCache(blocks, PrefixCache(BLOCK_SIZE) if prefix else None)
        self.memory = SimulatedMemory(self.cache)
        self.scheduler = Scheduler(self.cache, limits)
        self.device.copy = self._copy  # type: ignore[method-assign]
        self.device.forget = self.memory.forget_segment
        self.core = EngineCore(self.scheduler, self, self, vocab_size=3, pool=self.segments)
        self.wanted: dict[int, SequenceSpec] = {}
        self.outputs: dict[int, list[int]] = {}
        self.ended: Counter[int] = Counter()
        self.too_long: set[int] = set()
        self.fails = False

    # ---- what the engine runs on

    def forward(self, plan: StepPlan) -> Tensor:
        if self.fails:
            raise torch.OutOfMemoryError("no room for the step")
        self.memory.forget_free_blocks()
        self.memory.copy(list(plan.copies))
        for chunk in plan.chunks:
            assert tuple(chunk.sequence.block_table) == chunk.block_table, "the plan shows another table"
            self.memory.compute(chunk.sequence, chunk.start, chunk.end)
        return torch.empty(0)

    def sample(self, logits: Tensor, rows: list[SampleRow]) -> list[Sampled]:
        return [Sampled(next_token(list(row.tokens))) for row in rows]

    def _copy(self, copies: object) -> None:
        self.memory.copy_all(list(copies))  # type: ignore[call-overload]

    # ---- what happens

    @rule(
        tail=st.lists(st.integers(0, 2), min_size=1, max_size=12),
        common=st.integers(0, 20),
        max_tokens=st.integers(1, 12),
        priority=st.sampled_from([0, 0, 1, 10]),
    )
    def submit(self, tail: list[int], common: int, max_tokens: int, priority: int) -> None:
        number = len(self.wanted)
        spec = SequenceSpec(number, tuple(COMMON[:common] + tail), SamplingParams(max_tokens), priority)
        self.wanted[number] = spec
        if len(spec.prompt) + max_tokens > self.cache.pool.most_blocks * BLOCK_SIZE:
            self.too_long.add(number)
        self.core.submit(spec)

    @rule(times=st.integers(1, 4))
    def step(self, times: int) -> None:
        for _ in range(times):
            if self.core.busy:
                self._step()

    @precondition(lambda self: self.core.busy)
    @rule()
    def step_without_memory(self) -> None:
        self.fails = True
        self._step()
        self.fails = False

    @precondition(lambda self: self.wanted)
    @rule(which=st.integers(0, 100))
    def abort(self, which: int) -> None:
        number = which % len(self.wanted)
        if number not in self.too_long and number not in self.ended:
            self.core.abort(number)
            self.ended[number] += 1
            self.wanted[number] = SequenceSpec(number, (), SamplingParams(1))  # nothing more is asked of it

    @rule(segments=st.integers(0, 4), odd=st.integers(0, SEGMENT_BYTES), hold=st.booleans())
    def shrink(self, segments: int, odd: int, hold: bool) -> None:
        before, asked = self.segments.num_bytes, segments * SEGMENT_BYTES + odd
        self.order(shrink_bytes=asked, hold=hold)
        assert before - self.segments.num_bytes >= min(asked, before), "nothing is pinned, so all can be had"

    @rule(segments=st.integers(0, 4), budget=st.integers(0, 12) | st.none(), hold=st.booleans())
    def grow(self, segments: int, budget: int | None, hold: bool) -> None:
        before = self.segments.num_bytes
        budget_bytes = WEIGHT_BYTES + (100 if budget is None else budget) * SEGMENT_BYTES
        self.order(budget_bytes=budget_bytes, grow_bytes=segments * SEGMENT_BYTES, hold=hold)
        grown = self.segments.num_bytes - before
        assert 0 <= grown <= segments * SEGMENT_BYTES
        assert grown == 0 or self.ledger.leased_bytes <= budget_bytes

    @rule(hold=st.booleans(), budget=st.integers(0, 12))
    def change_nothing_but_the_budget(self, hold: bool, budget: int) -> None:
        self.order(budget_bytes=budget * SEGMENT_BYTES, hold=hold)

    @rule(segments=st.integers(0, 8))
    def others_fill_the_device(self, segments: int) -> None:
        self.device.most_segments = segments

    def order(self, *, budget_bytes: int = 0, shrink_bytes: int = 0, grow_bytes: int = 0, hold: bool = False) -> None:
        self.core.resize(Resize(budget_bytes, shrink_bytes, grow_bytes, hold))
        self.memory.forget_free_blocks()
        assert self.core.busy or not (shrink_bytes or grow_bytes), "a resize is to be reported"

    def _step(self) -> None:
        report = self.core.step()
        for out in report.tokens:
            self.outputs.setdefault(out.sequence_id, []).append(out.sampled.token_id)
        for finished in report.finished:
            self.ended[finished.sequence_id] += 1
            self._judge(finished.sequence_id, finished.reason, finished.detail)

    def _judge(self, number: int, reason: FinishReason, detail: str) -> None:
        spec, output = self.wanted[number], self.outputs.get(number, [])
        tokens = list(spec.prompt)
        for token in output:
            assert token == next_token(tokens), f"sequence {number} has not its own output"
            tokens.append(token)
        assert (reason is FinishReason.ERROR) == (number in self.too_long), detail
        if reason is FinishReason.ERROR:
            assert "never fit" in detail
        elif reason is FinishReason.OUT_OF_MEMORY:
            assert self.fails, "only a step that fails by itself ends a sequence"
        else:
            assert len(output) == spec.sampling.max_tokens

    @invariant()
    def invariants_hold(self) -> None:
        type(self).operations += 1
        if hasattr(self, "core"):
            self.scheduler.check_integrity()
            self.segments.check_integrity()
            for sequence in self.scheduler.running:
                self.memory.check(sequence, sequence.num_computed)
            assert all(times == 1 for times in self.ended.values()), "a sequence ended twice"
            stats = self.core.stats().memory
            assert stats is not None
            assert sum(stats.leases.values()) == WEIGHT_BYTES + self.segments.num_bytes <= stats.budget_bytes

    def teardown(self) -> None:
        """The pool comes back, and with it everybody's turn."""
        if not hasattr(self, "core"):
            return
        self.device.most_segments = 100
        self.order(budget_bytes=WEIGHT_BYTES + 100 * SEGMENT_BYTES, grow_bytes=100 * SEGMENT_BYTES)
        assert self.segments.num_bytes == self.segments.ceiling_bytes
        steps = 0
        while self.core.busy:
            self._step()
            steps += 1
            assert steps < 3000, "no progress"
        self.invariants_hold()
        assert set(self.ended) == set(self.wanted), "a sequence was lost"
        self.cache.flush()
        assert self.cache.pool.free_blocks == self.cache.pool.total_blocks, "a block leaked"
        self.core.resize(Resize(0, shrink_bytes=100 * SEGMENT_BYTES))
        assert self.ledger.statement() == {"weights": WEIGHT_BYTES}, "a lease leaked"
