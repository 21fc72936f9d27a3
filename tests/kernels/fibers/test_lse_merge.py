"""Results of parts put together, against the formula in float64."""

from itertools import product

import pytest
import torch
from torch import Tensor

from edgekv.kernels.attn import lse_merge
from edgekv.kernels.attn.splits import Parts, make_parts, parts_bytes, parts_in
from tests.kernels.fibers.harness import in_all_orders, run_prepared
from tests.kernels.fibers.paged_memory import HEAD_DIMS, assert_near, ints

# By the type of the results (relative, absolute): float32 sums of a few parts, and one rounding.
BOUNDS = {
    torch.bfloat16: (2**-8, 2e-6),
    torch.float16: (2**-11, 2e-6),
    torch.float32: (2e-6, 2e-6),
}


def random_parts(generator: torch.Generator, slots: int, heads: int, head_dim: int) -> Parts:
    """Parts of all sizes, among them empty ones, whose values are NaN."""
    states = torch.stack(
        (
            torch.randn(slots, heads, generator=generator) * 8,
            torch.rand(slots, heads, generator=generator) * 50 + 1,
        ),
        -1,
    )
    values = torch.randn(slots, heads, head_dim, generator=generator) * states[..., 1:]
    empty = torch.rand(slots, heads, generator=generator) < 0.3
    states[empty] = torch.tensor([-1e30, 0.0])
    values[empty] = torch.nan
    return Parts(values, states)


def merged(
    parts: Parts, slots: list[int], act: torch.dtype, *, seed: int = 0, sinks: Tensor | None = None,
    always_parts: bool = True, plant: str | None = None,
) -> Tensor:  # fmt: skip
    _, heads, head_dim = parts.values.shape
    out, numbers = torch.full((len(slots) - 1, heads, head_dim), 7.0, dtype=act), ints(slots)
    prepared = lse_merge.prepare(parts, out, slots=numbers, sinks=sinks, always_parts=always_parts)
    run_prepared(prepared, seed=seed, plant=plant)
    return out


@pytest.mark.parametrize(("head_dim", "act"), list(product(HEAD_DIMS, BOUNDS)), ids=str)
def test_any_parts_are_put_together_as_the_formula_says(head_dim: int, act: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(head_dim)
    for slots, heads, has_sinks in (([0, 1], 2, False), ([2, 7, 8, 28], 2, True), ([0, 64], 1, True)):
        parts = random_parts(generator, slots[-1] + 1, heads, head_dim)
        sinks = torch.randn(heads, generator=generator) * 5 if has_sinks else None
        result = in_all_orders(
            lambda seed, of=parts, at=slots, by=sinks: merged(of, at, act, seed=seed, sinks=by), (0, 1)
        )
        assert_near(result, lse_merge.reference(parts, slots, sinks), BOUNDS)


def test_of_nothing_comes_nothing() -> None:
    parts = make_parts(8, 3, 64, torch.device("cpu"))
    parts.values.fill_(torch.nan)
    assert torch.equal(merged(parts, [0, 4, 8], torch.float32), torch.zeros(2, 3, 64))
    assert torch.equal(merged(parts, [0, 4, 8], torch.float32, sinks=torch.ones(3)), torch.zeros(2, 3, 64))


def test_a_part_that_is_no_number_makes_the_result_none() -> None:
    parts = random_parts(torch.Generator().manual_seed(1), 5, 2, 64)
    parts.states[2, 0] = torch.tensor([1.0, torch.nan])
    parts.values[2, 0] = torch.nan
    result = merged(parts, [0, 5], torch.float32)
    assert result[0, 0].isnan().all()
    assert result[0, 1].isfinite().all()


def test_what_was_not_cut_is_left_alone() -> None:
    parts, slots = random_parts(torch.Generator().manual_seed(2), 12, 2, 64), [0, 1, 3, 3, 10, 11]
    expected = lse_merge.reference(parts, slots)
    for i, row in enumerate(merged(parts, slots, torch.float32, always_parts=False)):
        if slots[i + 1] - slots[i] < 2:
            assert torch.equal(row, torch.full((2, 64), 7.0))
        else:
            assert_near(row, expected[i], BOUNDS)


def test_a_missing_barrier_is_found() -> None:
    parts, slots = random_parts(torch.Generator().manual_seed(3), 18, 2, 128), [0, 9, 18]
    expected = lse_merge.reference(parts, slots)
    assert_near(merged(parts, slots, torch.float32), expected, BOUNDS)
    results = torch.stack(
        [merged(parts, slots, torch.float32, seed=seed, plant="EK_PLANT_BARRIER") for seed in range(4)]
    )
    with pytest.raises(AssertionError):
        assert_near(results, expected.expand_as(results), BOUNDS)


def test_parts_take_the_memory_that_was_planned() -> None:
    parts = make_parts(15, 8, 96, torch.device("cpu"))
    assert parts.values.nbytes + parts.states.nbytes == parts_bytes(15, 8, 96)


def test_launches_of_different_batches_share_one_memory() -> None:
    memory = torch.full((parts_bytes(12, 8, 64),), 0xFF, dtype=torch.uint8)
    for slots in (12, 10):
        parts = parts_in(memory, slots, 8, 64)
        assert parts.values.shape == (slots, 8, 64)
        assert parts.states.shape == (slots, 8, 2)
        places = [parts.values.data_ptr(), parts.states.data_ptr()]
        assert places[0] == memory.data_ptr()
        assert places[1] >= places[0] + parts.values.nbytes
        assert places[1] + parts.states.nbytes <= places[0] + memory.nbytes
    with pytest.raises(ValueError, match="no room for 13 parts"):
        parts_in(memory, 13, 8, 64)


def test_parts_of_other_results_are_refused() -> None:
    parts = make_parts(8, 3, 64, torch.device("cpu"))
    with pytest.raises(ValueError, match="are none of results"):
        lse_merge.prepare(parts, torch.zeros(2, 4, 64), slots=ints([0, 4, 8]))
    with pytest.raises(ValueError, match="first slots are none of 2 queries"):
        lse_merge.prepare(parts, torch.zeros(2, 3, 64), slots=ints([0, 4, 6, 8]))
