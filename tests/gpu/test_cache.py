"""What is written to the cache on the card: a step's keys and values, and blocks copied."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from edgekv.kernels.attn import block_copy, kv_append
from edgekv.kernels.attn.gpu_layout import BlockOrder, GpuCache, GpuKvFormat
from edgekv.kernels.attn.kv_append import QkNorm, RopeTable
from edgekv.kernels.attn.kv_codec import decode
from edgekv.kernels.rt.registry import KernelSpec
from tests.gpu import bounds
from tests.gpu.bed import Bed
from tests.kernels.fibers.paged_memory import FAMILIES, FORMATS, Family, Pool, assert_near, ints, padded, rounded

ORDERS = tuple(BlockOrder)


def specs(bed: Bed) -> Iterator[KernelSpec]:
    yield block_copy.spec()
    for family in FAMILIES.values():
        yield kv_append.spec(family.layout(), family.act)


@pytest.mark.parametrize("touched", ["as they are", "normed and turned", "and rotated"])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=str)
def test_a_step_is_written_as_the_reference_writes_it(family: Family, touched: str, bed: Bed) -> None:
    number = list(FAMILIES.values()).index(family)
    spans = bed.sized(card=((0, 300), (517, 1), (30, 70), (64, 1)), host=((30, 4), (7, 1)))
    kv_heads, heads = bed.sized(card=4, host=2), bed.sized(card=12, host=3)
    layout = family.layout(kv_heads=kv_heads, order=ORDERS[number % 2], segment_blocks=bed.sized(card=16, host=2))
    blocks = sum(-(-(start + length) // family.block_size) for start, length in spans)
    pool, layer = Pool(layout, blocks, number, holes=(0,)), number % 2
    tables = [pool.take(start + length) for start, length in spans]
    tokens = [(start + i, row) for row, (start, length) in enumerate(spans) for i in range(length)] + [(-1, 0)] * 2
    positions, rows = [position for position, _ in tokens], [row for _, row in tokens]
    wide = pool.normal(len(tokens), heads + 2 * kv_heads, family.head_dim).to(family.act)
    norm = rope = own_norm = own_rope = None
    if touched != "as they are":
        weights = [pool.normal(family.head_dim) + 1 for _ in range(2)]
        norm, own_norm = QkNorm(*weights, 1e-6), QkNorm(*map(bed.put, weights), 1e-6)
        turns = pool.normal(len(tokens), family.head_dim // 2) * 7
        angles = torch.stack((turns.cos(), turns.sin()), 1)
        rope, own_rope = RopeTable(angles), RopeTable(bed.put(angles))
    hadamard = touched == "and rotated"

    cache, moved = bed.cache(pool), bed.put(wide)
    sizes = (heads, kv_heads, kv_heads)
    q, k, v = moved.split(sizes, 1)
    q_out = torch.full(q.shape, torch.nan, dtype=family.act, device=bed.device)
    numbers = [bed.put(each) for each in (ints(positions), padded(tables), ints(rows))]
    bed.run(
        kv_append.prepare(
            cache, layer, q, k, v, q_out, positions=numbers[0], block_table=numbers[1], table_rows=numbers[2],
            norm=own_norm, rope=own_rope, hadamard=hadamard,
        )
    )  # fmt: skip
    assert torch.equal(moved.cpu(), wide), "what was read has changed"

    q, k, v = wide.split(sizes, 1)
    queries = kv_append.reference(
        pool.cache, layer, q, k, v, positions=positions, tables=tables, table_rows=rows, norm=norm, rope=rope,
        hadamard=hadamard,
    )  # fmt: skip
    is_exact = norm is None and rope is None and not hadamard
    there = torch.tensor(positions) >= 0
    assert_near(
        q_out.cpu()[there], queries[there], (0.0, 0.0) if is_exact else rounded(bounds.QUERIES, family.act)
    )
    for index, segment in cache.segments.items():
        _assert_written(segment.cpu(), pool.segments[index], pool.cache, layer, is_exact=is_exact)


def _assert_written(got: Tensor, wanted: Tensor, cache: GpuCache, layer: int, *, is_exact: bool) -> None:
    """The segment has what it should have; keys that were computed may be a step of the format off."""
    layout, wanted = cache.layout, wanted.clone()
    own, of_largest, absolute = bounds.KEYS[layout.kv_format]
    if not is_exact:
        rows, scales = layout.rows(got, layer)[0], layout.scales(got, layer)[0]
        wanted_rows, wanted_scales = layout.rows(wanted, layer)[0], layout.scales(wanted, layer)[0]
        keys, right = (
            decode(codes, numbers, layout.kv_format)
            for codes, numbers in ((rows, scales), (wanted_rows, wanted_scales))
        )
        written = right.isfinite()
        assert torch.equal(keys.isfinite(), written)
        bound = own * right.abs() + of_largest * right.abs().amax(-1, keepdim=True) + absolute
        assert ((keys - right).abs() <= bound)[written].all()
        wanted_rows.copy_(rows)
        wanted_scales.copy_(scales)
    assert torch.equal(got, wanted), "bytes beside those of the step have changed, or values have"


@pytest.mark.parametrize("orders", [(0, 0), (1, 1), (0, 1), (1, 0)])
@pytest.mark.parametrize("kv_format", FORMATS)
def test_blocks_are_copied_and_nothing_else_changes(kv_format: GpuKvFormat, orders: tuple[int, int], bed: Bed) -> None:
    family = Family(kv_format, bed.sized(card=128, host=64), 16, torch.bfloat16)
    pools = [
        Pool(
            family.layout(
                kv_heads=bed.sized(card=8, host=1), num_layers=bed.sized(card=5, host=2), order=ORDERS[order],
                segment_blocks=(8, 4)[side],
            ),
            24, side, holes=[2],
        )
        for side, order in enumerate(orders)
    ]  # fmt: skip
    source, target = pools
    for pool in pools:
        pool.scribble(pool.generator)
    counts = (16, 1, 15, 7, 2, 16)
    copies = [(source.free.pop(), target.free.pop(), count) for count in counts]
    copies.insert(1, (-1, 0, 0))
    caches = [bed.cache(pool) for pool in pools]
    numbers = bed.put(ints(number for copy in copies for number in copy).view(-1, 3))
    bed.run(block_copy.prepare(caches[0], caches[1], numbers))
    block_copy.reference(source.cache, target.cache, copies)
    for index, segment in caches[1].segments.items():
        assert torch.equal(segment.cpu(), target.segments[index])
