"""Norms of rows, with and without the residual stream, against the formula in torch."""

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edgekv.kernels.common.prepared import Prepared
from edgekv.kernels.fused import rmsnorm
from edgekv.kernels.fused.rmsnorm import Add
from tests.kernels.fibers.harness import in_all_orders, run_prepared
from tests.kernels.fibers.paged_memory import assert_near

# By type (relative, absolute): one step of the type where two roundings fall differently; what is added may cancel.
BOUNDS = {
    torch.bfloat16: (2**-7, 2**-6),
    torch.float16: (2**-10, 2**-9),
    torch.float32: (4e-6, 2e-6),
}
# The widths of models, one for each number of vectors that is compiled; in between lies whatever is drawn.
WIDTHS = {1: (8, 896, 2048), 2: (2304, 4096), 5: (8200, 10240)}


def padded_rows(rows: int, width: int, act: torch.dtype, seed: int) -> Tensor:
    """Random rows of a wider matrix that is NaN beside them."""
    wide = torch.full((rows + 1, width + 8), torch.nan, dtype=act)
    wide[:rows, :width] = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to(act)
    return wide[:rows, :width]


def is_untouched_beside(rows: Tensor) -> bool:
    wide = rows._base
    assert wide is not None
    return bool(wide[len(rows) :].isnan().all() and wide[:, rows.shape[1] :].isnan().all())


class Case:
    def __init__(self, act: torch.dtype, add: Add, rounds_first: bool, rows: int, width: int, seed: int) -> None:
        self.act, self.add, self.rounds_first, self.eps = act, add, rounds_first, 1e-5
        self.x, self.other = padded_rows(rows, width, act, seed), padded_rows(rows, width, act, seed + 1)
        self.weight = torch.rand(width, generator=torch.Generator().manual_seed(seed + 2)) * 2

    def prepared(self, x: Tensor, out: Tensor, other: Tensor, total: Tensor) -> Prepared:
        return rmsnorm.prepare(
            x,
            self.weight,
            out,
            eps=self.eps,
            add=self.add,
            rounds_first=self.rounds_first,
            other=None if self.add is Add.NOTHING else other,
            total=total if self.add is Add.BEFORE else None,
        )

    def run(self, seed: int = 0, plant: Mapping[str, int] | None = None) -> list[Tensor]:
        out, total = torch.full_like(self.x, torch.nan), torch.full_like(self.x, torch.nan)
        run_prepared(self.prepared(self.x, out, self.other, total), seed=seed, plant=plant)
        return [out, total] if self.add is Add.BEFORE else [out]

    def check(self, seed: int) -> None:
        results = in_all_orders(self.run, (0, seed))
        out, total = rmsnorm.reference(
            self.x, self.weight, eps=self.eps, add=self.add, rounds_first=self.rounds_first, other=self.other
        )
        assert_near(results[0], out, BOUNDS)
        if total is not None:
            assert torch.equal(results[1], total)


FAMILIES = [(act, add, (i + j) % 2 == 0) for i, act in enumerate(BOUNDS) for j, add in enumerate(Add)]


@pytest.mark.parametrize(("act", "add", "rounds_first"), FAMILIES, ids=str)
@settings(max_examples=12)
@given(rows=st.integers(1, 4), eighths=st.integers(1, 256), seed=st.integers(0, 2**31))
def test_any_rows_are_normed(
    act: torch.dtype, add: Add, rounds_first: bool, rows: int, eighths: int, seed: int
) -> None:
    Case(act, add, rounds_first, rows, 8 * eighths, seed).check(seed | 1)


@pytest.mark.parametrize("width", [width for widths in WIDTHS.values() for width in widths])
def test_models_widths(width: int) -> None:
    case = Case(torch.bfloat16, Add.BEFORE, True, 2, width, 7)
    assert rmsnorm.spec(width, torch.bfloat16).defines["EK_VECTORS"] in WIDTHS
    case.check(3)


def test_rows_may_be_written_where_they_were_read() -> None:
    apart = Case(torch.bfloat16, Add.BEFORE, True, 3, 896, 5)
    out, total = apart.run()
    x, other = apart.x, apart.other
    run_prepared(apart.prepared(x, x, other, other), seed=9)
    assert torch.equal(x, out)
    assert torch.equal(other, total)
    assert is_untouched_beside(x)
    assert is_untouched_beside(other)


def test_a_row_is_the_same_to_the_bit_whoever_is_beside_it() -> None:
    together = Case(torch.float32, Add.NOTHING, False, 5, 2040, 1)
    (rows,) = together.run()
    for i in range(5):
        alone = torch.empty(1, 2040)
        run_prepared(together.prepared(together.x[i : i + 1], alone, alone, alone), seed=4)
        assert torch.equal(alone[0], rows[i])


def test_a_row_of_zeros_and_one_with_a_nan() -> None:
    case = Case(torch.float32, Add.NOTHING, False, 3, 64, 2)
    case.x[0] = 0
    case.x[1, 5] = torch.nan
    (out,) = case.run()
    assert not out[0].any()
    assert out[1].isnan().all()
    assert out[2].isfinite().all()


def test_a_planted_fault_is_found() -> None:
    case = Case(torch.float32, Add.NOTHING, False, 1, 2048, 3)
    case.check(2)
    expected, _ = rmsnorm.reference(case.x, case.weight, eps=case.eps, rounds_first=False)
    results = torch.cat([case.run(seed, {"EK_PLANT_BARRIER": 1})[0] for seed in range(4)])
    with pytest.raises(AssertionError):
        assert_near(results, expected.expand(4, -1), BOUNDS)


@pytest.mark.parametrize("width", [0, 12, 16392])
def test_a_width_that_there_is_not_is_refused(width: int) -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        rmsnorm.spec(width, torch.bfloat16)


def test_what_does_not_fit_together_is_refused() -> None:
    x, weight = torch.zeros(2, 64), torch.ones(64)
    for wrong in (weight.bfloat16(), weight[:32], torch.ones(128)[::2]):
        with pytest.raises(ValueError, match="does not fit rows of 64"):
            rmsnorm.prepare(x, wrong, x, eps=1e-5)
    for add, other, total in (
        (Add.NOTHING, x, None),
        (Add.BEFORE, x, None),
        (Add.BEFORE, None, x),
        (Add.AFTER, x, x),
        (Add.AFTER, None, None),
    ):
        with pytest.raises(ValueError, match=add.name):
            rmsnorm.prepare(x, weight, x, eps=1e-5, add=add, other=other, total=total)
    for out in (x[:1], x.half()):
        with pytest.raises(ValueError, match="are not all alike"):
            rmsnorm.prepare(x, weight, out, eps=1e-5)
    with pytest.raises(ValueError, match="not dense or not aligned"):
        rmsnorm.prepare(torch.zeros(2, 66)[:, :64], weight, x, eps=1e-5)
    with pytest.raises(ValueError, match="multiple of 16 bytes"):
        rmsnorm.prepare(x, torch.zeros(65)[1:], x, eps=1e-5)


def test_what_is_launched_can_be_told_without_memory() -> None:
    x, weight = torch.empty(3, 2304, dtype=torch.float16, device="meta"), torch.empty(2304, device="meta")
    prepared = rmsnorm.prepare(x, weight, x, eps=1e-6, add=Add.AFTER, other=x, rounds_first=False)
    assert prepared.spec == rmsnorm.spec(2304, torch.float16, add=Add.AFTER, rounds_first=False)
    assert prepared.grid == (3, 1, 1)
