"""Activations become int8 as the reference has it, to the bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekv.kernels.gemm import acts
from tests.kernels.fibers.harness import in_all_orders, run_prepared

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SPECIAL = (torch.nan, torch.inf, -torch.inf)


def run(x: torch.Tensor, seed: int = 0, plant: str | None = None) -> acts.Int8Rows:
    into = acts.Int8Rows.empty(*x.shape, x.device)
    into.codes.fill_(99)
    into.sums.fill_(-1)
    run_prepared(acts.prepare(x, into), seed=seed, plant=plant)
    return into


def assert_same(found: acts.Int8Rows, wanted: acts.Int8Rows) -> None:
    assert torch.equal(found.codes, wanted.codes)
    assert torch.equal(found.sums[..., 1], wanted.sums[..., 1])
    assert torch.equal(found.scales.isnan(), wanted.scales.isnan())
    assert torch.equal(found.scales.nan_to_num(), wanted.scales.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=20, derandomize=True)
@given(
    tokens=st.integers(1, 9), groups=st.integers(1, 70), power=st.integers(-13, 13), seed=st.integers(0, 2**32)
)
def test_groups_are_rounded_as_the_reference_has_it(
    dtype: torch.dtype, tokens: int, groups: int, power: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    numbers = rng.standard_normal((tokens, 32 * groups), dtype=np.float32) * np.float32(2.0**power)
    numbers[rng.random(numbers.shape) < 0.05] = 0
    wide = torch.full((tokens, 32 * groups + 8), torch.nan, dtype=dtype)
    x = wide[:, : 32 * groups]
    x.copy_(torch.from_numpy(numbers))
    found = run(x)
    assert_same(found, acts.reference(x))
    # Half a step of the group's 127 each way, and what float32 adds.
    step = found.scales.double().repeat_interleave(32, 1)
    assert ((found.values() - x.double()).abs() <= step * 0.50001).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-38, *SPECIAL])
def test_numbers_that_are_none_spoil_their_group_alone(dtype: torch.dtype, value: float) -> None:
    x = torch.ones((2, 96), dtype=dtype)
    x[1, 32:64] = 0
    x[1, 37] = value
    found = run(x)
    assert_same(found, acts.reference(x))
    assert found.scales[1, 1].isnan() == (value in SPECIAL or value != value)
    assert not found.scales[[0, 0, 0, 1, 1], [0, 1, 2, 0, 2]].isnan().any()


def test_sums_are_those_of_half_groups() -> None:
    x = torch.cat((torch.full((1, 16), 2.0), torch.full((1, 16), -1.0)), 1)
    found = run(x)
    assert found.sums.view(torch.int16)[0, 0, 2:].tolist() == [16 * 127, -16 * 64]


def test_no_order_of_threads_matters() -> None:
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((3, 320), dtype=np.float32))
    in_all_orders(lambda seed: (run(x, seed).codes, run(x, seed).sums))


def test_a_missing_exchange_is_found() -> None:
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 64), dtype=np.float32))
    with pytest.raises(AssertionError):
        assert_same(run(x, plant="EK_PLANT_EXCHANGE"), acts.reference(x))


def test_what_does_not_fit_together_is_refused() -> None:
    into = acts.Int8Rows.empty(2, 64, torch.device("cpu"))
    with pytest.raises(ValueError, match="2 tokens of 64 columns are not float32"):
        acts.prepare(torch.zeros(2, 96), into)
    with pytest.raises(ValueError, match="2 tokens of 64 columns are not float32"):
        acts.prepare(torch.zeros(2, 65)[:, 1:], into)
    with pytest.raises(ValueError, match="float64 is none of"):
        acts.prepare(torch.zeros(2, 64, dtype=torch.float64), into)
