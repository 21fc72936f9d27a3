"""The scheduler finishes every sequence, with the output it would have had alone, whatever the pool and the faults."""

from hashlib import blake2b
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekv.core.block_pool import BlockPool
from edgekv.core.kv_cache import KVCache
from edgekv.core.prefix_cache import PrefixCache
from edgekv.core.sampling import SamplingParams
from edgekv.core.scheduler import SPARED_AFTER, Limits, Scheduler, Vacated
from edgekv.core.sequence import FinishReason, Sequence, SequenceSpec
from edgekv.core.step import Finished, Sampled, StepPlan
from tests.property.simulated_memory import SimulatedMemory

BLOCK_SIZE = 4


def next_token(tokens: list[int]) -> int:
    """A model whose next token depends on every token before."""
    return blake2b(bytes(t % 251 for t in tokens), digest_size=1).digest()[0] % 3


class SimulatedEngine:
    """Runs plans against the plain model of memory: what it reads decides what it says."""

    def __init__(self, pool_blocks: int, limits: Limits, *, prefix: bool = True) -> None:
        pool = BlockPool(block_size=BLOCK_SIZE, segment_blocks=4)
        for first in range(0, pool_blocks, 4):
            pool.add_segment(min(4, pool_blocks - first))
        self.cache = KVCache(pool, PrefixCache(BLOCK_SIZE) if prefix else None)
        self.scheduler = Scheduler(self.cache, limits)
        self.memory = SimulatedMemory(self.cache)
        self.outputs: dict[int, list[int]] = {}
        self.finished: list[Finished] = []
        self.order: list[int] = []

    def run(self, plan: StepPlan) -> None:
        self.memory.forget_free_blocks()
        self.memory.copy(list(plan.copies))
        chosen = []
        for chunk in plan.chunks:
            self.memory.compute(_as_planned(chunk.sequence, list(chunk.block_table)), chunk.start, chunk.end)
            if chunk.samples:
                chosen.append(Sampled(next_token(chunk.sequence.tokens)))
        outcome = self.scheduler.complete(plan, chosen)
        for out in outcome.tokens:
            self.outputs.setdefault(out.sequence_id, []).append(out.sampled.token_id)
        self.finished += outcome.finished
        self.order += [f.sequence_id for f in outcome.finished]

    def step(self, *, fails: bool = False) -> None:
        plan = self.scheduler.plan()
        assert plan.chunks, "nothing can run although something is unfinished"
        assert plan.num_tokens <= max(self.scheduler.limits.max_step_tokens, len(plan.chunks))
        if fails:
            self.scheduler.retreat(plan)
        else:
            self.run(plan)
        self.scheduler.check_integrity()


def _as_planned(sequence: Sequence, table: list[int]) -> Sequence:
    assert sequence.block_table == table, "the plan shows another block table than the sequence has"
    return sequence


def alone(prompt: tuple[int, ...], max_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


requests = st.lists(
    st.tuples(
        st.lists(st.integers(0, 2), min_size=1, max_size=20),  # tail of the prompt
        st.integers(0, 20),  # how much of the common beginning comes before it
        st.integers(1, 12),  # max_tokens
        st.integers(0, 2),  # priority
        st.integers(0, 10),  # the step at which it arrives
    ),
    min_size=1,
    max_size=9,
)
COMMON = [0, 1, 2, 2, 1, 0, 0, 1, 1, 2, 0, 2, 1, 1, 0, 2, 2, 0, 1, 2]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    requests=requests,
    pool_blocks=st.integers(13, 30),
    limits=st.builds(Limits, st.integers(1, 6), st.integers(1, 40), st.integers(1, 8)),
    failing_steps=st.sets(st.integers(0, 40), max_size=6),
    prefix=st.booleans(),
)
def test_every_sequence_ends_once_with_its_own_output(
    requests: list[tuple[list[int], int, int, int, int]],
    pool_blocks: int,
    limits: Limits,
    failing_steps: set[int],
    prefix: bool,
) -> None:
    engine = SimulatedEngine(pool_blocks, limits, prefix=prefix)
    arrivals = sorted(enumerate(requests), key=lambda item: item[1][4])
    step = 0
    while arrivals or engine.scheduler.busy:
        while arrivals and (arrivals[0][1][4] <= step or not engine.scheduler.busy):
            number, (tail, common, max_tokens, priority, _) = arrivals.pop(0)
            prompt = tuple(COMMON[:common] + tail)
            engine.scheduler.submit(SequenceSpec(number, prompt, SamplingParams(max_tokens), priority))
        engine.step(fails=step in failing_steps)
        step += 1
        assert step < 3000, "no progress"
    assert sorted(engine.order) == list(range(len(requests)))
    for number, (tail, common, max_tokens, _, _) in enumerate(requests):
        assert engine.outputs[number] == alone(tuple(COMMON[:common] + tail), max_tokens)
    engine.cache.flush()
    assert engine.cache.pool.free_blocks == pool_blocks


