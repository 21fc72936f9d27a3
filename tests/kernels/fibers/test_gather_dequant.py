"""Contexts gathered from a paged cache: what was appended comes out, within what its format costs, and nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from edgekv.kernels.attn import gather_dequant
from edgekv.kernels.attn.gpu_layout import BlockOrder, GpuKvFormat
from tests.kernels.fibers.covering import covering
from tests.kernels.fibers.harness import in_all_orders, run_prepared
from tests.kernels.fibers.paged_memory import (
    FAMILIES,
    FORMATS,
    Family,
    Pool,
    assert_near,
    ints,
    padded,
    rounded,
)

# By the cache's format, against the reference on the same codes (of the number, absolute): the rounding of a product
# with a scale, and for int4 of a sum, which may cancel. Then what comes out is rounded to its type.
ERRORS = {
    GpuKvFormat.BF16: (0.0, 0.0),
    GpuKvFormat.F16: (0.0, 0.0),
    GpuKvFormat.E4M3: (0.0, 0.0),
    GpuKvFormat.INT8: (2**-23, 0.0),
    GpuKvFormat.INT4: (2**-23, 1e-6),
    GpuKvFormat.F32: (0.0, 0.0),
}

# What a format costs at most: (of the number itself, of the largest in its row, absolute). Half a step, and a tenth
# more where scales are rounded to float16; int4's range is from the least to the largest, up to twice the largest.
FORMAT_ERRORS = {
    GpuKvFormat.BF16: (2**-8, 0.0, 0.0),
    GpuKvFormat.F16: (2**-11, 0.0, 2**-25),
    GpuKvFormat.E4M3: (2**-4, 0.0, 2**-10),
    GpuKvFormat.INT8: (0.0, 0.55 / 127, 0.0),
    GpuKvFormat.INT4: (0.0, 2 * 0.55 / 15, 0.0),
    GpuKvFormat.F32: (0.0, 0.0, 0.0),
}


@dataclass
class Case:
    """Sequences on a pool, of which tokens from somewhere on are gathered, each behind the other's."""

    family: Family
    pool: Pool
    contexts: Sequence[int]
    begins: Sequence[int] | None
    layer: int = 1

    def __post_init__(self) -> None:
        self.tables = [self.pool.fill(self.layer, context) for context in self.contexts]
        self.starts = self.begins or [0] * len(self.contexts)
        self.lengths = [context - begin for context, begin in zip(self.contexts, self.starts, strict=True)]
        self.first_rows = [2 + sum(self.lengths[:i]) for i in range(len(self.contexts))]

    def run(self, seed: int = 0) -> tuple[Tensor, Tensor]:
        layout, size = self.pool.layout, self.family.block_size
        shape = (2, layout.num_kv_heads, 4 + sum(self.lengths), layout.head_dim)
        keys, values = torch.full(shape, torch.nan, dtype=self.family.act)
        blocks = [-(-end // size) - begin // size for end, begin in zip(self.contexts, self.starts, strict=True)]
        table, contexts, first_rows = padded(self.tables), ints(self.contexts), ints(self.first_rows)
        begins = None if self.begins is None else ints(self.begins)
        prepared = gather_dequant.prepare(
            self.pool.cache, self.layer, keys, values, block_table=table, contexts=contexts, first_rows=first_rows,
            max_blocks=max(blocks) + 1, begins=begins,
        )  # fmt: skip
        run_prepared(prepared, seed=seed)
        return keys, values

    def check(self) -> None:
        results = in_all_orders(self.run, (0, 1))
        bounds = rounded(ERRORS[self.family.kv_format], self.family.act)
        for i, table in enumerate(self.tables):
            rows = slice(self.first_rows[i], self.first_rows[i] + self.lengths[i])
            expected = gather_dequant.reference(
                self.pool.cache, self.layer, table, self.contexts[i], self.starts[i]
            )
            for result, wanted in zip(results, expected, strict=True):
                assert_near(result[:, rows].transpose(0, 1), wanted, bounds)
        for result in results:
            assert result[:, :2].isnan().all()
            assert result[:, 2 + sum(self.lengths) :].isnan().all()


CASES = covering(
    kv_format=FORMATS,
    head_dim=(96, 128),
    order=tuple(BlockOrder),
    kv_heads=(1, 3),
    segment_blocks=(1, 4),
    contexts=((0, 16, 33), (70,), (5, 96)),
    from_within=(False, True),
)


@pytest.mark.parametrize("index", range(len(CASES)))
def test_contexts_come_out_one_behind_the_other(index: int) -> None:
    case = CASES[index]
    family = FAMILIES[case["kv_format"], case["head_dim"]]
    layout = family.layout(**{name: case[name] for name in ("order", "kv_heads", "segment_blocks")})
    blocks = sum(-(-context // family.block_size) for context in case["contexts"])
    begins = [context * 2 // 5 for context in case["contexts"]] if case["from_within"] else None
    Case(family, Pool(layout, blocks + 1, index, holes=[1]), case["contexts"], begins).check()


@pytest.mark.parametrize("kv_format", FORMATS)
def test_a_format_costs_no_more_than_it_says(kv_format: GpuKvFormat) -> None:
    family = Family(kv_format, 128, 16, torch.float32)
    pool = Pool(family.layout(), 8)
    sides = [pool.normal(90, 2, 128) * torch.rand(90, 2, 1, generator=pool.generator) * 4 for _ in range(2)]
    table = pool.take(90)
    pool.write(0, table, sides[0], sides[1])
    own, of_largest, absolute = FORMAT_ERRORS[kv_format]
    for result, side in zip(gather_dequant.reference(pool.cache, 0, table, 90), sides, strict=True):
        bound = own * side.abs() + of_largest * side.abs().amax(-1, keepdim=True) + absolute
        assert ((result - side).abs() <= bound).all()


def test_what_cannot_be_gathered_is_refused() -> None:
    family = Family(GpuKvFormat.BF16, 64, 16, torch.bfloat16)
    pool, number = Pool(family.layout(), 8), ints([1])
    odd, good = torch.zeros(2, 16, 68, dtype=torch.bfloat16)[..., :64], torch.zeros(2, 16, 64, dtype=torch.bfloat16)
    for keys, max_blocks, said in ((odd, 1, "cannot be written"), (good, 0, "0 blocks"), (good[:1], 1, "do not come")):
        with pytest.raises(ValueError, match=said):
            gather_dequant.prepare(
                pool.cache, 0, keys, keys, block_table=padded([[0]]), contexts=number, first_rows=number,
                max_blocks=max_blocks,
            )  # fmt: skip
