"""Lease, memory and block numbers of a segment come and go together."""

from collections.abc import Mapping

import pytest
import torch

from edgekv.core.block_pool import BlockPool
from edgekv.core.kv_cache import KVCache
from edgekv.core.ledger import Ledger
from edgekv.core.prefix_cache import PrefixCache
from edgekv.core.sampling import SamplingParams
from edgekv.core.scheduler import Limits, Scheduler
from edgekv.core.sequence import SequenceSpec
from edgekv.core.step import Sampled
from edgekv.engine import segments as segments_module
from edgekv.engine.kv_pool import KVPool, PoolShape
from edgekv.engine.segments import Segments

CPU = torch.device("cpu")
BLOCK_BYTES = 2 * 2 * 1 * 8 * 4 * 4


class ScarceMemory(KVPool):
    """A device that has room for so many segments."""

    most_segments = 100

    def add_segment(self, num_blocks: int) -> int:
        if len(self.segments) >= self.most_segments:
            raise torch.OutOfMemoryError("the card is full")
        return super().add_segment(num_blocks)


class Pool:
    """Three segments of four blocks, nothing in them."""

    def __init__(self, *, ceiling_blocks: int | None = None, budget_blocks: int = 100) -> None:
        self.blocks = BlockPool(block_size=8, segment_blocks=4)
        self.memory = ScarceMemory(PoolShape(2, 1, 4), dtype=torch.float32, device=CPU, block_size=8, segment_blocks=4)
        self.ledger = Ledger(budget_blocks * BLOCK_BYTES)
        self.segments = Segments(self.blocks, self.memory, self.ledger, ceiling_blocks=ceiling_blocks)
        for _ in range(3):
            self.segments.add(4, self.ledger.reserve("kv.target", 4 * BLOCK_BYTES))
        self.cache = KVCache(self.blocks, PrefixCache(8))
        self.scheduler = Scheduler(self.cache, Limits())

    def submit(self, number: int, prompt_tokens: int, max_tokens: int) -> None:
        prompt = tuple(range(number, number + prompt_tokens))
        self.scheduler.submit(SequenceSpec(number, prompt, SamplingParams(max_tokens=max_tokens)))

    def step(self) -> None:
        plan = self.scheduler.plan()
        self.scheduler.complete(plan, [Sampled(7) for chunk in plan.chunks if chunk.samples])

    def shrink(self, num_blocks: int, *, keep_promises: bool = False) -> int:
        given_back = self.segments.shrink(self.scheduler, num_blocks * BLOCK_BYTES, keep_promises=keep_promises)
        self.check()
        assert given_back % BLOCK_BYTES == 0
        return given_back // BLOCK_BYTES

    def grow(self, num_blocks: int) -> int:
        growth = self.segments.grow(num_blocks * BLOCK_BYTES)
        self.check()
        assert growth.num_bytes % BLOCK_BYTES == 0
        return growth.num_bytes // BLOCK_BYTES

    def check(self) -> None:
        self.segments.check_integrity()
        self.scheduler.check_integrity()


def test_shrinking_gives_back_at_least_what_was_asked_in_whole_segments() -> None:
    pool = Pool()
    assert pool.shrink(5, keep_promises=True) == 8
    assert pool.ledger.leased_bytes == pool.memory.num_bytes == pool.segments.num_bytes == 4 * BLOCK_BYTES


def test_a_promise_to_an_admitted_sequence_bounds_it() -> None:
    pool = Pool()
    pool.submit(1, 30, 30)
    assert pool.shrink(40, keep_promises=True) == 4
    assert pool.blocks.total_blocks * 8 >= 60


def test_for_others_need_it_goes_below_promises_and_preempts_what_no_longer_fits() -> None:
    pool = Pool()
    pool.submit(1, 40, 20)
    pool.submit(2, 20, 20)
    pool.step()
    assert pool.scheduler.num_running == 2
    assert pool.shrink(4) == 4
    assert pool.scheduler.num_running == 2, "both fit as they are"
    assert pool.shrink(1) == 4
    assert [sequence.id for sequence in pool.scheduler.running] == [2], "the longer one cannot run in what is left"
    assert pool.shrink(1) == 4
    assert pool.scheduler.num_running == pool.blocks.total_blocks == 0
    assert pool.scheduler.hopeless() == []


