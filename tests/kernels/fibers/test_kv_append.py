"""A step's keys and values into the cache, and its queries beside it, against the same in plain torch."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from edgekv.kernels.attn import kv_append
from edgekv.kernels.attn.gpu_layout import BlockOrder, GpuCache, GpuKvFormat
from edgekv.kernels.attn.kv_append import QkNorm, RopeTable
from edgekv.kernels.attn.kv_codec import decode, hadamard_rotated
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

# Queries: of float32 arithmetic in another order (of the number, absolute). Then they are rounded to their type.
QUERY_ERROR = (2e-6, 2e-6)

# Keys that were normalised or rotated: a last bit may tip a code over to its neighbour, never further. One step of the
# format: (of the number, of the largest in its row, absolute). What was not touched has to be the same bits.
KEY_ERRORS = {
    GpuKvFormat.BF16: (2**-7, 0.0, 1e-6),
    GpuKvFormat.F16: (2**-10, 0.0, 1e-6),
    GpuKvFormat.E4M3: (2**-3, 0.0, 2**-9),
    GpuKvFormat.INT8: (0.0, 1.1 / 127, 0.0),
    GpuKvFormat.INT4: (0.0, 2.2 / 15, 0.0),
    GpuKvFormat.F32: (2e-6, 0.0, 2e-6),
}


def bits(rows: Tensor) -> Tensor:
    return rows.contiguous().view(torch.uint8)


@dataclass
class Step:
    """Tokens of a step: the row of each in `tables`, and where it is in its sequence."""

    pool: Pool
    family: Family
    positions: Sequence[int]
    table_rows: Sequence[int] | None
    tables: Sequence[Sequence[int]]
    q_heads: int = 2
    norm: QkNorm | None = None
    rope: RopeTable | None = None
    hadamard: bool = False
    in_place: bool = False

    def __post_init__(self) -> None:
        layout = self.pool.layout
        heads = (self.q_heads, layout.num_kv_heads, layout.num_kv_heads)
        wide = self.pool.normal(len(self.positions), sum(heads), layout.head_dim).to(self.family.act)
        self.q, self.k, self.v = wide.split(heads, 1)
        self.before = {index: segment.clone() for index, segment in self.pool.segments.items()}

    def run(self, layer: int, seed: int = 0, plant: str | None = None) -> tuple[Tensor, ...]:
        """The queries, and all bytes of the pool."""
        for index, segment in self.before.items():
            self.pool.segments[index].copy_(segment)
        q, k, v = torch.cat((self.q, self.k, self.v), 1).split((self.q_heads, *[self.pool.layout.num_kv_heads] * 2), 1)
        q_out = q if self.in_place else q.clone()
        positions, table = ints(self.positions), padded(self.tables)
        table_rows = None if self.table_rows is None else ints(self.table_rows)
        prepared = kv_append.prepare(
            self.pool.cache, layer, q, k, v, q_out, positions=positions, block_table=table, table_rows=table_rows,
            norm=self.norm, rope=self.rope, hadamard=self.hadamard,
        )  # fmt: skip
        run_prepared(prepared, seed=seed, plant=plant)
        assert torch.equal(bits(k), bits(self.k))
        assert torch.equal(bits(v), bits(self.v))
        return (q_out, *(segment.clone() for segment in self.pool.segments.values()))

    def expected(self, layer: int) -> tuple[Tensor, GpuCache]:
        """The queries in float32, and the pool as it should be."""
        segments = {index: segment.clone() for index, segment in self.before.items()}
        cache = GpuCache(self.pool.layout, segments, self.pool.cache.table)
        q = kv_append.reference(
            cache, layer, self.q, self.k, self.v, positions=self.positions, tables=self.tables,
            table_rows=self.table_rows, norm=self.norm, rope=self.rope, hadamard=self.hadamard,
        )  # fmt: skip
        return q, cache

    @property
    def is_exact(self) -> bool:
        return self.norm is None and self.rope is None and not self.hadamard

    @property
    def query_bounds(self) -> tuple[float, float]:
        return (0.0, 0.0) if self.is_exact else rounded(QUERY_ERROR, self.family.act)


def check(step: Step, layer: int) -> None:
    q_out = in_all_orders(lambda seed: step.run(layer, seed), (0, 1))[0]
    queries, expected = step.expected(layer)
    assert_near(q_out, queries, step.query_bounds)
    layout = step.pool.layout
    own, of_largest, absolute = KEY_ERRORS[layout.kv_format]
    for index, segment in step.pool.segments.items():
        rows, scales = layout.rows(segment, layer)[0], layout.scales(segment, layer)[0]
        wanted_rows, wanted_scales = (
            views(expected.segments[index], layer)[0] for views in (layout.rows, layout.scales)
        )
        if not step.is_exact:
            # A key may be a step off; then it is taken for right, and every other byte has to be.
            keys, wanted = decode(rows, scales, layout.kv_format), decode(wanted_rows, wanted_scales, layout.kv_format)
            bound = own * wanted.abs() + of_largest * wanted.abs().amax(-1, keepdim=True) + absolute
            written = wanted.isfinite()
            assert torch.equal(keys.isfinite(), written)
            assert ((keys - wanted).abs() <= bound)[written].all()
            wanted_rows.copy_(rows)
            wanted_scales.copy_(scales)
        assert torch.equal(segment, expected.segments[index])


# Where sequences begin and how many tokens each has in the step.
SPANS = (((0, 20),), ((30, 1), (7, 1), (16, 1)), ((5, 13), (31, 4)))
# Whose angles a token has: its own row, or that of its position; and how much of a head is rotated.
ROPES = ("none", "by token", "by position", "of a half", "of ten")
CASES = covering(
    kv_format=FORMATS,
    head_dim=HEAD_DIMS,
    order=tuple(BlockOrder),
    kv_heads=(1, 3),
    segment_blocks=(1, 4),
    spans=SPANS,
    q_heads=(1, 5),
    has_norm=(False, True),
    rope=ROPES,
    hadamard=(False, True),
    in_place=(False, True),
    fillers=(0, 2),
)


def step_of(index: int) -> Step:
    case = CASES[index]
    family = FAMILIES[case["kv_format"], case["head_dim"]]
    layout = family.layout(**{name: case[name] for name in ("order", "kv_heads", "segment_blocks")})
    blocks = sum(-(-(start + length) // family.block_size) for start, length in case["spans"])
    pool = Pool(layout, blocks, index, holes=[0])
    tables = [pool.take(start + length) for start, length in case["spans"]]
    tokens = [(start + i, row) for row, (start, length) in enumerate(case["spans"]) for i in range(length)]
    tokens += [(-1, 0)] * case["fillers"]
    positions, table_rows = [position for position, _ in tokens], [row for _, row in tokens]
    is_decode = len(tokens) == len(tables)
    norm = rope = None
    if case["has_norm"]:
        norm = QkNorm(pool.normal(family.head_dim) + 1, pool.normal(family.head_dim) + 1, 1e-6)
    if case["rope"] != "none":
        half = {"of a half": family.head_dim // 4, "of ten": 5}.get(case["rope"], family.head_dim // 2)
        by_token = case["rope"] == "by token"
        angles = pool.normal(len(tokens) if by_token else 64, half) * 7
        rope = RopeTable(torch.stack((angles.cos(), angles.sin()), 1), None if by_token else ints(positions))
    return Step(
        pool, family, positions, None if is_decode else table_rows, tables, case["q_heads"], norm, rope,
        case["hadamard"], case["in_place"],
    )  # fmt: skip


@pytest.mark.parametrize("index", range(len(CASES)))
def test_any_step_is_written_as_the_reference_writes_it(index: int) -> None:
    check(step_of(index), index % 2)


@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("special", [0.0, 1e-9, 3e4, -3e4])
def test_rows_of_one_number_are_kept(kv_format: GpuKvFormat, special: float) -> None:
    family = FAMILIES[kv_format, 64]
    pool = Pool(family.layout(), 8)
    step = Step(pool, family, [0, 1], [0, 0], [pool.take(2)])
    step.k[:], step.v[:] = special, special
    step.k[:, :, 7] = 0.0
    check(step, 0)


@pytest.mark.parametrize("kv_format", [each for each in FORMATS if each is not GpuKvFormat.E4M3])
@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_does_not_become_a_number(kv_format: GpuKvFormat, special: float) -> None:
    family = FAMILIES[kv_format, 64]
    pool = Pool(family.layout(), 8)
    table = pool.take(1)
    step = Step(pool, family, [0], [0], [table])
    step.v[0, 0, 11] = special
    step.run(0)
    _, (rows, scales) = pool.planes(table[0], 0)
    value = decode(rows, scales, kv_format)[:, 0]
    assert not value[0, 11].isfinite()
    assert value[1].isfinite().all()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_a_hadamard_matrix_leaves_products_as_they_are(head_dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 50, head_dim, generator=generator)
    rotated = (hadamard_rotated(a) * hadamard_rotated(b)).sum(-1)
    torch.testing.assert_close(rotated, (a * b).sum(-1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(hadamard_rotated(hadamard_rotated(a)), a, rtol=1e-5, atol=1e-5)


def test_an_outlier_costs_less_when_it_is_spread() -> None:
    family = FAMILIES[GpuKvFormat.INT4, 128]
    errors = []
    for hadamard in (False, True):
        pool = Pool(family.layout(), 8)
        table = pool.take(16)
        step = Step(pool, family, range(16), [0] * 16, [table], hadamard=hadamard)
        step.k[:, :, 3] *= 30
        step.run(0)
        (rows, scales), _ = pool.planes(table[0], 0)
        keys = decode(rows, scales, GpuKvFormat.INT4).transpose(0, 1)
        errors.append(((hadamard_rotated(keys) if hadamard else keys) - step.k).square().mean())
    assert errors[1] < errors[0] / 2


def test_a_missing_barrier_is_found() -> None:
    family = FAMILIES[GpuKvFormat.BF16, 128]
    pool = Pool(family.layout(), 8)
    angles = pool.normal(20, 64)
    rope = RopeTable(torch.stack((angles.cos(), angles.sin()), 1))
    step = Step(pool, family, range(20), [0] * 20, [pool.take(20)], 4, rope=rope)
    check(step, 0)
    queries, _ = step.expected(0)
    results = torch.stack([step.run(0, seed, "EK_PLANT_BARRIER")[0] for seed in range(4)])
    with pytest.raises(AssertionError):
        assert_near(results, queries.expand_as(results), step.query_bounds)


def test_what_cannot_be_appended_is_refused() -> None:
    family = Family(GpuKvFormat.BF16, 64, 16, torch.bfloat16)
    pool = Pool(family.layout(), 8)
    number = ints([0])
    good, odd, wide = (torch.zeros(1, 2, size, dtype=torch.bfloat16) for size in (64, 65, 128))
    for q, said in ((odd[..., 1:], "not dense or not aligned"), (wide, "are none of a cache")):
        with pytest.raises(ValueError, match=said):
            kv_append.prepare(pool.cache, 0, q, good, good, q, positions=number, block_table=padded([[0]]))
    rope = RopeTable(torch.zeros(1, 2, 33))
    with pytest.raises(ValueError, match="rotate no heads of 64"):
        kv_append.prepare(
            pool.cache, 0, good, good, good, good, positions=number, block_table=padded([[0]]), rope=rope
        )
