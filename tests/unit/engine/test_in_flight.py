"""A core whose device does one step while the next is planned: who waits for what, and what a fault costs."""

from collections.abc import Callable, Collection
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edgekv.core.block_pool import BlockPool
from edgekv.core.kv_cache import KVCache
from edgekv.core.ledger import Ledger
from edgekv.core.prefix_cache import PrefixCache
from edgekv.core.sampling import SamplingParams
from edgekv.core.scheduler import Limits, Scheduler
from edgekv.core.sequence import FinishReason, SequenceSpec
from edgekv.core.step import UNKNOWN, Resize, Sampled, StepPlan, StepReport
from edgekv.engine.core import EngineCore
from edgekv.engine.kv_pool import KVPool, PoolShape
from edgekv.engine.protocols import Pending
from edgekv.engine.sample_row import SampleRow
from edgekv.engine.sampler import NonFiniteLogits, Sampler
from edgekv.engine.segments import Segments

VOCAB = 11
CPU = torch.device("cpu")
Fault = Callable[[int], None]


def logits_after(tokens: list[int]) -> Tensor:
    """A model that likes every token a little, in an order that depends on the last two, and the next number most."""
    seed = (tokens[-1] * 31 + (tokens[-2] if len(tokens) > 1 else 0)) % 101
    logits = torch.arange(VOCAB).mul(7 + seed).remainder(13).float()
    logits[(tokens[-1] + 1) % VOCAB] += 2.0
    return logits


class LateDevice:
    """Does nothing before somebody waits.

    `events` says what was begun and read, by the steps' numbers from 1; the faults are told the number of the attempt
    to begin one, or of the step that is read. No number comes out for `nan_sequences`, nor of `nan_from` for rows that
    follow so many tokens of a sequence's output.
    """

    def __init__(self) -> None:
        self.events: list[str] = []
        self.begin_fault: Fault = lambda number: None
        self.result_fault: Fault = lambda number: None
        self.nan_sequences: set[int] = set()
        self.nan_from: dict[int, int] = {}
        self.sampler = Sampler(VOCAB, CPU)
        self.num_begun = self.num_attempts = 0

    def begin(self, plan: StepPlan, rows: list[SampleRow], after: Pending | None) -> "LateStep":
        self.num_attempts += 1
        self.begin_fault(self.num_attempts)
        self.num_begun = number = self.num_begun + 1
        self.events.append(f"begin {number}")
        assert after is None or isinstance(after, LateStep)
        rows = [replace(row, tokens=list(row.tokens)) for row in rows]
        return LateStep(self, number, plan, rows, after)


class LateStep:
    """A step of it."""

    def __init__(
        self, device: LateDevice, number: int, plan: StepPlan, rows: list[SampleRow], after: "LateStep | None"
    ) -> None:
        self.device, self.number, self.plan, self.rows, self.after = device, number, plan, rows, after
        self.whose = [chunk.sequence for chunk in plan.sampling for _ in range(chunk.sampled)]
        self._tokens: list[Sampled] | None = None
        self.has_been_read = False

    def result(self, without: Collection[int] = ()) -> list[Sampled]:
        self.device.events += [] if self.has_been_read else [f"read {self.number}"]
        self.has_been_read = True
        self.device.result_fault(self.number)
        bad = tuple(row for row in range(len(self.rows)) if row not in without and self._is_bad(row))
        if bad:
            raise NonFiniteLogits(bad, len(self.rows))
        return [token for row, token in enumerate(self.tokens()) if row not in without]

    def tokens(self) -> list[Sampled]:
        if self._tokens is None:
            logits, rows = [], []
            ends = [c.end - c.sampled + place + 1 for c in self.plan.sampling for place in range(c.sampled)]
            starts = [c.token_ids for c in self.plan.sampling for _ in range(c.sampled)]
            for sequence, end, token_ids, row in zip(self.whose, ends, starts, self.rows, strict=True):
                known = list(row.tokens)
                if token_ids == (UNKNOWN,):
                    assert self.after is not None
                    known.append(self.after.tokens()[self.after.whose.index(sequence)].token_id)
                assert len(known) == end
                assert row.num_output == len(known) - row.num_prompt
                logits.append(logits_after(known))
                rows.append(SampleRow(row.params, known, row.num_prompt))
            self._tokens = self.device.sampler.sample(torch.stack(logits), rows) if rows else []
        return self._tokens

    def _is_bad(self, row: int) -> bool:
        number = self.whose[row].id
        return number in self.device.nan_sequences or self.rows[row].num_output >= self.device.nan_from.get(number, 99)


