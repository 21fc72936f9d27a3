"""Matrices of plain numbers times one to eight tokens."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgekv.kernels.gemm import wide_gemv
from edgekv.kernels.gemm.epilogue import Epilogue, is_gated
from edgekv.kernels.gemm.shape import GemvShape
from tests.kernels.fibers.gemm_cases import EPILOGUES, Layer, check_wide, draw, draw_plain, run_wide
from tests.kernels.fibers.harness import SEEDS

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# Weights, activations, outputs.
KINDS = (
    (BF16, BF16, BF16, GemvShape(1, 2, 1)),
    (BF16, F32, F32, GemvShape(8, 4, 4)),
    (F16, F16, F32, GemvShape(2, 4, 2)),
    (F16, BF16, F16, GemvShape(4, 1, 4)),
    (F32, F32, F32, GemvShape(4, 2, 4)),
    (F32, BF16, BF16, GemvShape(1, 4, 2)),
)


@pytest.mark.parametrize(("weights", "acts", "outputs", "shape"), KINDS, ids=str)
@settings(max_examples=12, derandomize=True)
@given(
    num_columns=st.integers(1, 40),
    eights=st.integers(1, 400),
    tokens=st.integers(1, 8),
    epilogue=st.sampled_from(EPILOGUES),
    biased=st.booleans(),
    seed=st.integers(0, 2**32),
)
@example(num_columns=1, eights=1, tokens=1, epilogue=Epilogue.STORE, biased=False, seed=0)
@example(num_columns=35, eights=384, tokens=3, epilogue=Epilogue.GELU_MUL, biased=True, seed=0)
def test_product(
    weights: torch.dtype, acts: torch.dtype, outputs: torch.dtype, shape: GemvShape, num_columns: int, eights: int,
    tokens: int, epilogue: Epilogue, biased: bool, seed: int,
) -> None:  # fmt: skip
    if is_gated(epilogue) and shape.rows == 1:
        epilogue = Epilogue.ADD
    tokens, rng = min(tokens, shape.tokens), np.random.default_rng(seed)
    layer = draw_plain(weights, num_columns, 8 * eights, rng, epilogue, biased=biased)
    x = draw(rng, tokens, 8 * eights + 16, acts)
    x[:, 8 * eights :] = torch.nan
    check_wide(layer, x[:, : 8 * eights], draw(rng, tokens, num_columns, outputs), shape)


def test_a_row_of_float32_may_end_with_half_a_vector_of_others() -> None:
    rng = np.random.default_rng(0)
    layer = draw_plain(F32, 3, 132, rng, Epilogue.STORE, biased=False)
    for _, acts, outputs, shape in KINDS[-2:]:
        x = draw(rng, 1, 136, acts)
        check_wide(layer, x[:, :132], torch.zeros(1, 3, dtype=outputs), shape)


@pytest.mark.parametrize("epilogue", [Epilogue.SILU_MUL, Epilogue.GELU_MUL])
def test_gates_are_those_of_torch_wherever_they_are(epilogue: Epilogue) -> None:
    gates = torch.linspace(-20, 20, 161)
    weights = torch.zeros(2 * len(gates), 4)
    weights[: len(gates), 0] = gates
    weights[len(gates) :, 1] = 3
    x = torch.ones(1, 4)
    found = run_wide(Layer(weights, weights, epilogue, None), x, torch.zeros(1, len(gates)), GemvShape(4, 2, 4))
    wanted = wide_gemv.reference(weights, x, None, epilogue)
    torch.testing.assert_close(found, wanted.float(), rtol=4e-6, atol=1e-7)


def test_a_token_comes_out_the_same_whoever_is_beside_it() -> None:
    rng = np.random.default_rng(4)
    layer = draw_plain(BF16, 9, 2600, rng, Epilogue.STORE, biased=True)
    x, before = draw(rng, 8, 2600, F32), torch.zeros(8, 9)
    wanted = run_wide(layer, x, before, GemvShape(8, 4, 4))
    assert torch.equal(run_wide(layer, x[:1], before[:1], GemvShape(1, 1, 4)), wanted[:1])
    assert torch.equal(run_wide(layer, x[2:7], before[2:7], GemvShape(8, 4, 4)), wanted[2:7])


def test_a_token_that_is_no_number_spoils_itself_alone() -> None:
    rng = np.random.default_rng(0)
    layer = draw_plain(F32, 6, 600, rng, Epilogue.STORE, biased=False)
    x = draw(rng, 4, 600, F32)
    x[2, 599] = torch.inf
    found = run_wide(layer, x, torch.zeros(4, 6), GemvShape(4, 2, 4))
    assert not found[2].isfinite().any()
    assert found[[0, 1, 3]].isfinite().all()


def test_no_order_of_threads_matters_and_a_missing_barrier_is_found() -> None:
    rng = np.random.default_rng(0)
    layer = draw_plain(BF16, 11, 1048, rng, Epilogue.SILU_MUL, biased=True)
    x, before = draw(rng, 8, 1048, F32), draw(rng, 8, 11, F32)
    check_wide(layer, x, before, GemvShape(8, 4, 4), SEEDS)
    with pytest.raises(AssertionError):
        check_wide(layer, x, before, GemvShape(8, 4, 4), SEEDS, "EK_PLANT_BARRIER")


@pytest.mark.parametrize(
    ("weights", "is_supported"),
    [
        (torch.zeros(3, 8, dtype=BF16), True),
        (torch.zeros(3, 12, dtype=BF16), False),
        (torch.zeros(3, 12), True),
        (torch.zeros(3, 16, dtype=F16)[:, 8:], True),
        (torch.zeros(3, 16, dtype=F16)[:, 4:12], False),
        (torch.zeros(8, 3).t(), False),
        (torch.zeros(3, 8, dtype=torch.float64), False),
        (torch.zeros(0, 8), False),
        (torch.zeros(8), False),
    ],
    ids=str,
)
def test_weights_that_there_are_kernels_for(weights: torch.Tensor, is_supported: bool) -> None:
    assert wide_gemv.is_supported(weights) == is_supported


def test_what_does_not_fit_together_is_refused() -> None:
    weights = torch.zeros(4, 64, dtype=BF16)

    def prepare(x: torch.Tensor, out: torch.Tensor, shape: GemvShape | None = None) -> None:
        wide_gemv.prepare(weights, x, out, multiprocessors=1, shape=shape)

    prepare(torch.zeros(2, 64), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="2 tokens of 64 columns are not float32"):
        prepare(torch.zeros(2, 72), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="9 tokens of 64 columns"):
        prepare(torch.zeros(9, 64), torch.zeros(9, 4))
    with pytest.raises(ValueError, match="make 4 columns"):
        prepare(torch.zeros(2, 64), torch.zeros(2, 5))
    with pytest.raises(ValueError, match="is not for 2 tokens"):
        prepare(torch.zeros(2, 64), torch.zeros(2, 4), GemvShape(1, 2, 1))
    with pytest.raises(ValueError, match="whole vectors of 16 bytes, not bfloat16"):
        wide_gemv.prepare(weights[:, :12], torch.zeros(2, 12), torch.zeros(2, 4), multiprocessors=1)
