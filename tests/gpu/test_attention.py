"""The attention kernels on the card: every format and head dim, contexts long and short, as their references say."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from edgekv.kernels.attn import decode_split, gather_dequant, lse_merge, prefill_paged
from edgekv.kernels.attn.gpu_layout import BlockOrder, GpuKvFormat
from edgekv.kernels.attn.splits import Splits, cut_of, make_parts
from edgekv.kernels.rt.registry import KernelSpec
from tests.gpu import bounds
from tests.gpu.bed import Bed
from tests.kernels.fibers.paged_memory import FAMILIES, FORMATS, Family, Pool, assert_near, ints, padded, rounded

ORDERS = tuple(BlockOrder)
PREFILL_FAMILIES = [
    Family(kv_format, head_dim, (16, 32)[(i + j) % 2], (torch.bfloat16, torch.float16)[(i + j // 2) % 2], group)
    for i, kv_format in enumerate(each for each in FORMATS if each is not GpuKvFormat.F32)
    for j, (head_dim, group) in enumerate(((64, 4), (96, 3), (128, 8), (256, 1)))
]

of_families = pytest.mark.parametrize("family", FAMILIES.values(), ids=str)


def specs(bed: Bed) -> Iterator[KernelSpec]:
    for family in FAMILIES.values():
        layout = family.layout()
        yield decode_split.spec(layout, family.group, family.act)
        yield lse_merge.spec(family.head_dim, family.act)
        yield gather_dequant.spec(layout, family.act)
    for family in PREFILL_FAMILIES:
        yield prefill_paged.spec(family.layout(), family.act, bed.operands(family.act))


@dataclass(frozen=True)
class Look:
    """How queries look at their contexts."""

    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False
    is_cut: bool = True


LOOKS = (Look(), Look(is_cut=False), Look(window=40, has_sinks=True), Look(softcap=20.0))


class Batch:
    """Sequences of such contexts on a pool, and one query at the end of each; a part of a wider matrix."""

    def __init__(self, bed: Bed, family: Family, order: BlockOrder, seed: int) -> None:
        self.bed, self.family = bed, family
        self.contexts = bed.sized(card=[2100, 517, 0, 64, 1, 33, 900], host=[70, 0, 33])
        kv_heads = bed.sized(card=4, host=2)
        layout = family.layout(kv_heads=kv_heads, order=order, segment_blocks=bed.sized(card=32, host=4))
        blocks = sum(-(-context // family.block_size) for context in self.contexts)
        self.pool = Pool(layout, blocks + 3, seed, holes=(1,))
        self.layer = seed % 2
        self.tables = [self.pool.fill(self.layer, context) for context in self.contexts]
        self.cache = bed.cache(self.pool)
        self.table, self.ends = bed.put(padded(self.tables)), bed.put(ints(self.contexts))
        self.heads = kv_heads * family.group
        wide = self.pool.normal(len(self.contexts), self.heads + 2 * kv_heads, family.head_dim).to(family.act)
        self.q = wide[:, : self.heads]
        self.sinks = self.pool.normal(self.heads)
        self.scale = 1.7 / math.sqrt(family.head_dim)

    def attend(self, look: Look) -> Tensor:
        bed, heads = self.bed, (self.heads, self.family.head_dim)
        splits = Splits(
            bed.sized(card=bed.card.decode_blocks, host=9), self.cache.layout.num_kv_heads,
            self.family.block_size, bed.sized(card=8, host=1),
        )  # fmt: skip
        parts = cut = None
        if look.is_cut:
            cut = bed.put(cut_of(splits, self.contexts, window=look.window))
            parts = make_parts(splits.most_parts(len(self.contexts), self.table.shape[1]), *heads, bed.device)
            parts.values.fill_(torch.nan)
            parts.states.fill_(torch.nan)
        out = torch.full((len(self.contexts), *heads), torch.nan, dtype=self.q.dtype, device=bed.device)
        sinks, q = bed.put(self.sinks) if look.has_sinks else None, bed.put(self.q)
        prepared = [
            decode_split.prepare(
                self.cache, self.layer, q, out, block_table=self.table, contexts=self.ends, cut=cut, parts=parts,
                scale=self.scale, window=look.window, softcap=look.softcap, sinks=sinks,
            )
        ]  # fmt: skip
        if parts is not None and cut is not None:
            prepared.append(lse_merge.prepare(parts, out, slots=cut[1:], sinks=sinks))
        bed.run(prepared)
        return out.cpu()

    def expected(self, look: Look) -> Tensor:
        return decode_split.reference(
            self.pool.cache, self.layer, self.q, self.tables, self.contexts, scale=self.scale, window=look.window,
            softcap=look.softcap, sinks=self.sinks if look.has_sinks else None,
        )  # fmt: skip


@of_families
def test_decode_is_as_the_formula_says(family: Family, bed: Bed) -> None:
    number = list(FAMILIES.values()).index(family)
    batch = Batch(bed, family, ORDERS[number % 2], number)
    for look in LOOKS:
        got, wanted = batch.attend(look), batch.expected(look)
        print(f"{look}: {(got.float() - wanted).abs().max():.2g}")
        assert_near(got, wanted, rounded(bounds.DECODE[family.kv_format], family.act))
        assert torch.equal(batch.attend(look), got), "another run has other bits"


def test_the_tokens_of_a_float32_chunk_share_a_row_of_the_table(bed: Bed) -> None:
    family = FAMILIES[GpuKvFormat.F32, 128]
    batch = Batch(bed, family, BlockOrder.BLOCK_MAJOR, 5)
    length = bed.sized(card=300, host=5)
    ends = [*range(batch.contexts[0] - length + 1, batch.contexts[0] + 1)]
    q = batch.pool.normal(length, batch.heads, family.head_dim).to(family.act)
    out = torch.empty_like(q, device=bed.device)
    rows, contexts, queries = bed.put(ints([0] * length)), bed.put(ints(ends)), bed.put(q)
    bed.run(
        decode_split.prepare(
            batch.cache, batch.layer, queries, out, block_table=batch.table, contexts=contexts,
            scale=batch.scale, table_rows=rows, window=90,
        )
    )  # fmt: skip
    wanted = decode_split.reference(
        batch.pool.cache, batch.layer, q, batch.tables, ends, scale=batch.scale, table_rows=[0] * length, window=90
    )
    assert_near(out.cpu(), wanted, rounded(bounds.DECODE[GpuKvFormat.F32], family.act))


@of_families
def test_contexts_are_gathered(family: Family, bed: Bed) -> None:
    number = list(FAMILIES.values()).index(family)
    batch = Batch(bed, family, ORDERS[(number + 1) % 2], number)
    begins = [context // 3 for context in batch.contexts]
    lengths = [end - begin for end, begin in zip(batch.contexts, begins, strict=True)]
    first_rows = [2 + sum(lengths[:i]) for i in range(len(lengths))]
    shape = (batch.cache.layout.num_kv_heads, 4 + sum(lengths), family.head_dim)
    keys, values = (torch.full(shape, torch.nan, dtype=family.act, device=bed.device) for _ in range(2))
    own_begins, rows = bed.put(ints(begins)), bed.put(ints(first_rows))
    bed.run(
        gather_dequant.prepare(
            batch.cache, batch.layer, keys, values, block_table=batch.table, contexts=batch.ends, first_rows=rows,
            max_blocks=batch.table.shape[1], begins=own_begins,
        )
    )  # fmt: skip
    limits = rounded(bounds.GATHERED[family.kv_format], family.act)
    sides = [side.cpu() for side in (keys, values)]
    for i, table in enumerate(batch.tables):
        own = slice(first_rows[i], first_rows[i] + lengths[i])
        wanted = gather_dequant.reference(batch.pool.cache, batch.layer, table, batch.contexts[i], begins[i])
        for side, expected in zip(sides, wanted, strict=True):
            assert_near(side[:, own].transpose(0, 1), expected, limits)
    for side in sides:
        assert side[:, :2].isnan().all()
        assert side[:, -2:].isnan().all()


@pytest.mark.parametrize("family", PREFILL_FAMILIES, ids=str)
def test_chunks_are_attended_to_by_matrix_units(family: Family, bed: Bed) -> None:
    number = PREFILL_FAMILIES.index(family)
    lengths = bed.sized(card=[300, 0, 64, 1, 17], host=[18, 0, 3])
    befores = bed.sized(card=[700, 9, 0, 500, 31], host=[21, 4, 0])
    contexts = [before + length for before, length in zip(befores, lengths, strict=True)]
    kv_heads = bed.sized(card=4, host=1)
    layout = family.layout(kv_heads=kv_heads, order=ORDERS[number % 2], segment_blocks=bed.sized(card=16, host=4))
    blocks = sum(-(-context // family.block_size) for context in contexts)
    pool = Pool(layout, blocks + 3, number, holes=(0,))
    tables = [pool.fill(1, context) for context in contexts]
    first_rows = [1 + i + sum(lengths[:i]) for i in range(len(lengths))]
    heads = kv_heads * family.group
    q = pool.normal(sum(lengths) + len(lengths) + 1, heads + 2, family.head_dim).to(family.act)[:, :heads]
    sinks, scale = pool.normal(heads), 1.7 / math.sqrt(family.head_dim)
    cache, table, queries = bed.cache(pool), bed.put(padded(tables)), bed.put(q)
    numbers = [bed.put(ints(each)) for each in (first_rows, lengths, contexts)]
    counted = np.empty(len(lengths) + 1, np.int32)
    prefill_paged.count_tiles(np.array(lengths, np.int32), family.group, counted)
    tiles = bed.put(torch.from_numpy(counted))
    operands = bed.operands(family.act)
    coarser = torch.bfloat16 if torch.bfloat16 in (operands, family.act) else torch.float16
    for look in (Look(), Look(window=50, has_sinks=True), Look(softcap=20.0)):
        out = torch.full(q.shape, torch.nan, dtype=family.act, device=bed.device)
        own_sinks = bed.put(sinks) if look.has_sinks else None
        bed.run(
            prefill_paged.prepare(
                cache, 1, queries, out, block_table=table, first_rows=numbers[0], lengths=numbers[1],
                tiles=tiles, contexts=numbers[2], scale=scale, operands=operands, window=look.window,
                softcap=look.softcap, sinks=own_sinks,
            )
        )  # fmt: skip
        wanted = prefill_paged.reference(
            pool.cache, 1, q, tables, first_rows, lengths, contexts, scale=scale, window=look.window,
            softcap=look.softcap, sinks=sinks if look.has_sinks else None,
        )  # fmt: skip
        got, written = out.cpu(), ~wanted.isnan()
        print(f"{look}: {(got[written].float() - wanted[written]).abs().max():.2g}")
        assert got[~written].isnan().all(), "rows of nobody were written"
        assert_near(got[written], wanted[written], bounds.PREFILL[family.kv_format, coarser])