class Harness:
    """A core with a pipeline, or one without over the same model, and all that it has reported."""

    def __init__(self, *, pipelined: bool = True, segments: int = 0, max_sequences: int = 16) -> None:
        self.blocks = BlockPool(block_size=4, segment_blocks=16)
        elastic = None
        if segments:
            memory = KVPool(PoolShape(1, 1, 2), dtype=torch.float32, device=CPU, block_size=4, segment_blocks=16)
            self.segment_bytes = 16 * memory.block_bytes
            ledger = Ledger(segments * self.segment_bytes)
            elastic = Segments(self.blocks, memory, ledger)
            for _ in range(segments):
                elastic.add(16, ledger.reserve("kv.target", self.segment_bytes))
        else:
            self.blocks.add_segment(16)
        self.device = LateDevice()
        self.scheduler = Scheduler(KVCache(self.blocks, PrefixCache(4)), Limits(max_sequences=max_sequences))
        pipeline = self.device if pipelined else None
        self.core = EngineCore(self.scheduler, self, self.device.sampler, VOCAB, elastic, pipeline=pipeline)
        self.outputs: dict[int, list[Sampled]] = {}
        self.reasons: dict[int, FinishReason] = {}

    def forward(self, plan: StepPlan) -> Tensor:
        sampling = plan.sampling
        return torch.stack([logits_after(c.sequence.tokens) for c in sampling]) if sampling else torch.empty(0, VOCAB)

    def submit(self, number: int, prompt: tuple[int, ...] = (1, 2, 3), **params: object) -> None:
        sampling = SamplingParams(**{"max_tokens": 6, "temperature": 0.0, **params})  # type: ignore[arg-type]
        self.core.submit(SequenceSpec(number, prompt, sampling))

    def order(self, **what: int) -> None:
        self.core.resize(Resize(**{"budget_bytes": 1 << 30, **what}))  # type: ignore[arg-type]
        self.scheduler.check_integrity()

    def step(self) -> StepReport:
        report = self.core.step()
        self.scheduler.check_integrity()
        for token in report.tokens:
            assert token.sequence_id not in self.reasons, "a token after the end"
            self.outputs.setdefault(token.sequence_id, []).append(token.sampled)
        for finished in report.finished:
            assert finished.sequence_id not in self.reasons, "a sequence ended twice"
            self.reasons[finished.sequence_id] = finished.reason
        return report

    def run(self) -> None:
        for _ in range(200):
            if not self.core.busy:
                assert self.blocks.active_blocks == 0
                return
            self.step()
        pytest.fail("no end")

    def tokens(self, number: int) -> list[int]:
        return [sampled.token_id for sampled in self.outputs.get(number, [])]


def tokens_of(report: StepReport) -> list[int]:
    return [token.sequence_id for token in report.tokens]


def alone(prompt: tuple[int, ...] = (1, 2, 3), max_tokens: int = 6) -> list[int]:
    """The greedy output."""
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(int(logits_after(tokens).argmax()))
    return tokens[len(prompt) :]


def out_of_memory(*steps: int) -> Fault:
    def fault(number: int) -> None:
        if number in steps:
            raise torch.OutOfMemoryError("the card is full")

    return fault


def broken(_: int) -> None:
    raise RuntimeError("an illegal memory access was encountered")


# ---- the order of things


