"""Slow segments are told by how long they take to read."""

import pytest
import torch

from edgekv.engine.canary import slow_segments, time_reads
from edgekv.engine.kv_pool import KVPool, PoolShape


@pytest.mark.parametrize(
    ("read_s", "slow"),
    [
        ({}, ()),
        ({0: 0.02}, ()),
        ({0: 0.02, 1: 0.021, 2: 0.03}, ()),
        ({0: 0.02, 1: 0.4, 2: 0.079, 3: 0.5}, (3, 1)),
        ({5: 0.5, 2: 0.5, 1: 0.02}, (2, 5)),
        ({0: 0.4, 1: 0.4}, ()),  # all over PCIe: none is told from the others
        ({0: 0.0, 1: 0.0}, ()),
    ],
)
def test_a_segment_that_takes_four_times_as_long_as_the_quickest_is_slow(
    read_s: dict[int, float], slow: tuple[int, ...]
) -> None:
    assert slow_segments(read_s) == slow


def test_main_memory_is_not_timed() -> None:
    device = torch.device("cpu")
    pool = KVPool(PoolShape(1, 1, 8), dtype=torch.float32, device=device, block_size=8, segment_blocks=4)
    pool.add_segment(4)
    assert time_reads(pool.cache.segments, device) == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card")
def test_a_card_is_timed_segment_by_segment() -> None:
    device = torch.device("cuda:0")
    pool = KVPool(PoolShape(4, 8, 128), dtype=torch.float16, device=device, block_size=16, segment_blocks=64)
    for _ in range(3):
        pool.add_segment(64)
    seconds = time_reads(pool.cache.segments, device)
    assert seconds.keys() == {0, 1, 2}
    assert all(0 < each < 0.1 for each in seconds.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card")
def test_a_removed_segment_is_the_drivers_again() -> None:
    device = torch.device("cuda:0")
    pool = KVPool(PoolShape(32, 8, 128), dtype=torch.float16, device=device, block_size=16, segment_blocks=128)
    pool.add_segment(1)
    before = torch.cuda.mem_get_info(device)[0]
    indices = [pool.add_segment(128) for _ in range(4)]
    assert before - torch.cuda.mem_get_info(device)[0] >= 4 * 128 * pool.block_bytes
    for index in indices:
        pool.remove_segment(index)
    assert before - torch.cuda.mem_get_info(device)[0] < pool.block_bytes * 128