@settings(max_examples=150, deadline=None)
@given(requests=requests, aborts=st.dictionaries(st.integers(0, 8), st.integers(0, 15)))
def test_an_abort_frees_its_blocks_and_disturbs_nobody(
    requests: list[tuple[list[int], int, int, int, int]], aborts: dict[int, int]
) -> None:
    engine = SimulatedEngine(16, Limits(4, 16, 8))
    for number, (tail, common, max_tokens, priority, _) in enumerate(requests):
        prompt = tuple(COMMON[:common] + tail)
        engine.scheduler.submit(SequenceSpec(number, prompt, SamplingParams(max_tokens), priority))
    step = 0
    while engine.scheduler.busy:
        for number in [n for n, when in aborts.items() if when == step]:
            engine.scheduler.abort(number)
            engine.scheduler.check_integrity()
        if engine.scheduler.busy:
            engine.step()
        step += 1
    for number, (tail, common, max_tokens, _, _) in enumerate(requests):
        expected = alone(tuple(COMMON[:common] + tail), max_tokens)
        output = engine.outputs.get(number, [])
        assert output == expected[: len(output)]
        assert len(output) == len(expected) or number in aborts
    assert engine.cache.pool.active_blocks == 0


def submit(engine: SimulatedEngine, number: int, prompt: list[int], max_tokens: int = 4, priority: int = 0) -> None:
    engine.scheduler.submit(SequenceSpec(number, tuple(prompt), SamplingParams(max_tokens), priority))


def test_ten_blocks_serve_eight_long_sequences() -> None:
    engine = SimulatedEngine(10, Limits())
    for number in range(8):
        submit(engine, number, [number % 3] * (20 + number), 12)
    while engine.scheduler.busy:
        engine.step()
    assert sorted(engine.order) == list(range(8))
    assert all(engine.outputs[n] == alone((n % 3,) * (20 + n), 12) for n in range(8))


def test_preemption_happens_and_takes_the_least_to_recompute_of_the_lowest_priority() -> None:
    engine = SimulatedEngine(8, Limits(max_sequences=3))
    submit(engine, 0, [0] * 8, 12)
    submit(engine, 1, [1] * 4, 12)
    submit(engine, 2, [2] * 4, 12, priority=1)
    preempted: list[int] = []
    while engine.scheduler.busy:
        plan = engine.scheduler.plan()
        preempted += plan.preempted
        engine.run(plan)
    assert preempted[:2] == [2, 1]
    assert engine.order[0] == 0


def test_an_urgent_sequence_overtakes_the_queue() -> None:
    engine = SimulatedEngine(16, Limits(max_sequences=1))
    for number, priority in enumerate([5, 5, 0]):
        submit(engine, number, [number] * 4, 3, priority)
    while engine.scheduler.busy:
        engine.step()
    assert engine.order == [2, 0, 1]