def test_each_step_is_begun_before_the_one_before_it_is_read() -> None:
    harness = Harness()
    harness.submit(1, max_tokens=4)
    reports = 0
    while harness.core.busy:
        assert tokens_of(harness.step()) == [1], "every report has something to say"
        reports += 1
    assert reports == 4
    assert harness.device.events == ["begin 1", "begin 2", "read 1", "begin 3", "read 2", "begin 4", "read 3", "read 4"]
    stats = harness.core.stats()
    assert (stats.steps, stats.ahead_steps) == (4, 3)
    assert harness.tokens(1) == alone(max_tokens=4)


def test_a_sequence_that_ends_with_its_first_token_has_no_step_behind_it() -> None:
    harness = Harness()
    harness.submit(1, max_tokens=1)
    harness.step()
    assert harness.device.events == ["begin 1", "read 1"]
    assert not harness.core.busy


def test_whoever_comes_while_a_step_is_in_flight_starts_after_it() -> None:
    harness = Harness()
    harness.submit(1)
    harness.step()
    harness.submit(2)
    assert tokens_of(harness.step()) == [1]
    assert harness.device.events[-1] == "read 2"
    report = harness.step()
    assert tokens_of(report) == [1, 2]
    assert [started.sequence_id for started in report.started] == [2]
    harness.run()
    assert harness.tokens(1) == harness.tokens(2) == alone()


def test_after_a_stop_the_step_in_flight_is_for_nobody_and_the_next_request_does_not_wait_for_a_report_of_it() -> None:
    harness = Harness()
    stop = alone()[1]
    harness.submit(1, stop_token_ids=frozenset({stop}))
    harness.step()
    report = harness.step()
    assert report.tokens[0].is_stop
    assert report.stats.pool.active_blocks == 0
    assert harness.core.busy, "a step is in flight"
    harness.submit(2)
    assert tokens_of(harness.step()) == [2]
    assert harness.device.events[-4:] == ["read 3", "begin 4", "begin 5", "read 4"]
    harness.run()
    assert harness.tokens(2) == alone()


def test_after_the_last_stop_the_step_in_flight_is_waited_for() -> None:
    harness = Harness()
    harness.submit(1, stop_token_ids=frozenset({alone()[1]}))
    harness.run()
    assert harness.device.events[-1] == "read 3"
    assert harness.tokens(1) == alone()[:2]


# ---- aborts


def test_an_abort_frees_the_blocks_at_once_and_nothing_in_flight_is_told() -> None:
    harness = Harness()
    harness.submit(1)
    harness.submit(2)
    harness.step()
    harness.core.abort(1)
    assert harness.core.stats().running == 1
    assert tokens_of(harness.step()) == [2]
    harness.core.abort(2)
    assert harness.core.stats().pool.active_blocks == 0
    report = harness.step()
    assert (report.tokens, report.finished) == ((), ())
    assert not harness.core.busy


def test_an_id_that_comes_again_while_a_step_is_in_flight_is_not_taken_for_the_one_before() -> None:
    harness = Harness()
    harness.submit(1)
    harness.submit(2)
    harness.step()
    harness.core.abort(1)
    harness.submit(1, (5, 5))
    harness.outputs.clear()
    harness.run()
    assert harness.tokens(1) == alone((5, 5))


# ---- memory


def test_before_memory_moves_the_step_in_flight_is_read_and_the_next_report_says_what_came_of_it() -> None:
    harness = Harness(segments=3)
    harness.submit(1)
    harness.step()
    harness.order()
    assert harness.device.events[-1] == "read 1", "a budget moves nothing"
    harness.order(shrink_bytes=1)
    assert harness.device.events[-1] == "read 2"
    assert harness.core.busy
    report = harness.step()
    assert tokens_of(report) == [1]
    assert report.stats.steps == 2
    harness.step()
    harness.order(grow_bytes=harness.segment_bytes)
    assert harness.device.events[-1] == "read 4"
    harness.run()
    assert harness.tokens(1) == alone()


