"""Blocks copied within a pool, between pools of both orders, and to a buffer and back."""

from collections.abc import Iterable

import pytest
import torch

from edgekv.kernels.attn import block_copy
from edgekv.kernels.attn.gpu_layout import BlockOrder, GpuCache, GpuKvFormat
from tests.kernels.fibers.covering import covering
from tests.kernels.fibers.harness import FiberFault, run_prepared
from tests.kernels.fibers.paged_memory import FORMATS, Family, Pool, ints

NONE = (-1, 0, 0)
FAMILY = Family(GpuKvFormat.INT8, 96, 16, torch.bfloat16)


def scribbled(pool: Pool) -> Pool:
    pool.scribble(pool.generator)
    return pool


def copied(source: GpuCache, target: GpuCache, copies: Iterable[tuple[int, int, int]], seed: int = 0) -> None:
    numbers = ints(number for copy in copies for number in copy).view(-1, 3)
    run_prepared(block_copy.prepare(source, target, numbers), seed=seed)


CASES = covering(
    kv_format=FORMATS,
    # 16 KiB of rows and more come in several chunks.
    shape=((64, 16, 1), (96, 16, 3), (128, 32, 2)),
    num_layers=(1, 3),
    orders=((BlockOrder.BLOCK_MAJOR,) * 2, (BlockOrder.LAYER_MAJOR,) * 2, tuple(BlockOrder), tuple(BlockOrder)[::-1]),
    segments=((1, 8), (8, 2), (2, 2)),
    is_same=(False, True),
    tokens=((None, None), (1, None, 7), (13, 2, 15)),
)


@pytest.mark.parametrize("index", range(len(CASES)))
def test_what_is_copied_arrives_and_nothing_else_changes(index: int) -> None:
    case = CASES[index]
    head_dim, block_size, kv_heads = case["shape"]
    family = Family(case["kv_format"], head_dim, block_size, torch.bfloat16)
    source, target = (
        scribbled(
            Pool(
                family.layout(
                    kv_heads=kv_heads, num_layers=case["num_layers"], order=order, segment_blocks=segment_blocks
                ),
                10,
                index + side,
                holes=[2],
            )
        )
        for side, (order, segment_blocks) in enumerate(zip(case["orders"], case["segments"], strict=True))
    )
    if case["is_same"]:
        target = source
    copies = [(source.free.pop(), target.free.pop(), tokens or block_size) for tokens in case["tokens"]]
    copies.insert(1, NONE)
    expected = {index: segment.clone() for index, segment in target.segments.items()}
    block_copy.reference(source.cache, GpuCache(target.layout, expected, target.cache.table), copies)
    copied(source.cache, target.cache, copies, seed=index)
    for number, segment in target.segments.items():
        assert torch.equal(segment, expected[number])


def test_one_launch_has_room_for_copies_that_come_later() -> None:
    pool = scribbled(Pool(FAMILY.layout(), 16))
    copies = torch.full((5, 3), -1, dtype=torch.int32)
    prepared = block_copy.prepare(pool.cache, pool.cache, copies)
    for count in (0, 3, 1):
        wanted = [(pool.free.pop(), pool.free.pop(), 16) for _ in range(count)]
        copies.fill_(-1)
        copies[:count] = torch.tensor(wanted, dtype=torch.int32).view(-1, 3)
        expected = {index: segment.clone() for index, segment in pool.segments.items()}
        block_copy.reference(pool.cache, GpuCache(pool.layout, expected, pool.cache.table), wanted)
        run_prepared(prepared, seed=count)
        for index, segment in pool.segments.items():
            assert torch.equal(segment, expected[index])


def test_blocks_go_to_a_buffer_and_come_back() -> None:
    pool = scribbled(Pool(FAMILY.layout(order=BlockOrder.LAYER_MAJOR), 16))
    parked = [pool.free.pop() for _ in range(3)]
    layout = FAMILY.layout(segment_blocks=4)
    buffer = torch.zeros(layout.segment_bytes(3), dtype=torch.uint8)  # of as many blocks as it has to hold
    staging = GpuCache(layout, {0: buffer}, torch.tensor([buffer.data_ptr()]))
    copied(pool.cache, staging, [(block, i, 16) for i, block in enumerate(parked)])
    before = [[plane.clone() for side in pool.planes(block, 1) for plane in side] for block in parked]
    for block in parked:
        for side in pool.planes(block, 1):
            side[0].zero_()
    new = [pool.free.pop() for _ in range(3)]
    copied(staging, pool.cache, [(i, block, 16) for i, block in enumerate(new)])
    for block, planes in zip(new, before, strict=True):
        for now, then in zip((plane for side in pool.planes(block, 1) for plane in side), planes, strict=True):
            assert torch.equal(now.view(torch.uint8), then.view(torch.uint8))


def test_a_segment_that_is_gone_is_never_read() -> None:
    pool = scribbled(Pool(FAMILY.layout(segment_blocks=2), 6))
    gone, block = pool.free[0], next(each for each in pool.free if each >> 1 != pool.free[0] >> 1)
    pool.remove(gone >> 1)
    with pytest.raises(FiberFault, match="where there is no memory"):
        copied(pool.cache, pool.cache, [(gone, block, 1)])
    before = {index: segment.clone() for index, segment in pool.segments.items()}
    copied(pool.cache, pool.cache, [NONE, (gone, block, 0)])
    for index, segment in pool.segments.items():
        assert torch.equal(segment, before[index])


def test_a_pool_of_other_blocks_is_refused() -> None:
    source, target = (Pool(FAMILY.layout(kv_heads=heads), 8) for heads in (1, 2))
    with pytest.raises(ValueError, match="are none of"):
        copied(source.cache, target.cache, [(0, 0, 1)])
