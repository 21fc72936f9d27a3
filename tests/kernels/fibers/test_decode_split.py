"""Decode attention over a paged cache against the formula: every format, head dim and group, whatever lies between."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edgekv.kernels.attn import decode_split, lse_merge
from edgekv.kernels.attn.gpu_layout import BlockOrder, GpuKvFormat
from edgekv.kernels.attn.splits import Parts, Splits, cut_of, part_tokens
from tests.kernels.fibers.covering import covering
from tests.kernels.fibers.harness import in_all_orders, run_prepared
from tests.kernels.fibers.paged_memory import (
    FAMILIES,
    FORMATS,
    HEAD_DIMS,
    Family,
    Pool,
    assert_near,
    ints,
    padded,
    rounded,
)

# By the cache's format: an absolute error of float32 sums in another order, for values about 1 wide; int4's rows are
# taken apart into codes and zeros, which partly cancel. What the format itself costs is not in it, since the reference
# reads the same codes. Then the result is rounded to its type.
ERRORS = {
    GpuKvFormat.BF16: 5e-6,
    GpuKvFormat.F16: 5e-6,
    GpuKvFormat.E4M3: 5e-6,
    GpuKvFormat.INT8: 5e-6,
    GpuKvFormat.INT4: 1e-5,
    GpuKvFormat.F32: 5e-6,
}

PLAIN = FAMILIES[GpuKvFormat.BF16, 128]  # of blocks of 16, four heads, and float32


def every(least_blocks: int, block_size: int = 16) -> Splits:
    """All contexts are cut into parts of so many blocks, as for a card that is never full."""
    return Splits(10**6, 1, block_size, least_blocks)


def room(slots: int, heads: int, head_dim: int) -> Parts:
    """Where nothing has been written."""
    return Parts(torch.full((slots, heads, head_dim), torch.nan), torch.full((slots, heads, 2), torch.nan))


@dataclass
class Case:
    """A batch of queries on a pool, and what one launch is told of them.

    `contexts` are those of the sequences, each with one query at its end; `chunk`: with as many queries as the last of
    its tokens, all of which have the sequence's row of the table. `least_blocks`: of a part; None: nothing is cut.
    """

    family: Family
    pool: Pool
    contexts: Sequence[int]
    layer: int = 0
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False
    least_blocks: int | None = None
    cut_window: int | None = None  # what the parts are counted for
    begins: Sequence[int] | None = None
    always_parts: bool = False
    chunk: int | None = None

    def __post_init__(self) -> None:
        layout = self.pool.layout
        self.tables = [self.pool.fill(self.layer, context) for context in self.contexts]
        self.table_rows = None
        if self.chunk is not None:
            ends = [
                (row, end)
                for row, context in enumerate(self.contexts)
                for end in range(max(0, context - self.chunk + 1), context + 1)
            ]
            self.table_rows, self.contexts = [row for row, _ in ends], [end for _, end in ends]
            if self.begins is not None:
                self.begins = [min(self.begins[row], end) for row, end in ends]
        self.heads = layout.num_kv_heads * self.family.group
        # Queries are part of a wider matrix, as a projection leaves them.
        width = self.heads + 2 * layout.num_kv_heads
        self.q = self.pool.normal(len(self.contexts), width, layout.head_dim).to(self.family.act)[:, : self.heads]
        self.sinks = self.pool.normal(self.heads) if self.has_sinks else None
        self.scale = 1.7 / math.sqrt(layout.head_dim)
        self.cut = None
        if self.least_blocks is not None:
            window = self.cut_window or self.window
            splits = every(self.least_blocks, self.family.block_size)
            self.cut = cut_of(splits, self.contexts, begins=self.begins, window=window)

    def run(self, seed: int = 0, plant: str | None = None) -> Tensor:
        """What the kernels say, [queries, heads, head_dim]."""
        out = torch.full(self.q.shape, torch.nan, dtype=self.family.act)
        parts = self._parts()
        self._attend(out, parts, seed, plant)
        if parts is not None:
            assert self.cut is not None
            merge = lse_merge.prepare(parts, out, slots=self.cut[1:], sinks=self.sinks, always_parts=self.always_parts)
            run_prepared(merge, seed=seed)
        return out

    def parts(self) -> Parts:
        """What is between the two kernels."""
        parts = self._parts()
        assert parts is not None
        self._attend(torch.empty(self.q.shape, dtype=self.family.act), parts, 0, None)
        return parts

    def expected(self) -> Tensor:
        return decode_split.reference(
            self.pool.cache, self.layer, self.q, self.tables, self.contexts, scale=self.scale,
            table_rows=self.table_rows, window=self.window, softcap=self.softcap, sinks=self.sinks, begins=self.begins,
        )  # fmt: skip

    @property
    def bounds(self) -> tuple[float, float]:
        return rounded((0.0, ERRORS[self.family.kv_format]), self.family.act)

    def _parts(self) -> Parts | None:
        if self.cut is None:
            return None
        return room(int(self.cut[-1]) + 2, self.heads, self.family.head_dim)  # as where there may be more of them

    def _attend(self, out: Tensor, parts: Parts | None, seed: int, plant: str | None) -> None:
        numbers = (self.contexts, self.table_rows, self.begins)
        contexts, table_rows, begins = (None if each is None else ints(each) for each in numbers)
        assert contexts is not None
        prepared = decode_split.prepare(
            self.pool.cache,
            self.layer,
            self.q,
            out,
            block_table=(table := padded(self.tables)),
            contexts=contexts,
            scale=self.scale,
            cut=self.cut,
            parts=parts,
            table_rows=table_rows,
            window=self.window,
            softcap=self.softcap,
            sinks=self.sinks,
            begins=begins,
            always_parts=self.always_parts and parts is not None,
        )
        run_prepared(prepared, seed=seed, plant=plant)
        del table


def check(make: Callable[[int | None], Case]) -> None:
    """A case is as the formula says, to the same bit in any order and whatever earlier owners have left."""
    case = make(None)
    result = in_all_orders(lambda seed: make(7 if seed else None).run(seed), (0, 1))
    assert_near(result, case.expected(), case.bounds)


CASES = covering(
    kv_format=FORMATS,
    head_dim=HEAD_DIMS,
    order=tuple(BlockOrder),
    kv_heads=(1, 2),
    segment_blocks=(1, 4, 16),
    contexts=((1, 17, 40), (0, 33, 90), (16, 100), (15, 32, 64)),
    window=(None, 1, 20, 70),
    softcap=(None, 1.0, 30.0),
    has_sinks=(False, True),
    least_blocks=(None, 1, 2),
    from_within=(False, True),
    always_parts=(False, False, True),
    chunk=(None, 3),
)


def batch(index: int, leftovers: int | None) -> Case:
    options = dict(CASES[index])
    family = FAMILIES[options.pop("kv_format"), options.pop("head_dim")]
    layout = family.layout(**{name: options.pop(name) for name in ("order", "kv_heads", "segment_blocks")})
    blocks = sum(-(-context // family.block_size) for context in options["contexts"])
    pool = Pool(layout, blocks + 3, index, holes=(1,) if index % 2 else (0, 2), leftovers=leftovers)
    begins = [context // 3 for context in options["contexts"]] if options.pop("from_within") else None
    return Case(family, pool, layer=index % 2, begins=begins, **options)


@pytest.mark.parametrize("index", range(len(CASES)))
def test_any_batch_is_as_the_formula_says(index: int) -> None:
    check(lambda leftovers: batch(index, leftovers))


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 40, 63, 64, 65])
def test_a_window_sees_so_many_tokens_and_no_more(window: int) -> None:
    check(lambda leftovers: Case(PLAIN, Pool(PLAIN.layout(), 8, leftovers=leftovers), [64], window=window))


def test_blocks_before_the_window_may_be_gone() -> None:
    case = Case(PLAIN, Pool(PLAIN.layout(segment_blocks=1), 8), [100], window=40, least_blocks=2)
    expected = case.expected()
    for block in case.tables[0][: (100 - 40) // 16]:
        case.pool.remove(block)
    assert_near(case.run(), expected, case.bounds)


@pytest.mark.parametrize("cut_window", [None, 390])
def test_a_context_is_cut_on_the_device_as_it_is_here(cut_window: int | None) -> None:
    contexts, begins = [0, 1, 31, 32, 33, 129, 400], [0, 0, 0, 16, 0, 50, 7]
    case = Case(
        PLAIN, Pool(PLAIN.layout(segment_blocks=64), 64), contexts, window=300, begins=begins, least_blocks=2,
        cut_window=cut_window,
    )  # fmt: skip
    case.q = torch.zeros_like(case.q).contiguous()  # all weights are 1: their sum is how many tokens were seen
    assert case.cut is not None
    states, firsts = case.parts().states, case.cut[1:].tolist()
    seen = []
    for query, (context, begin) in enumerate(zip(contexts, begins, strict=True)):
        tokens = part_tokens(case.cut, query, context, 16, begin=begin, window=300)
        if len(tokens) > 1:  # what is whole is in `out` already
            own = states[firsts[query] : firsts[query + 1], :, 1]
            assert own.tolist() == [[len(each)] * case.heads for each in tokens]
            seen.append([token for each in tokens for token in each])
            assert seen[-1] == [*range(max(begin, context - 300), context)]
    assert len(seen) == 3
    whole = [query for query in range(len(contexts)) if firsts[query + 1] - firsts[query] == 1]
    assert states[[firsts[query] for query in whole]].isnan().all()
    assert states[firsts[-1] :].isnan().all()


def test_a_cut_that_was_counted_for_others_makes_no_result_wrong() -> None:
    case = Case(PLAIN, Pool(PLAIN.layout(segment_blocks=64), 64), [400, 20, 100], least_blocks=2)
    expected = case.expected()
    for contexts in ([0, 400, 16], [900, 900, 900], [100, 20, 400]):
        case.cut = cut_of(every(2), contexts)
        assert_near(case.run(), expected, case.bounds)


def test_one_launch_serves_contexts_of_any_length() -> None:
    # As in a graph: the addresses are fixed, and what lies there changes from step to step.
    layout = PLAIN.layout(segment_blocks=32)
    pool = Pool(layout, 32)
    table, contexts = torch.zeros(2, 16, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    q, out = torch.empty(2, 8, 128), torch.empty(2, 8, 128)
    splits, cut = Splits(8, 2, 16, 2), torch.zeros(4, dtype=torch.int32)
    parts = room(splits.most_parts(2, 16), 8, 128)
    tables = [pool.fill(0, 240), pool.fill(0, 240)]
    table[:, :15] = torch.tensor(tables)
    prepared = (
        decode_split.prepare(
            pool.cache, 0, q, out, block_table=table, contexts=contexts, cut=cut, parts=parts, scale=0.1
        ),
        lse_merge.prepare(parts, out, slots=cut[1:]),
    )
    run_prepared(prepared)  # before a step was told anything there is nothing to do
    for lengths in ([240, 3], [1, 200], [33, 0], [31, 32]):
        contexts.copy_(torch.tensor(lengths))
        splits.cut(np.array(lengths), cut.numpy())
        q.copy_(pool.normal(2, 8, 128))
        run_prepared(prepared)
        expected = decode_split.reference(pool.cache, 0, q, tables, lengths, scale=0.1)
        assert_near(out, expected, (0, ERRORS[GpuKvFormat.BF16]))


def test_a_segment_may_go_between_launches() -> None:
    case = Case(PLAIN, Pool(PLAIN.layout(segment_blocks=4), 24), [60, 33, 90], least_blocks=3)
    expected, before = case.expected(), case.run()
    pool, shift = case.pool, case.pool.layout.segment_shift
    leaving = case.tables[0][0] >> shift
    pool.free = [block for block in pool.free if block >> shift != leaving]
    for table in case.tables:
        table[:] = [pool.move(block) if block >> shift == leaving else block for block in table]
    pool.remove(leaving)
    after = case.run()
    assert torch.equal(after, before)
    assert_near(after, expected, case.bounds)


def test_a_chunk_of_float32_is_attended_to_with_one_row_of_the_table() -> None:
    family = FAMILIES[GpuKvFormat.F32, 64]
    pool = Pool(family.layout(), 8)
    case = Case(family, pool, [37, 20], chunk=7, window=9)
    check(lambda leftovers: Case(family, Pool(family.layout(), 8, leftovers=leftovers), [37, 20], chunk=7, window=9))
    # Those that only fill up the launch, all of row 0, get zeros and are nobody's business.
    case.contexts, case.table_rows = [0, *case.contexts[1:]], [0, *case.table_rows[1:]]
    assert not case.run()[0].any()


def test_a_shared_prefix_is_put_before_what_is_each_sequences_own() -> None:
    layout = PLAIN.layout(segment_blocks=64)
    pool = Pool(layout, 64)
    prefix = pool.fill(1, 70)
    contexts = [100, 70 + 48, 71]
    tables = []
    for context in contexts:
        table = [*prefix[:4], *pool.take(context - 64)]
        own = pool.normal(2, context - 64, layout.num_kv_heads, 128)
        pool.write(1, table, own[0], own[1], first=64)
        tables.append(table)
    q, out = pool.normal(3, 8, 128), torch.full((3, 8, 128), torch.nan)
    sinks, table = pool.normal(8), padded(tables)
    ends, own_ends, own_begins = ints([64] * 3), ints(contexts), ints([64] * 3)
    shared, own = cut_of(every(2), [64] * 3), cut_of(every(1), contexts, begins=[64] * 3)
    slots = shared[1:] + own[1:]  # of a query first those of the prefix
    own_slots = slots[:-1] + shared[2:] - shared[1:-1]
    parts = room(int(slots[-1]), 8, 128)
    prepared = [
        decode_split.prepare(
            pool.cache, 1, q, out, block_table=table, contexts=ends, cut=shared, parts=parts, slots=slots,
            scale=0.1, always_parts=True,
        ),
        decode_split.prepare(
            pool.cache, 1, q, out, block_table=table, contexts=own_ends, cut=own, parts=parts,
            slots=own_slots, scale=0.1, begins=own_begins, always_parts=True,
        ),
        lse_merge.prepare(parts, out, slots=slots, sinks=sinks, always_parts=True),
    ]  # fmt: skip
    run_prepared(prepared, seed=5)
    expected = decode_split.reference(pool.cache, 1, q, tables, contexts, scale=0.1, sinks=sinks)
    assert_near(out, expected, (0, ERRORS[GpuKvFormat.BF16]))


@pytest.mark.parametrize("side", [0, 1])
def test_a_nan_of_its_own_reaches_a_sequence_and_no_other(side: int) -> None:
    case = Case(PLAIN, Pool(PLAIN.layout(), 8), [20, 20])
    case.pool.planes(case.tables[0][1], 0)[side][0][0, 3] = 0xFF
    result = case.run()
    assert result[0, :4].isnan().any()
    assert not result[0, 4:].isnan().any()
    assert not result[1].isnan().any()


@pytest.mark.parametrize("kv_format", FORMATS)
def test_large_scores_do_not_overflow(kv_format: GpuKvFormat) -> None:
    family = FAMILIES[kv_format, 64]
    case = Case(family, Pool(family.layout(), 8), [50], least_blocks=2)
    case.q = (case.q * 400).contiguous()
    result = case.run()
    assert result.isfinite().all()
    # Scores of thousands: an error of a 10^6th of one is an error of a 100th of the weight.
    assert_near(result, case.expected(), (0.02, 0.02))


# Each fault, and a batch in which it shows.
_FAULTS: dict[str, dict[str, Any]] = {
    "EK_PLANT_BARRIER": {"contexts": [40]},
    "EK_PLANT_STALE_V": {"contexts": [37]},
    "EK_PLANT_WINDOW": {"contexts": [60], "window": 30},
}


@pytest.mark.parametrize(
    ("fault", "kv_format"),
    [
        *((fault, GpuKvFormat.BF16) for fault in _FAULTS),
        ("EK_PLANT_STALE_V", GpuKvFormat.INT8),  # whose scales are stale
        ("EK_PLANT_BARRIER", GpuKvFormat.F32),
    ],
)
def test_a_planted_fault_is_found(fault: str, kv_format: GpuKvFormat) -> None:
    family = FAMILIES[kv_format, 128]
    case = Case(family, Pool(family.layout(), 8), **_FAULTS[fault])
    expected = case.expected()
    assert_near(case.run(), expected, case.bounds)
    results = torch.stack([case.run(seed, fault) for seed in range(4)])
    with pytest.raises(AssertionError):
        assert_near(results, expected.expand_as(results), case.bounds)


def test_what_there_is_no_kernel_for_is_refused() -> None:
    with pytest.raises(ValueError, match="17 query heads"):
        decode_split.spec(PLAIN.layout(), 17, torch.bfloat16)
    case = Case(PLAIN, Pool(PLAIN.layout(), 8), [20])
    case.q = torch.zeros(1, 8, 129)[..., 1:]
    with pytest.raises(ValueError, match="not dense or not aligned"):
        case.run()
    case.q = torch.zeros(1, 7, 128)
    with pytest.raises(ValueError, match="are none of"):
        case.run()