def test_what_was_settled_is_not_told_of_a_sequence_that_is_aborted_then() -> None:
    harness = Harness(segments=2)
    harness.submit(1, max_tokens=2)
    harness.submit(2)
    harness.step()
    harness.order(hold=True)
    assert harness.core.stats().running == 1, "1 has ended"
    harness.core.abort(1)
    report = harness.step()
    assert tokens_of(report) == [2]
    assert report.finished == ()


def test_while_steps_are_held_none_is_in_flight() -> None:
    harness = Harness(segments=1)
    harness.submit(1)
    harness.step()
    harness.order(hold=True)
    assert tokens_of(harness.step()) == [1]
    assert not harness.core.busy
    assert harness.device.events[-1] == "read 2"
    harness.order(hold=False)
    harness.run()
    assert harness.tokens(1) == alone()


def test_a_core_can_be_settled_from_without() -> None:
    harness = Harness()
    harness.core.settle()
    harness.submit(1)
    harness.step()
    harness.core.settle()
    harness.core.settle()
    assert harness.device.events[-1] == "read 2"
    assert tokens_of(harness.step()) == [1, 1]
    harness.run()
    assert harness.tokens(1) == alone()


def test_an_end_that_was_settled_is_still_to_be_told() -> None:
    harness = Harness()
    harness.submit(1, max_tokens=2)
    harness.step()
    harness.core.settle()
    assert not harness.scheduler.busy
    assert harness.core.busy
    assert [last.reason for last in harness.step().finished] == [FinishReason.LENGTH]
    assert not harness.core.busy
    assert harness.tokens(1) == alone(max_tokens=2)


def test_without_a_pipeline_there_is_nothing_to_settle() -> None:
    harness = Harness(pipelined=False)
    harness.submit(1)
    harness.step()
    harness.core.settle()
    harness.run()
    assert harness.tokens(1) == alone()
    assert harness.core.stats().ahead_steps == 0


# ---- out of memory


@pytest.mark.parametrize("where", ["begin_fault", "result_fault"])
@pytest.mark.parametrize("step", range(1, 8))
def test_out_of_memory_in_any_step_with_company_costs_only_time(where: str, step: int) -> None:
    harness = Harness()
    setattr(harness.device, where, out_of_memory(step))
    prompts = {1: (1, 2, 3), 2: (1, 2, 3, 4, 5, 6), 3: (1, 2, 3, 4, 5, 9)}
    for number, prompt in prompts.items():
        harness.submit(number, prompt)
    harness.submit(4, max_tokens=20)  # so that nobody is ever alone
    harness.run()
    for number, prompt in prompts.items():
        assert harness.tokens(number) == alone(prompt)
    assert set(harness.reasons.values()) == {FinishReason.LENGTH}


def test_where_there_is_no_room_for_two_steps_they_are_done_one_by_one() -> None:
    harness = Harness()

    def only_one(_: int) -> None:
        if harness.device.events and harness.device.events[-1].startswith("begin"):
            raise torch.OutOfMemoryError("the card is full")

    harness.device.begin_fault = only_one
    harness.submit(1)
    harness.submit(2)
    harness.run()
    assert harness.tokens(1) == harness.tokens(2) == alone()
    assert harness.core.stats().ahead_steps == 0
    assert harness.core.stats().preemptions == 0


def test_a_step_that_falls_short_takes_the_one_behind_it_along() -> None:
    harness = Harness()
    harness.device.result_fault = out_of_memory(2)
    harness.submit(1)
    harness.submit(2)
    harness.step()
    report = harness.step()
    assert (report.tokens, report.stats.preemptions) == ((), 1)
    assert harness.device.events[-3:] == ["begin 3", "read 2", "read 3"], "it is waited for"
    harness.run()
    assert harness.tokens(1) == harness.tokens(2) == alone()


def test_both_may_fall_short() -> None:
    harness = Harness()
    harness.device.result_fault = out_of_memory(2, 3)
    harness.submit(1)
    harness.submit(2)
    harness.run()
    assert harness.tokens(1) == harness.tokens(2) == alone()