def test_a_long_prompt_never_holds_up_a_decode() -> None:
    engine = SimulatedEngine(64, Limits(max_sequences=4, max_step_tokens=64, mixed_step_tokens=8))
    submit(engine, 0, [0], 30)
    engine.step()
    submit(engine, 1, [1] * 100, 2)
    for _ in range(10):
        plan = engine.scheduler.plan()
        assert plan.chunks[0].sequence.id == 0, "the decode goes first"
        assert plan.num_tokens <= 8
        engine.run(plan)


def test_many_decodes_never_keep_the_others_out() -> None:
    engine = SimulatedEngine(200, Limits(max_sequences=20, max_step_tokens=64, mixed_step_tokens=8))
    for number in range(20):
        submit(engine, number, [number] * 9, 30)
    for _ in range(20):
        engine.step()
    assert len(engine.scheduler.plan().chunks) == 20


def test_a_prompt_that_is_done_costs_a_decode_nothing() -> None:
    class CountingDict(dict[bytes, int]):
        lookups = 0

        def get(self, *args: Any) -> Any:
            self.lookups += 1
            return super().get(*args)

    engine = SimulatedEngine(128, Limits(max_sequences=2, max_step_tokens=8, mixed_step_tokens=8))
    keys = engine.scheduler._prefilling_keys._owners = CountingDict()
    submit(engine, 0, [0] * 80, 20)
    while engine.scheduler.running == [] or engine.scheduler.running[0].num_uncomputed > 1:
        engine.step()
    submit(engine, 1, [1] * 80, 2)
    while engine.scheduler.busy:
        engine.step()
    assert keys.lookups == 2 * 80 // BLOCK_SIZE, "each block of a prompt is looked up once"


def test_a_shared_prompt_that_arrives_twice_at_once_is_computed_once() -> None:
    engine = SimulatedEngine(64, Limits(max_step_tokens=16))
    prompt = [0, 1, 2, 1] * 10
    for number in range(4):
        submit(engine, number, prompt)
    while engine.scheduler.busy:
        engine.step()
    counters = engine.scheduler.counters
    assert counters.computed_prompt_tokens == len(prompt) + 3
    assert counters.cached_prompt_tokens == 3 * (len(prompt) - 1)


def test_cached_tokens_are_exact_to_the_token() -> None:
    engine = SimulatedEngine(64, Limits())
    submit(engine, 0, [0, 1, 2] * 10 + [0, 0, 1], 4)
    while engine.scheduler.busy:
        engine.step()
    engine.scheduler.take_started()
    submit(engine, 1, [0, 1, 2] * 10 + [0, 2, 2], 4)
    engine.step()
    (started,) = engine.scheduler.take_started()
    assert started.cached_tokens == 31
    assert started.miss == "diverged: at token 31 of block 7 from the longest match"


def test_a_follow_up_reuses_the_answer_too() -> None:
    engine = SimulatedEngine(64, Limits())
    submit(engine, 0, [0, 1, 2] * 5, 7)
    while engine.scheduler.busy:
        engine.step()
    engine.scheduler.take_started()
    conversation = [0, 1, 2] * 5 + engine.outputs[0] + [1, 1]
    submit(engine, 1, conversation, 2)
    engine.step()
    (started,) = engine.scheduler.take_started()
    assert started.cached_tokens == 15 + 6, "all but the last token of the answer, whose keys were never needed"


def test_a_sequence_that_never_fits_is_refused_with_the_numbers() -> None:
    engine = SimulatedEngine(10, Limits())
    with pytest.raises(ValueError, match=r"38 \+ 4 tokens never fit a pool of 40 tokens"):
        submit(engine, 0, [0] * 38, 4)


