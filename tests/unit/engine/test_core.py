"""One step: plan, forward, sample, report; and what a fault in it costs."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from edgekv.core.block_pool import BlockPool
from edgekv.core.kv_cache import KVCache
from edgekv.core.ledger import Ledger
from edgekv.core.prefix_cache import PrefixCache
from edgekv.core.sampling import SamplingParams
from edgekv.core.scheduler import Limits, Scheduler
from edgekv.core.sequence import FinishReason, SequenceSpec
from edgekv.core.step import Resize, StepPlan, StepReport
from edgekv.engine.core import GUARD_S, EngineCore
from edgekv.engine.kv_pool import KVPool, PoolShape
from edgekv.engine.sampler import Sampler
from edgekv.engine.segments import Segments

VOCAB = 11
Fault = Callable[[StepPlan], None]


class CountingRunner:
    """A model that says one more than the last token; `fault` may raise or spoil a step."""

    def __init__(self) -> None:
        self.fault: Fault | None = None
        self.nan_sequences: set[int] = set()

    def forward(self, plan: StepPlan) -> Tensor:
        if self.fault is not None:
            self.fault(plan)
        sampling = [chunk for chunk in plan.chunks if chunk.samples]
        logits = torch.zeros(len(sampling), VOCAB)
        for row, chunk in enumerate(sampling):
            logits[row, (chunk.sequence.tokens[-1] + 1) % VOCAB] = 9.0
            if chunk.sequence.id in self.nan_sequences:
                logits[row, 0] = float("nan")
        return logits


class Harness:
    """A core, and all that it has reported."""

    def __init__(self, *, segments: int = 0) -> None:
        """A pool of 16 blocks and fixed size, or an elastic one of so many segments of 16 blocks."""
        cpu = torch.device("cpu")
        self.blocks = BlockPool(block_size=4, segment_blocks=16)
        elastic = None
        if segments:
            memory = KVPool(PoolShape(1, 1, 2), dtype=torch.float32, device=cpu, block_size=4, segment_blocks=16)
            self.segment_bytes = 16 * memory.block_bytes
            ledger = Ledger(100 + segments * self.segment_bytes)
            ledger.reserve("weights", 100)
            elastic = Segments(self.blocks, memory, ledger)
            for _ in range(segments):
                elastic.add(16, ledger.reserve("kv.target", self.segment_bytes))
        else:
            self.blocks.add_segment(16)
        self.runner = CountingRunner()
        self.scheduler = Scheduler(KVCache(self.blocks, PrefixCache(4)), Limits())
        self.core = EngineCore(self.scheduler, self.runner, Sampler(VOCAB, cpu), VOCAB, elastic)
        self.outputs: dict[int, list[int]] = {}
        self.reasons: dict[int, FinishReason] = {}
        self.details: dict[int, str] = {}

    def submit(self, number: int, prompt: tuple[int, ...] = (1, 2, 3), **params: object) -> None:
        sampling = SamplingParams(**{"max_tokens": 4, "temperature": 0.0, **params})  # type: ignore[arg-type]
        self.core.submit(SequenceSpec(number, prompt, sampling))

    def order(self, **what: int) -> None:
        self.core.resize(Resize(**{"budget_bytes": 1 << 30, **what}))  # type: ignore[arg-type]
        self.scheduler.check_integrity()

    def step(self) -> StepReport:
        report = self.core.step()
        self.scheduler.check_integrity()
        for token in report.tokens:
            self.outputs.setdefault(token.sequence_id, []).append(token.sampled.token_id)
        for finished in report.finished:
            assert finished.sequence_id not in self.reasons, "a sequence ended twice"
            self.reasons[finished.sequence_id] = finished.reason
            self.details[finished.sequence_id] = finished.detail
        return report

    def run(self) -> None:
        for _ in range(200):
            if not self.core.busy:
                return
            self.step()
        pytest.fail("no end")


def out_of_memory(_: StepPlan) -> None:
    raise torch.OutOfMemoryError("the card is full")


def test_a_sequence_ends_at_max_tokens() -> None:
    harness = Harness()
    harness.submit(1)
    harness.run()
    assert harness.outputs == {1: [4, 5, 6, 7]}
    assert harness.reasons == {1: FinishReason.LENGTH}


def test_a_stop_token_ends_a_sequence_and_is_marked() -> None:
    harness = Harness()
    harness.submit(1, stop_token_ids=frozenset({6}))
    harness.step()
    harness.step()
    report = harness.step()
    assert [(t.sampled.token_id, t.is_stop) for t in report.tokens] == [(6, True)]
    assert harness.reasons == {1: FinishReason.STOP}


def test_a_stop_token_does_not_count_before_min_tokens() -> None:
    harness = Harness()
    harness.submit(1, stop_token_ids=frozenset({4}), min_tokens=2, max_tokens=5)
    harness.run()
    assert len(harness.outputs[1]) == 5
    assert 4 not in harness.outputs[1][:2]


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ((1, VOCAB), {}, "outside the vocabulary"),
        ((-1,), {}, "outside the vocabulary"),
        ((), {}, "empty prompt"),
        ((1,), {"max_tokens": 0}, "max_tokens is 0"),
        ((1,), {"max_tokens": 10_000}, "never fit"),
        ((1,), {"temperature": float("nan")}, "temperature"),
        ((1,), {"logit_bias": ((VOCAB, 1.0),)}, "logit_bias"),
    ],
)
def test_a_sequence_that_cannot_run_is_reported_and_hurts_nobody(
    prompt: tuple[int, ...], params: dict[str, object], message: str
) -> None:
    harness = Harness()
    harness.submit(1)
    harness.submit(2, prompt, **params)
    harness.run()
    assert harness.reasons == {1: FinishReason.LENGTH, 2: FinishReason.ERROR}
    assert message in harness.details[2]
    assert harness.outputs == {1: [4, 5, 6, 7]}


@pytest.mark.parametrize("failing_step", range(5))
def test_out_of_memory_in_any_step_with_company_costs_only_time(failing_step: int) -> None:
    harness = Harness()
    prompts = {1: (1, 2, 3), 2: (1, 2, 3, 4, 5, 6), 3: (1, 2, 3, 4, 5, 9)}
    for number, prompt in prompts.items():
        harness.submit(number, prompt)
    harness.submit(4, max_tokens=20)  # so that nobody is ever alone
    for step in range(30):
        harness.runner.fault = out_of_memory if step == failing_step else None
        if harness.core.busy:
            harness.step()
    for number, prompt in prompts.items():
        assert harness.outputs[number] == [(prompt[-1] + 1 + i) % VOCAB for i in range(4)]
    assert set(harness.reasons.values()) == {FinishReason.LENGTH}


def test_a_sequence_that_runs_out_of_memory_alone_ends_and_the_next_one_runs() -> None:
    harness = Harness()

    def too_long(plan: StepPlan) -> None:
        if any(chunk.sequence.id == 2 for chunk in plan.chunks):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    harness.runner.fault = too_long
    for number in (1, 2, 3):
        harness.submit(number)
    harness.run()
    assert harness.reasons[2] is FinishReason.OUT_OF_MEMORY
    assert harness.reasons[1] is harness.reasons[3] is FinishReason.LENGTH
    assert harness.scheduler.cache.pool.active_blocks == 0


def too_full_for(num_segments: int, pool: BlockPool) -> Fault:
    """The card has room for a step only beside so few segments."""

    def fault(_: StepPlan) -> None:
        if len(pool.segments) > num_segments:
            raise torch.OutOfMemoryError("the card is full")

    return fault


def test_a_sequence_alone_is_tried_again_with_a_smaller_pool_which_stays_small() -> None:
    harness = Harness(segments=4)
    harness.runner.fault = too_full_for(2, harness.blocks)
    harness.submit(1)
    harness.run()
    assert harness.outputs == {1: [4, 5, 6, 7]}
    memory = harness.core.stats().memory
    assert memory is not None
    assert memory.facts.kv_bytes == memory.facts.ceiling_bytes == 2 * harness.segment_bytes
    assert harness.core.stats().most_blocks == harness.blocks.total_blocks
    harness.order(grow_bytes=10 * harness.segment_bytes)
    assert len(harness.blocks.segments) == 2, "it did not fit once, and would not again"


def test_a_sequence_for_which_nothing_can_be_given_back_ends() -> None:
    harness = Harness(segments=2)
    harness.runner.fault = out_of_memory
    harness.submit(1, max_tokens=60)  # needs one segment whole
    harness.run()
    assert harness.reasons[1] is FinishReason.OUT_OF_MEMORY
    assert len(harness.blocks.segments) == 1, "what it may need is kept until it ends"


def test_out_of_memory_in_a_pool_lent_to_others_ends_nobody_and_lowers_no_ceiling() -> None:
    harness = Harness(segments=4)
    harness.submit(1, max_tokens=120)  # needs two segments
    harness.step()
    harness.order(shrink_bytes=2 * harness.segment_bytes)
    harness.runner.fault = too_full_for(1, harness.blocks)
    for _ in range(100):
        harness.step()
    assert harness.reasons == {}
    harness.runner.fault = None
    harness.order(grow_bytes=10 * harness.segment_bytes)
    assert len(harness.blocks.segments) == 4
    harness.run()
    assert len(harness.outputs[1]) == 120


def test_out_of_memory_in_a_lent_pool_of_nothing_but_pinned_prefixes_ends_nobody_either() -> None:
    harness = Harness(segments=2)
    harness.submit(1, (1, 2, 3, 4, 5))
    harness.run()
    cache = harness.scheduler.cache
    cache.pin_prefix("greeting", cache.chain((1, 2, 3, 4), b""))
    harness.order(shrink_bytes=2 * harness.segment_bytes)
    assert len(harness.blocks.segments) == 1
    harness.submit(2)
    harness.runner.fault = out_of_memory
    for _ in range(10):
        harness.step()
    harness.runner.fault = None
    harness.run()
    assert harness.reasons[2] is FinishReason.LENGTH


def test_under_a_guard_a_sequence_alone_gives_nothing_up_before_that_has_had_its_chance() -> None:
    harness = Harness(segments=4)
    now_s = 100.0
    harness.core.clock = lambda: now_s
    harness.order()
    harness.runner.fault = too_full_for(3, harness.blocks)
    harness.submit(1)
    for _ in range(5):
        harness.step()
        assert len(harness.blocks.segments) == 4
    harness.order(hold=True)
    now_s += 10 * GUARD_S
    harness.order()
    harness.step()
    harness.step()
    assert len(harness.blocks.segments) == 4, "no time has passed for steps"
    harness.order(shrink_bytes=harness.segment_bytes)
    harness.step()
    assert harness.step().stats.most_blocks == 64, "it was others' need, and ends with it"
    harness.runner.fault = too_full_for(2, harness.blocks)
    harness.order(grow_bytes=harness.segment_bytes)
    for _ in range(3):
        harness.step()
    assert harness.blocks.most_blocks == 64
    now_s += GUARD_S
    assert harness.step().stats.most_blocks == 48, "nobody took it: the pool is too large for this device"
    harness.run()
    assert harness.reasons == {1: FinishReason.LENGTH}


def test_an_order_shrinks_below_every_promise_and_the_sequences_only_wait() -> None:
    harness = Harness(segments=3)
    for number in (1, 2):
        harness.submit(number, max_tokens=100)
    harness.step()
    harness.order(budget_bytes=1, shrink_bytes=10 * harness.segment_bytes)
    report = harness.step()
    assert report.stats.pool.total_blocks == 0
    assert (report.stats.running, report.stats.waiting) == (0, 2)
    memory = report.stats.memory
    assert memory is not None
    assert memory.facts.given_back_bytes == 3 * harness.segment_bytes
    assert memory.leases == {"weights": 100}
    assert (memory.budget_bytes, memory.wanted_budget_bytes) == (100, 1), "never below what is leased"
    for _ in range(3):
        assert harness.step().finished == ()
    harness.submit(3, max_tokens=100)
    assert harness.step().finished == (), "what fits the pool as it may be again is not refused"
    harness.order(grow_bytes=10 * harness.segment_bytes)
    memory = harness.step().stats.memory
    assert memory is not None
    assert (memory.facts.taken_bytes, memory.facts.num_resizes) == (3 * harness.segment_bytes, 2)
    harness.run()
    assert {number: len(output) for number, output in harness.outputs.items()} == {1: 100, 2: 100, 3: 100}


def test_while_held_no_step_runs_and_there_is_something_to_do_only_when_there_is_something_to_say() -> None:
    harness = Harness(segments=1)
    harness.submit(1)
    harness.step()
    harness.order(hold=True)
    assert harness.core.busy
    memory = harness.step().stats.memory
    assert memory is not None
    assert memory.held
    assert not harness.core.busy
    harness.submit(2, (VOCAB,))
    assert harness.core.busy, "a refusal is to be told"
    assert [finished.sequence_id for finished in harness.step().finished] == [2]
    harness.core.abort(1)
    assert harness.core.busy
    assert harness.step().stats.running == 0
    harness.submit(3)
    assert not harness.core.busy
    harness.order(hold=False)
    harness.run()
    assert len(harness.outputs[3]) == 4
    assert harness.core.stats().steps == 5


def test_an_idle_engine_reports_every_resize_also_one_that_came_to_nothing() -> None:
    harness = Harness(segments=2)
    harness.order()
    assert not harness.core.busy, "a budget alone is no news"
    for order in ({"shrink_bytes": 1}, {"grow_bytes": harness.segment_bytes}, {"grow_bytes": harness.segment_bytes}):
        harness.order(**order)
        assert harness.core.busy
        harness.step()
        assert not harness.core.busy
    memory = harness.core.stats().memory
    assert memory is not None
    assert (memory.facts.num_resizes, memory.facts.taken_bytes) == (3, harness.segment_bytes)


def test_a_resize_is_reported_before_the_next_step_however_long_that_takes() -> None:
    harness = Harness(segments=3)
    harness.submit(1)
    harness.step()
    harness.order(shrink_bytes=1)
    report = harness.step()
    memory = report.stats.memory
    assert memory is not None
    assert (memory.facts.num_resizes, report.stats.steps, report.tokens) == (1, 1, ())
    assert harness.step().stats.steps == 2


def test_a_pool_of_fixed_size_obeys_what_it_can() -> None:
    harness = Harness()
    harness.order(shrink_bytes=1, hold=True)
    assert harness.step().stats.memory is None
    harness.submit(1)
    assert not harness.core.busy


def test_any_other_error_of_a_step_is_not_swallowed() -> None:
    harness = Harness()

    def broken(_: StepPlan) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    harness.runner.fault = broken
    harness.submit(1)
    with pytest.raises(RuntimeError, match="shapes"):
        harness.step()


def test_logits_that_are_not_finite_end_their_sequence_only_and_nothing_of_it_is_reused() -> None:
    harness = Harness()
    harness.runner.nan_sequences = {2}
    harness.submit(1, (1, 2, 3, 4, 5))
    harness.submit(2, (7, 7, 7, 7, 7, 7, 7, 7, 7))
    harness.run()
    assert harness.reasons == {1: FinishReason.LENGTH, 2: FinishReason.ERROR}
    assert harness.outputs == {1: [6, 7, 8, 9]}
    harness.runner.nan_sequences = set()
    harness.submit(3, (7, 7, 7, 7, 7, 7, 7, 7, 7))
    report = harness.step()
    assert report.started[0].cached_tokens == 0


def test_what_several_spoilt_sequences_share_is_not_reused_either() -> None:
    harness = Harness()
    for number in (1, 2):
        harness.submit(number, (7,) * 9)
    harness.step()
    harness.step()
    assert harness.scheduler.num_running == 2
    harness.runner.nan_sequences = {1, 2}
    harness.run()
    assert harness.reasons == {1: FinishReason.ERROR, 2: FinishReason.ERROR}
    harness.submit(3, (7,) * 9)
    assert harness.step().started[0].cached_tokens == 0


def test_an_abort_frees_the_blocks_at_once() -> None:
    harness = Harness()
    harness.submit(1, max_tokens=20)
    harness.step()
    harness.core.abort(1)
    assert harness.core.stats().pool.active_blocks == 0
    assert harness.core.busy, "there is news for whoever counts blocks"
    assert harness.step().stats.running == 0
    harness.core.abort(1)
    assert not harness.core.busy


def test_stats_count_what_happened() -> None:
    harness = Harness()
    harness.submit(1, (1, 2, 3, 4, 5, 6, 7, 8, 9))
    harness.run()
    harness.submit(2, (1, 2, 3, 4, 5, 6, 7, 8, 1))
    harness.run()
    stats = harness.core.stats()
    assert (stats.prompt_tokens, stats.cached_prompt_tokens, stats.computed_prompt_tokens) == (18, 8, 10)
    assert stats.generated_tokens == 8
    assert stats.misses == {"cold": 1}


def test_seconds_in_the_model_are_counted_and_no_others() -> None:
    harness = Harness()
    clock = iter(range(100)).__next__
    harness.core.clock = clock
    harness.submit(1)
    stats = harness.step().stats
    assert stats.steps == 1
    assert stats.forward_s == 1.0, "two readings of a clock that goes on by 1 with each"
    assert harness.core.stats().forward_s == stats.forward_s
