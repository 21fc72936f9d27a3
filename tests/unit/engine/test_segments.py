"""Lease, memory and block numbers of a segment come and go together."""

import pytest
import torch

from edgekv.core.block_pool import BlockPool
from edgekv.core.kv_cache import KVCache
from edgekv.core.ledger import Ledger
from edgekv.core.prefix_cache import PrefixCache
from edgekv.core.sampling import SamplingParams
from edgekv.core.scheduler import Limits, Scheduler
from edgekv.core.sequence import SequenceSpec
from edgekv.engine.kv_pool import KVPool, PoolShape
from edgekv.engine.segments import Segments


class Pool:
    """Three segments of four blocks, nothing in them."""

    def __init__(self) -> None:
        self.blocks = BlockPool(block_size=8, segment_blocks=4)
        cpu = torch.device("cpu")
        self.memory = KVPool(PoolShape(2, 1, 4), dtype=torch.float32, device=cpu, block_size=8, segment_blocks=4)
        self.ledger = Ledger(1 << 20)
        self.segments = Segments(self.blocks, self.memory, self.ledger)
        for _ in range(3):
            self.segments.add(4, self.ledger.reserve("kv.target", 4 * self.memory.block_bytes))
        self.scheduler = Scheduler(KVCache(self.blocks, PrefixCache(8)), Limits())
        self.segment_bytes = 4 * self.memory.block_bytes


def test_shrinking_gives_back_at_least_what_was_asked() -> None:
    pool = Pool()
    assert pool.segments.shrink(pool.scheduler, pool.segment_bytes + 1) == 2 * pool.segment_bytes
    assert pool.ledger.leased_bytes == pool.memory.num_bytes == pool.segments.num_bytes == pool.segment_bytes
    assert pool.blocks.total_blocks == pool.memory.num_blocks == 4


def test_a_promise_to_an_admitted_sequence_bounds_it() -> None:
    pool = Pool()
    pool.scheduler.submit(SequenceSpec(1, (1,) * 30, SamplingParams(max_tokens=30)))
    assert pool.segments.shrink(pool.scheduler, 10 * pool.segment_bytes) == pool.segment_bytes
    assert pool.blocks.total_blocks * 8 >= 60


def test_a_lease_of_another_size_is_refused_and_nothing_kept() -> None:
    pool = Pool()
    with pytest.raises(ValueError, match="a lease of 7 bytes for 4 blocks"):
        pool.segments.add(4, pool.ledger.reserve("kv.target", 7))
    assert pool.memory.num_blocks == pool.blocks.total_blocks == 12
