"""Attention of chunks over a paged cache against the formula: every format and head dim, in every card's order."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from edgekv.kernels.attn import prefill_paged
from edgekv.kernels.attn.gpu_layout import BlockOrder, GpuCache, GpuKvFormat
from edgekv.kernels.common.prepared import Prepared
from tests.kernels.fibers.covering import covering
from tests.kernels.fibers.harness import in_all_orders, run_prepared
from tests.kernels.fibers.paged_memory import HEAD_DIMS, Family, Pool, assert_near, ints, padded

# By the cache's format and the coarser of operands and results (of the number, absolute): weights are rounded to
# operands, numbers up to 5 are averaged with them, and the result is rounded. Where the cache's numbers are rounded to
# operands, too, scores are shifted.
_B, _H = torch.bfloat16, torch.float16
ERRORS = {
    (GpuKvFormat.BF16, _B): (2**-7, 2**-8),
    (GpuKvFormat.BF16, _H): (2**-10, 2**-9),
    (GpuKvFormat.F16, _B): (2**-7, 2**-6),
    (GpuKvFormat.F16, _H): (2**-10, 2**-11),
    (GpuKvFormat.E4M3, _B): (2**-7, 2**-8),
    (GpuKvFormat.E4M3, _H): (2**-10, 2**-11),
    (GpuKvFormat.INT8, _B): (2**-7, 2**-6),
    (GpuKvFormat.INT8, _H): (2**-10, 2**-9),
    (GpuKvFormat.INT4, _B): (2**-7, 2**-6),
    (GpuKvFormat.INT4, _H): (2**-10, 2**-9),
}
FORMATS = tuple(each for each in GpuKvFormat if each is not GpuKvFormat.F32)
ORDERS = (80, 10, 11, 12)  # of mma.h: NVIDIA, gfx10, gfx11, gfx12


@dataclass(frozen=True, slots=True)
class Kind:
    """What the kernel is compiled for, and for whose matrix units; the group of its family is not compiled in."""

    family: Family
    operands: torch.dtype
    order: int

    def __str__(self) -> str:
        return f"{self.family}-{str(self.operands).removeprefix('torch.')}-order{self.order}"

    @property
    def bounds(self) -> tuple[float, float]:
        coarser = torch.bfloat16 if torch.bfloat16 in (self.operands, self.family.act) else torch.float16
        return ERRORS[self.family.kv_format, coarser]

    def of_its_card(self, prepared: Prepared) -> Prepared:
        """Compiled for the order of its matrix units, which on a card is its own."""
        defines = {**prepared.spec.defines, "EK_ORDER": self.order}
        return dataclasses.replace(prepared, spec=dataclasses.replace(prepared.spec, defines=defines))


PLAIN = Kind(Family(GpuKvFormat.BF16, 64, 16, torch.bfloat16, group=2), torch.bfloat16, 80)
IN_ALL_ORDERS = tuple(dataclasses.replace(PLAIN, order=order) for order in ORDERS)


@dataclass
class Case:
    """A batch of chunks on a poisoned pool; rows between the chunks belong to nobody."""

    kind: Kind
    pool: Pool
    lengths: Sequence[int]
    befores: Sequence[int]
    layer: int = 0
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False

    def __post_init__(self) -> None:
        layout, family = self.pool.layout, self.kind.family
        self.contexts = [before + length for before, length in zip(self.befores, self.lengths, strict=True)]
        self.tables = [self.pool.fill(self.layer, context) for context in self.contexts]
        self.heads = layout.num_kv_heads * family.group
        self.first_rows, rows = [], 1
        for length in self.lengths:
            self.first_rows.append(rows)
            rows += length + 1
        wide = self.pool.normal(rows, self.heads + 2 * layout.num_kv_heads, layout.head_dim).to(family.act)
        self.q = wide[:, : self.heads]
        self.sinks = self.pool.normal(self.heads) if self.has_sinks else None
        self.scale = 1.7 / math.sqrt(layout.head_dim)

    def run(self, seed: int = 0, plant: str | None = None) -> Tensor:
        out = torch.full(self.q.shape, torch.nan, dtype=self.q.dtype)
        table = padded(self.tables)
        first_rows, lengths, contexts = (ints(each) for each in (self.first_rows, self.lengths, self.contexts))
        tiles = tiles_of(lengths, self.kind.family.group)
        prepared = prefill_paged.prepare(
            self.pool.cache,
            self.layer,
            self.q,
            out,
            block_table=table,
            first_rows=first_rows,
            lengths=lengths,
            tiles=tiles,
            contexts=contexts,
            scale=self.scale,
            operands=self.kind.operands,
            window=self.window,
            softcap=self.softcap,
            sinks=self.sinks,
        )
        run_prepared(self.kind.of_its_card(prepared), seed=seed, plant=plant)
        return out

    def expected(self) -> Tensor:
        return prefill_paged.reference(
            self.pool.cache, self.layer, self.q, self.tables, self.first_rows, self.lengths, self.contexts,
            scale=self.scale, window=self.window, softcap=self.softcap, sinks=self.sinks,
        )  # fmt: skip


def tiles_of(lengths: Tensor, group: int) -> Tensor:
    tiles = torch.empty(len(lengths) + 1, dtype=torch.int32)
    prefill_paged.count_tiles(lengths.numpy(), group, tiles.numpy())
    return tiles


def check(make: Callable[[int | None], Case]) -> None:
    """A case is as the formula says, to the same bit in any order and whatever earlier owners have left."""
    case = make(None)
    result = in_all_orders(lambda seed: make(7 if seed else None).run(seed), (0, 1))
    assert_right(result, case.expected(), case.kind)


def assert_right(result: Tensor, expected: Tensor, kind: Kind) -> None:
    written = ~expected.isnan()
    assert result[~written].isnan().all()  # rows of nobody
    assert_near(result[written], expected[written], kind.bounds)


def pool_for(kind: Kind, tokens: int = 400, segment_blocks: int = 4, leftovers: int | None = None) -> Pool:
    layout = kind.family.layout(segment_blocks=segment_blocks)
    return Pool(layout, tokens // kind.family.block_size + 4, leftovers=leftovers)


# Each format with each head dim, and each of these with each card; the rest goes round.
_ACTS, _GROUPS = (torch.bfloat16, torch.float16), (4, 1, 7, 2, 3, 8, 5, 16, 6, 12)
KINDS = {
    (kv_format, head_dim): Kind(
        Family(kv_format, head_dim, (16, 32)[(i + j) % 2], _ACTS[(i + j // 2) % 2], _GROUPS[(4 * i + j) % 10]),
        _ACTS[(i + j // 2 + (i == 3)) % 2],
        ORDERS[(i + 3 * j) % 4],
    )
    for i, kv_format in enumerate(FORMATS)
    for j, head_dim in enumerate(HEAD_DIMS)
}
CASES = covering(
    kv_format=FORMATS,
    head_dim=HEAD_DIMS,
    order=tuple(BlockOrder),
    kv_heads=(1, 2),
    segment_blocks=(1, 4),
    # Rows of chunks, which are tokens times the group: a thread block has 64; and tokens before them.
    chunks=(((64, 0), (65, 31)), ((17, 70), (0, 5)), ((100, 16), (1, 40))),
    window=(None, 1, 20, 70),
    softcap=(None, 1.0, 30.0),
    has_sinks=(False, True),
)


def batch(index: int, leftovers: int | None) -> Case:
    options = dict(CASES[index])
    kind = KINDS[options.pop("kv_format"), options.pop("head_dim")]
    group, size = kind.family.group, kind.family.block_size
    layout = kind.family.layout(**{name: options.pop(name) for name in ("order", "kv_heads", "segment_blocks")})
    lengths, befores = zip(*((-(-rows // group), before) for rows, before in options.pop("chunks")), strict=True)
    blocks = sum(-(-(length + before) // size) for length, before in zip(lengths, befores, strict=True))
    pool = Pool(layout, blocks + 3, index, holes=(1,) if index % 2 else (0, 2), leftovers=leftovers)
    return Case(kind, pool, lengths, befores, layer=index % 2, **options)


@pytest.mark.parametrize("index", range(len(CASES)))
def test_any_chunks_are_as_the_formula_says(index: int) -> None:
    check(lambda leftovers: batch(index, leftovers))


@pytest.mark.parametrize("kind", IN_ALL_ORDERS, ids=str)
def test_in_any_cards_order(kind: Kind) -> None:
    check(lambda leftovers: Case(kind, pool_for(kind, leftovers=leftovers), [40, 33], [29, 0]))


@pytest.mark.parametrize("kind", [PLAIN, IN_ALL_ORDERS[3]], ids=str)
@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65])
def test_a_window_sees_so_many_tokens_and_no_more(kind: Kind, window: int) -> None:
    case = Case(kind, pool_for(kind), [40], [64], window=window)
    assert_right(case.run(1), case.expected(), kind)


@pytest.mark.parametrize("kind", [PLAIN, IN_ALL_ORDERS[2]], ids=str)
def test_blocks_before_the_window_may_be_gone(kind: Kind) -> None:
    case = Case(kind, pool_for(kind, segment_blocks=1), [20], [100], window=30)
    expected = case.expected()
    for block in case.tables[0][: (100 - 29) // 16]:
        case.pool.remove(block)
    assert_right(case.run(), expected, kind)


def test_the_end_of_a_chunk_may_come_as_a_chunk_of_its_own() -> None:
    kind = PLAIN
    whole = Case(kind, pool_for(kind), [96], [64])
    result = whole.run()
    piece = Case(kind, whole.pool, [32], [0])
    piece.tables, piece.contexts, piece.q = whole.tables, [64 + 96], whole.q
    piece.first_rows = [whole.first_rows[0] + 64]
    last = piece.run()
    rows = slice(piece.first_rows[0], piece.first_rows[0] + 32)
    assert_near(last[rows], result[rows], kind.bounds)


def test_one_launch_serves_chunks_of_any_length() -> None:
    kind = PLAIN
    case = Case(kind, pool_for(kind), [48, 48], [48, 0])
    first_rows, lengths, contexts = (ints(each) for each in (case.first_rows, case.lengths, case.contexts))
    out, table = torch.empty(case.q.shape, dtype=case.q.dtype), padded(case.tables)
    tiles = torch.zeros(3, dtype=torch.int32)
    prepared = prefill_paged.prepare(
        case.pool.cache, 0, case.q, out, block_table=table, first_rows=first_rows, lengths=lengths, tiles=tiles,
        contexts=contexts, scale=0.2,
    )  # fmt: skip
    for now, befores in (([48, 48], [48, 0]), ([0, 7], [0, 41]), ([1, 0], [70, 0])):
        ends = [length + before for length, before in zip(now, befores, strict=True)]
        lengths.copy_(ints(now))
        tiles.copy_(tiles_of(lengths, kind.family.group))
        contexts.copy_(ints(ends))
        out.fill_(torch.nan)
        run_prepared(kind.of_its_card(prepared))
        expected = prefill_paged.reference(
            case.pool.cache, 0, case.q, case.tables, case.first_rows, now, ends, scale=0.2
        )
        assert_right(out, expected, kind)


def test_a_nan_of_its_own_reaches_a_sequence_and_no_other() -> None:
    case = Case(PLAIN, pool_for(PLAIN), [20, 20], [3, 3])
    case.pool.planes(case.tables[0][1], 0)[0][0][0, 3] = 0xFF  # a key of token 19
    result = case.run()
    first, second = case.first_rows
    assert result[first + 16, 0].isnan().all()
    assert not result[first : first + 16].isnan().any()
    assert not result[first : first + 20, 2:].isnan().any()  # the other kv head
    assert not result[second : second + 20].isnan().any()


@pytest.mark.parametrize("kv_format", FORMATS)
def test_large_scores_do_not_overflow(kv_format: GpuKvFormat) -> None:
    kind = KINDS[kv_format, 64]
    case = Case(kind, pool_for(kind), [30], [20])
    case.q = (case.q * 400).contiguous()
    result = case.run()
    rows = slice(case.first_rows[0], case.first_rows[0] + 30)
    assert result[rows].isfinite().all()


# Each fault, and a batch in which it shows.
_FAULTS: dict[str, dict[str, Any]] = {
    "EK_PLANT_BARRIER": {"lengths": [40], "befores": [30]},
    "EK_PLANT_STALE_V": {"lengths": [40], "befores": [3]},
    "EK_PLANT_WINDOW": {"lengths": [40], "befores": [30], "window": 20},
}


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        *((fault, PLAIN) for fault in _FAULTS),
        *((fault, IN_ALL_ORDERS[3]) for fault in _FAULTS if fault != "EK_PLANT_WINDOW"),
    ],
    ids=str,
)
def test_a_planted_fault_is_found(fault: str, kind: Kind) -> None:
    case = Case(kind, pool_for(kind), **_FAULTS[fault])
    expected = case.expected()
    assert_right(case.run(), expected, kind)
    results = torch.stack([case.run(seed, fault) for seed in range(4)])
    with pytest.raises(AssertionError):
        assert_right(results, expected.expand(results.shape), kind)


def test_what_there_is_no_kernel_for_is_refused() -> None:
    layout = PLAIN.family.layout()
    wide = dataclasses.replace(layout, kv_format=GpuKvFormat.F32)
    for cache, act, operands in (
        (layout, torch.float32, None),
        (layout, torch.bfloat16, torch.float32),
        (wide, torch.bfloat16, None),
    ):
        with pytest.raises(ValueError, match="float32"):
            prefill_paged.spec(cache, act, operands)
    cache = GpuCache(layout, {}, torch.empty(1, dtype=torch.int64, device="meta"))
    numbers = torch.empty(1, dtype=torch.int32, device="meta")
    for heads, tiles in ((3, 2), (4, 1)):
        q = torch.empty(5, heads, 64, dtype=torch.bfloat16, device="meta")
        with pytest.raises(ValueError, match="are none of"):
            prefill_paged.prepare(
                cache, 0, q, q, block_table=numbers[None], first_rows=numbers, lengths=numbers, contexts=numbers,
                tiles=torch.empty(tiles, dtype=torch.int32, device="meta"), scale=1.0,
            )  # fmt: skip


def test_chunks_have_tiles_one_behind_the_other() -> None:
    assert tiles_of(ints([16, 0, 17, 1]), 4).tolist() == [0, 1, 1, 3, 4]
    cache = GpuCache(PLAIN.family.layout(), {}, torch.empty(1, dtype=torch.int64, device="meta"))
    for lengths in ([1] * 9, [300, 0, 0], [31, 33, 0, 1], [0, 0]):
        q = torch.empty(sum(lengths) or 1, 4, 64, dtype=torch.bfloat16, device="meta")
        numbers = torch.empty(len(lengths) + 1, dtype=torch.int32, device="meta")
        prepared = prefill_paged.prepare(
            cache, 0, q, q, block_table=numbers[None], first_rows=numbers[1:], lengths=numbers[1:], tiles=numbers,
            contexts=numbers[1:], scale=1.0,
        )  # fmt: skip
        used = int(tiles_of(ints(lengths), 2)[-1])
        assert used <= prepared.grid[0] <= sum(lengths) * 2 // 64 + len(lengths)
