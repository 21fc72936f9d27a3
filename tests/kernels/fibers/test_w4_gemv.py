"""Matrices of four to six bits times one to eight tokens."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgekv.kernels.gemm.epilogue import Epilogue
from edgekv.kernels.gemm.shape import GemvShape
from edgekv.kernels.quant.encodings import ENCODINGS
from tests.kernels.fibers.gemm_cases import EPILOGUES, Layer, check_gemv, draw, draw_layer
from tests.kernels.fibers.harness import SEEDS

FORMATS = ("q4_0", "q4_1", "q5_0", "q5_1", "q4_K", "q5_K", "q6_K", "affine4_32", "affine4_64", "affine4_128")
# A format is the same in all shapes: each has one.
SHAPES = (
    (GemvShape(1, 2, 1), torch.bfloat16),
    (GemvShape(8, 4, 4), torch.float32),
    (GemvShape(2, 4, 2), torch.float16),
)
KINDS = tuple((name, *SHAPES[i % len(SHAPES)]) for i, name in enumerate(FORMATS))

of_all = pytest.mark.parametrize(("name", "shape", "dtype"), KINDS, ids=str)


def check(
    layer: Layer, tokens: int, shape: GemvShape, dtype: torch.dtype, rng: np.random.Generator, seeds: tuple[int, ...]
) -> None:
    x = draw(rng, tokens, layer.planes.cols, torch.float32)
    check_gemv(layer, x, draw(rng, tokens, layer.columns, dtype), shape, seeds)


@of_all
@settings(max_examples=8, derandomize=True)
@given(
    num_columns=st.integers(1, 40),
    blocks=st.integers(1, 9),
    tokens=st.integers(1, 8),
    epilogue=st.sampled_from(EPILOGUES),
    biased=st.booleans(),
    seed=st.integers(0, 2**32),
)
@example(num_columns=1, blocks=1, tokens=1, epilogue=Epilogue.STORE, biased=False, seed=0)
def test_product(
    name: str, shape: GemvShape, dtype: torch.dtype, num_columns: int, blocks: int, tokens: int, epilogue: Epilogue,
    biased: bool, seed: int,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    layer = draw_layer(name, num_columns, blocks, rng, epilogue, biased=biased)
    check(layer, min(tokens, shape.tokens), shape, dtype, rng, (0,))


@of_all
def test_many_columns_in_any_order_of_threads(name: str, shape: GemvShape, dtype: torch.dtype) -> None:
    """Several groups a lane, the last of them not for all lanes."""
    rng = np.random.default_rng(1)
    blocks = 5376 // ENCODINGS[name].block_cols
    layer = draw_layer(name, 5, blocks, rng, Epilogue.GELU_MUL, biased=True)
    check(layer, shape.tokens, shape, dtype, rng, SEEDS[:2])


@of_all
@pytest.mark.parametrize("byte", [0x00, 0xFF])
def test_all_codes_at_one_end(name: str, shape: GemvShape, dtype: torch.dtype, byte: int) -> None:
    """What sums of codes times offsets come to is largest there."""
    rng = np.random.default_rng(byte)
    layer = draw_layer(name, 6, 8, rng, Epilogue.STORE, biased=False)
    layer.planes.q.fill_(byte)
    layer.planes.h.fill_(byte)
    layer.values[:] = layer.planes.values()
    for sign in (1.0, -1.0):
        x = torch.full((1, layer.planes.cols), sign)
        check_gemv(layer, x, torch.zeros(1, 6, dtype=dtype), shape)