def test_when_the_pool_became_too_small_the_head_of_the_queue_is_hopeless() -> None:
    engine = SimulatedEngine(10, Limits())
    submit(engine, 7, [0] * 30, 4)
    engine.cache.pool.remove_segment(0)
    engine.cache.pool.forget_growth()
    assert not engine.scheduler.plan().chunks
    assert engine.scheduler.hopeless() == [7]
    (finished,) = engine.scheduler.give_up([7], FinishReason.OUT_OF_MEMORY, "too small")
    assert finished.reason is FinishReason.OUT_OF_MEMORY
    assert not engine.scheduler.busy


def test_nobody_is_hopeless_while_the_pool_may_grow_back() -> None:
    engine = SimulatedEngine(10, Limits())
    submit(engine, 7, [0] * 30, 4)
    engine.cache.pool.remove_segment(0)
    assert not engine.scheduler.plan().chunks
    assert engine.scheduler.hopeless() == []
    submit(engine, 8, [1] * 36, 4)
    engine.cache.pool.add_segment(4)
    while engine.scheduler.busy:
        engine.step()
    assert sorted(engine.order) == [7, 8], "what fits the pool as it may be is not refused either"


def test_whoever_is_too_large_for_the_present_pool_keeps_nobody_waiting_and_loses_no_place() -> None:
    engine = SimulatedEngine(12, Limits(max_sequences=1))
    submit(engine, 0, [0] * 30, 4)
    engine.cache.pool.remove_segment(0)
    engine.cache.pool.remove_segment(1)
    for number in (1, 2, 3):
        submit(engine, number, [number % 3] * 5, 3)
    while len(engine.order) < 2:
        engine.step()
    assert engine.order == [1, 2]
    engine.cache.pool.add_segment(4)
    engine.cache.pool.add_segment(4)
    while engine.scheduler.busy:
        engine.step()
    assert engine.order == [1, 2, 0, 3]
    assert engine.outputs[0] == alone((0,) * 30, 4)


def test_batch_work_is_one_in_eleven_under_a_constant_stream_of_interactive_work() -> None:
    engine = SimulatedEngine(40, Limits(max_sequences=1))
    for number in range(4):
        submit(engine, number, [0, 1], 2, priority=10)
    for number in range(4, 60):
        submit(engine, number, [1, 2], 2, priority=0)
    while len(engine.order) < 33:
        engine.step()
    assert [place for place, number in enumerate(engine.order) if number < 4] == [1, 12, 23]


def test_a_sequence_that_was_preempted_often_is_taken_only_beside_older_ones_of_that_kind() -> None:
    engine = SimulatedEngine(16, Limits(max_sequences=3))
    for number, priority in ((0, 10), (1, 0), (2, 0)):
        submit(engine, number, [number] * 12, 16, priority)
    engine.step()
    assert engine.scheduler.num_running == 3
    spared = next(s for s in engine.scheduler.running if s.id == 0)
    spared.num_preemptions = SPARED_AFTER
    preempted: list[int] = []
    while engine.scheduler.busy:
        plan = engine.scheduler.plan()
        preempted += plan.preempted
        engine.run(plan)
    assert preempted
    assert 0 not in preempted, "whatever its priority"
    assert sorted(engine.order) == [0, 1, 2]


def test_a_segment_is_vacated_under_running_sequences_unless_that_breaks_a_promise() -> None:
    engine = SimulatedEngine(16, Limits())
    for number in range(3):
        submit(engine, number, [number] * 9, 12)
    for _ in range(4):
        engine.step()
    for remaining in (12, 8):
        vacated = engine.scheduler.vacate(1, keep_promises=True)
        (segment,) = vacated.segments
        engine.memory.copy_all(list(vacated.copies))
        engine.cache.pool.remove_segment(segment)
        engine.memory.forget_segment(segment)
        engine.scheduler.check_integrity()
        assert engine.cache.pool.total_blocks == remaining
    vacated = engine.scheduler.vacate(1, keep_promises=True)
    assert vacated == Vacated((), ()), "four blocks cannot hold a sequence of 21 tokens"
    while engine.scheduler.busy:
        engine.step()
    assert engine.outputs == {n: alone((n,) * 9, 12) for n in range(3)}
