"""The product with an activated gate, against torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edgekv.kernels.fused import gated
from edgekv.kernels.fused.gated import Gate
from tests.kernels.fibers.harness import in_all_orders, run_prepared
from tests.kernels.fibers.paged_memory import assert_near

# By type (relative, absolute): one step of the type where two roundings fall differently. Gates far below 0 are powers
# of e that are small without being 0, and exact to few digits.
BOUNDS = {
    torch.bfloat16: (2**-7, 1e-6),
    torch.float16: (2**-9, 1e-6),
    torch.float32: (1e-5, 1e-6),
}


def run(gate: Tensor, up: Tensor, kind: Gate, seed: int = 0) -> Tensor:
    out = torch.full(gate.shape, torch.nan, dtype=gate.dtype)
    run_prepared(gated.prepare(gate, up, out, kind), seed=seed)
    return out


@pytest.mark.parametrize("act", BOUNDS, ids=str)
@pytest.mark.parametrize("kind", Gate)
@settings(max_examples=15)
@given(
    rows=st.integers(1, 5),
    eighths=st.integers(1, 40) | st.integers(250, 260),
    scale=st.sampled_from([0.1, 1.0, 8.0]),
    seed=st.integers(0, 2**31),
)
def test_any_halves_of_a_matrix(act: torch.dtype, kind: Gate, rows: int, eighths: int, scale: float, seed: int) -> None:
    width = 8 * eighths
    both = (torch.randn(rows, 2 * width, generator=torch.Generator().manual_seed(seed)) * scale).to(act)
    gate, up = both.chunk(2, 1)
    result = in_all_orders(lambda order: run(gate, up, kind, order), (0, seed | 1))
    assert_near(result, gated.reference(gate, up, kind), BOUNDS)


@pytest.mark.parametrize("kind", Gate)
def test_far_gates_are_closed_or_open(kind: Gate) -> None:
    gate = torch.tensor([[-1e4, -100.0, -0.0, 0.0, 100.0, 1e4, 3e38, torch.nan]])
    result = run(gate, torch.ones(1, 8), kind)
    assert result[0, :4].tolist() == [0, 0, 0, 0]
    assert result[0, 4:7].tolist() == gate[0, 4:7].tolist()
    assert result[0, 7].isnan()


def test_the_product_may_be_written_over_the_gate() -> None:
    both = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    gate, up = both.chunk(2, 1)
    apart, kept = run(gate, up, Gate.SILU), up.clone()
    run_prepared(gated.prepare(gate, up, gate, Gate.SILU))
    assert torch.equal(gate, apart)
    assert torch.equal(up, kept)


def test_a_width_that_there_is_not_is_refused() -> None:
    odd = torch.zeros(1, 12)
    with pytest.raises(ValueError, match="multiple of 8"):
        gated.prepare(odd, odd, odd, Gate.SILU)


def test_there_may_be_more_rows_than_a_grid_has_in_y() -> None:
    rows = torch.empty(70_000, 4096, dtype=torch.bfloat16, device="meta")
    assert gated.prepare(rows, rows, rows, Gate.SILU).grid == (70_000, 2, 1)


def test_what_does_not_fit_together_is_refused() -> None:
    rows = torch.zeros(2, 16)
    for other in (rows[:1], rows.half()):
        with pytest.raises(ValueError, match="are not all alike"):
            gated.prepare(rows, other, rows, Gate.SILU)
    with pytest.raises(ValueError, match="not dense or not aligned"):
        gated.prepare(rows, torch.zeros(2, 17)[:, 1:], rows, Gate.SILU)