def test_what_is_pinned_stays_whatever_is_asked() -> None:
    pool = Pool()
    pool.submit(1, 24, 4)
    for _ in range(4):
        pool.step()
    pool.cache.pin_prefix("greeting", pool.cache.chain(tuple(range(1, 25)), b""))
    assert pool.segments.memory(pool.scheduler, num_resizes=0, held=False).facts.floor_bytes == 4 * BLOCK_BYTES
    assert pool.shrink(40) == 8
    assert pool.shrink(40) == 0
    assert len(pool.cache.chain(tuple(range(1, 25)), b"")) == 3


def test_nobody_has_to_go_for_the_place_that_pinned_blocks_keep() -> None:
    pool = Pool()
    pool.submit(1, 24, 4)
    for _ in range(4):
        pool.step()
    pool.cache.pin_prefix("greeting", pool.cache.chain(tuple(range(1, 25)), b""))
    pool.submit(100, 6, 2)
    pool.step()
    assert pool.shrink(40) == 8
    assert [sequence.id for sequence in pool.scheduler.running] == [100], "there is a block for it beside those"


def test_growing_takes_whole_segments_up_to_what_was_asked() -> None:
    pool = Pool(ceiling_blocks=30)
    assert pool.grow(11) == 8
    assert pool.blocks.total_blocks == 20


def test_only_the_last_segment_below_the_ceiling_may_be_smaller() -> None:
    pool = Pool(ceiling_blocks=18)
    assert pool.grow(5) == 4, "one block more would be a small segment below the ceiling"
    assert pool.grow(100) == 2
    assert pool.grow(100) == 0
    assert sorted(pool.memory.segments.values()) == [2, 4, 4, 4, 4]


def test_without_a_ceiling_of_its_own_it_grows_to_what_it_had() -> None:
    pool = Pool()
    assert pool.grow(100) == 0
    pool.shrink(8)
    assert pool.grow(100) == 8


def test_a_growth_over_the_budget_ends_there_and_says_so() -> None:
    pool = Pool(ceiling_blocks=100, budget_blocks=22)
    growth = pool.segments.grow(40 * BLOCK_BYTES)
    pool.check()
    assert growth.num_bytes == 8 * BLOCK_BYTES
    assert growth.shortfall is not None
    assert "kv.target: 2,048 bytes asked, 1,024 free" in growth.shortfall
    stats = pool.segments.memory(pool.scheduler, num_resizes=1, held=False)
    assert (stats.facts.taken_bytes, stats.shortfall) == (8 * BLOCK_BYTES, growth.shortfall)
    pool.segments.set_budget(1 << 30)
    assert pool.segments.grow(4 * BLOCK_BYTES).shortfall is None
    assert pool.segments.memory(pool.scheduler, num_resizes=2, held=False).shortfall is None


def test_a_device_without_the_memory_ends_a_growth_and_nothing_is_half_done() -> None:
    pool = Pool(ceiling_blocks=100)
    pool.memory.most_segments = 4
    growth = pool.segments.grow(40 * BLOCK_BYTES)
    pool.check()
    assert growth.num_bytes == 4 * BLOCK_BYTES
    assert growth.shortfall is not None
    assert "the card is full" in growth.shortfall


def test_any_other_error_of_a_growth_is_raised_and_its_lease_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(ceiling_blocks=100)

    def broken(num_blocks: int) -> int:
        raise RuntimeError("a bug")

    monkeypatch.setattr(pool.memory, "add_segment", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        pool.segments.grow(40 * BLOCK_BYTES)
    pool.check()


def test_when_memory_left_the_card_the_slow_segments_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool()
    pool.submit(1, 10, 4)
    pool.step()
    (held,) = {block // 4 for block in pool.scheduler.running[0].block_table}

    def timed(segments: Mapping[int, object], device: torch.device) -> dict[int, float]:
        return {index: 0.4 if index == held else 0.02 for index in segments}

    monkeypatch.setattr(segments_module, "time_reads", timed)
    pool.segments.shrink(pool.scheduler, 1, keep_promises=False, slow_first=True)
    pool.check()
    assert held not in pool.memory.segments, "the emptiest would have been another"
    assert pool.scheduler.num_running == 1


def test_a_lease_of_another_size_is_refused_and_nothing_kept() -> None:
    pool = Pool()
    with pytest.raises(ValueError, match="a lease of 7 bytes for 4 blocks"):
        pool.segments.add(4, pool.ledger.reserve("kv.target", 7))
    assert pool.memory.num_blocks == pool.blocks.total_blocks == 12