def test_a_sequence_that_runs_out_of_memory_alone_ends() -> None:
    harness = Harness()
    harness.device.result_fault = out_of_memory(2)
    harness.submit(1)
    harness.run()
    assert harness.reasons == {1: FinishReason.OUT_OF_MEMORY}
    assert harness.tokens(1) == alone()[:1]


def test_a_step_for_nobody_that_falls_short_costs_nobody_anything() -> None:
    harness = Harness()
    harness.device.result_fault = out_of_memory(2)
    harness.submit(1)
    harness.step()
    harness.core.abort(1)
    harness.submit(2)
    harness.run()
    assert harness.tokens(2) == alone()
    assert harness.core.stats().preemptions == 0


# ---- other faults


@pytest.mark.parametrize("where", ["begin_fault", "result_fault"])
@pytest.mark.parametrize("step", [1, 2])
def test_any_other_error_of_a_step_is_not_swallowed(where: str, step: int) -> None:
    harness = Harness()
    harness.submit(1)
    if step == 2:
        harness.step()
    setattr(harness.device, where, broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        harness.step()


def test_nor_is_one_of_a_step_that_is_thrown_away() -> None:
    harness = Harness()
    harness.submit(1)
    harness.submit(2)

    def fault(number: int) -> None:
        out_of_memory(1)(number)
        broken(number)

    harness.device.result_fault = fault
    with pytest.raises(RuntimeError, match="illegal memory access"):
        harness.step()


def test_logits_that_are_not_finite_end_their_sequence_only_and_the_step_behind_goes_on_for_the_others() -> None:
    harness = Harness()
    harness.submit(1)
    harness.submit(2)
    harness.submit(3)
    harness.step()
    harness.device.nan_sequences = {2}
    report = harness.step()
    assert tokens_of(report) == [1, 3]
    assert [(last.sequence_id, last.reason) for last in report.finished] == [(2, FinishReason.ERROR)]
    assert tokens_of(harness.step()) == [1, 3]
    assert harness.device.events[-2:] == ["begin 4", "read 3"]
    harness.run()
    assert harness.tokens(1) == harness.tokens(3) == alone()
    assert harness.reasons[2] is FinishReason.ERROR


def test_nothing_that_a_spoilt_sequence_left_is_reused() -> None:
    harness = Harness()
    harness.submit(1, (7,) * 9)
    harness.step()
    harness.device.nan_sequences = {1}
    harness.run()
    harness.device.nan_sequences = set()
    harness.submit(2, (7,) * 9)
    assert harness.step().started[0].cached_tokens == 0


def test_seconds_in_which_the_device_is_given_work_are_counted_and_no_others() -> None:
    harness = Harness()
    harness.core.clock = iter(range(100)).__next__
    harness.submit(1)
    assert harness.step().stats.forward_s == 2.0, "two steps were begun"
    assert harness.step().stats.forward_s == 3.0


# ---- the same words as step by step


params = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 9),
    seed=st.integers(0, 5),
    temperature=st.sampled_from([0.0, 1.0, 2.0]),
    top_k=st.sampled_from([None, 3]),
    repetition_penalty=st.sampled_from([1.0, 2.0]),
    presence_penalty=st.sampled_from([0.0, 1.5]),
    frequency_penalty=st.sampled_from([0.0, 1.0]),
    logprobs=st.sampled_from([None, 2]),
    min_tokens=st.integers(0, 3),
    stop_token_ids=st.frozensets(st.integers(0, VOCAB - 1), max_size=3),
)


@settings(max_examples=80, deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9), params), min_size=1, max_size=5
    ),
    max_sequences=st.integers(1, 5),
)
def test_seeds_penalties_and_least_lengths_count_the_token_that_nobody_has_read(
    requests: list[tuple[list[int], SamplingParams]], max_sequences: int
) -> None:
    said = []
    for pipelined in (False, True):
        harness = Harness(pipelined=pipelined, max_sequences=max_sequences)
        for number, (prompt, sampling) in enumerate(requests):
            harness.core.submit(SequenceSpec(number, tuple(prompt), sampling))
        harness.run()
        said.append((harness.outputs, harness.reasons))
    assert said[0] == said[1]
