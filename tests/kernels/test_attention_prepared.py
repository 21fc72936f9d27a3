"""Attention's launches can be listed for a model before there is memory: of tensors that have a shape alone."""

import torch
from torch import Tensor

from edgekv.kernels.attn import block_copy, decode_split, gather_dequant, kv_append, lse_merge, prefill_paged
from edgekv.kernels.attn.gpu_layout import BlockOrder, GpuCache, GpuKvFormat, GpuLayout
from edgekv.kernels.attn.kv_append import QkNorm, RopeTable
from edgekv.kernels.attn.splits import parts_bytes, parts_in

LAYOUT = GpuLayout(GpuKvFormat.INT8, BlockOrder.BLOCK_MAJOR, 3, 2, 64, 16, 8)
TOKENS, HEADS = 20, 6


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def ints(*shape: int) -> Tensor:
    return meta(*shape, dtype=torch.int32)


def test_launches_are_listed_before_there_is_memory() -> None:
    cache = GpuCache(LAYOUT, {}, meta(4, dtype=torch.int64))
    q, k, v = torch.split(meta(TOKENS, HEADS + 4, 64, dtype=torch.bfloat16), [HEADS, 2, 2], 1)
    out, table, numbers = meta(TOKENS, HEADS, 64, dtype=torch.bfloat16), ints(5, 9), ints(5)
    parts = parts_in(meta(parts_bytes(TOKENS + 7, HEADS, 64), dtype=torch.uint8), TOKENS + 7, HEADS, 64)
    gathered = meta(2, 40, 64, dtype=torch.bfloat16)
    prepared = [
        kv_append.prepare(
            cache, 2, q, k, v, q, positions=ints(TOKENS), block_table=table, table_rows=ints(TOKENS),
            norm=QkNorm(meta(64), meta(64), 1e-6), rope=RopeTable(meta(99, 2, 32), ints(TOKENS)),
        ),
        decode_split.prepare(
            cache, 2, q, out, block_table=table, contexts=ints(TOKENS), cut=ints(TOKENS + 2), parts=parts,
            scale=0.1, table_rows=ints(TOKENS), sinks=meta(HEADS),
        ),
        lse_merge.prepare(parts, out, slots=ints(TOKENS + 1), sinks=meta(HEADS)),
        prefill_paged.prepare(
            cache, 2, q, out, block_table=table, first_rows=numbers, lengths=numbers, tiles=ints(6),
            contexts=numbers, scale=0.1,
        ),
        gather_dequant.prepare(
            cache, 2, gathered, gathered, block_table=table, contexts=numbers, first_rows=numbers, max_blocks=9
        ),
        block_copy.prepare(cache, cache, ints(8, 3)),
    ]  # fmt: skip
    assert [each.spec for each in prepared] == [
        kv_append.spec(LAYOUT, torch.bfloat16),
        decode_split.spec(LAYOUT, 3, torch.bfloat16),
        lse_merge.spec(64, torch.bfloat16),
        prefill_paged.spec(LAYOUT, torch.bfloat16),
        gather_dequant.spec(LAYOUT, torch.bfloat16),
        block_copy.spec(),
    ]
    rows = TOKENS * (HEADS + 4)  # of keys, queries and values, 32 to a thread block of 4 lanes each
    assert [each.grid for each in prepared] == [
        (-(-rows // 32), 1, 1), (2, TOKENS + 7, 1), (HEADS, TOKENS, 1), (5, 2, 1), (9, 2, 5), (8, 3, 1),
    ]  # fmt: skip


def test_all_that_stands_for_the_rest_is_different() -> None:
    for module in (kv_append, decode_split, lse_merge, gather_dequant, block_copy):
        specs = [str(spec) for spec in module.variants()]
        assert len(specs) == len(set(specs))
        assert specs
