"""Weights come out of their planes as the encoding means them, rounded once."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekv.kernels.gemm import dequant
from edgekv.kernels.gemm.matrix import PlaneMatrix
from edgekv.kernels.gemm.planes import ENCODINGS_IN_PLANES
from edgekv.kernels.quant.encodings import ENCODINGS, Q4_0, Q4_K
from tests.kernels.cpu.linear_harness import random_rows
from tests.kernels.fibers.gemm_cases import CPU, assert_frame_is_whole, framed
from tests.kernels.fibers.harness import SEEDS, in_all_orders, run_prepared

FORMATS = tuple(encoding.name for encoding in ENCODINGS_IN_PLANES)
MARGIN = 8  # columns, so that rows begin at multiples of 16 bytes


def draw(name: str, rows: int, blocks: int, seed: int) -> PlaneMatrix:
    encoding, rng = ENCODINGS[name], np.random.default_rng(seed)
    cols = blocks * encoding.block_cols
    return PlaneMatrix.of(encoding, random_rows(encoding, rows, cols, rng), cols, CPU)


def run(
    matrix: PlaneMatrix,
    dtype: torch.dtype,
    count: int,
    ids: torch.Tensor | None = None,
    scale: float = 1.0,
    seed: int = 0,
    plant: str | None = None,
) -> torch.Tensor:
    out, whole = framed(torch.full((count, matrix.cols), torch.nan, dtype=dtype), MARGIN)
    run_prepared(dequant.prepare(matrix, out, ids=ids, scale=scale), seed=seed, plant=plant)
    assert_frame_is_whole(whole, MARGIN)
    return out.clone()


def assert_same_bits(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.dtype == wanted.dtype
    kind = {2: torch.int16, 4: torch.int32}[found.itemsize]
    assert torch.equal(found.view(kind), wanted.view(kind))


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=8, derandomize=True)
@given(rows=st.integers(1, 20), blocks=st.integers(1, 6), seed=st.integers(0, 2**32), data=st.data())
def test_weights_are_what_the_encoding_means(
    name: str, rows: int, blocks: int, seed: int, data: st.DataObject
) -> None:
    matrix = draw(name, rows, blocks, seed)
    count = data.draw(st.integers(1, rows))
    assert_same_bits(run(matrix, torch.bfloat16, count), dequant.reference(matrix.values()[:count], torch.bfloat16))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("q5_1", torch.float32), ("q8_0", torch.float32), ("q6_K", torch.float16), ("q4_0", torch.float16)],
)
def test_in_other_kinds(name: str, dtype: torch.dtype) -> None:
    matrix = draw(name, 9, 3, 0)
    assert_same_bits(run(matrix, dtype, 9), dequant.reference(matrix.values(), dtype))


@settings(max_examples=12, derandomize=True)
@given(rows=st.integers(1, 30), ids=st.lists(st.integers(-3, 33), min_size=1, max_size=12), scaled=st.booleans())
def test_rows_of_an_embedding(rows: int, ids: list[int], scaled: bool) -> None:
    """An id without a row is taken for the nearest: a fault of the device would take all sequences with it."""
    matrix, wanted = draw("q4_K", rows, 2, rows), torch.tensor(ids, dtype=torch.int32)
    scale = 45.254833 if scaled else 1.0
    found = run(matrix, torch.bfloat16, len(ids), wanted, scale)
    assert_same_bits(found, dequant.reference(matrix.values(), torch.bfloat16, wanted, scale))


@pytest.mark.parametrize("sign", [1, -1])
def test_zeros_have_the_sign_of_their_scale(sign: int) -> None:
    raw = np.full((1, 18), 0x88, np.uint8)
    raw[0, :2] = np.array([sign], np.float16).view(np.uint8)
    matrix = PlaneMatrix.of(Q4_0, raw, 32, CPU)
    found = run(matrix, torch.bfloat16, 1)
    assert_same_bits(found, dequant.reference(matrix.values(), torch.bfloat16))
    assert bool(found.signbit().all()) == (sign < 0)


def test_no_order_of_threads_matters_and_a_missing_barrier_is_found() -> None:
    matrix = draw("q5_K", 10, 4, 0)
    found = in_all_orders(lambda seed: run(matrix, torch.bfloat16, 10, seed=seed))
    faulty = [run(matrix, torch.bfloat16, 10, seed=seed, plant="EK_PLANT_BARRIER") for seed in SEEDS]
    assert any(not torch.equal(each, found) for each in faulty)


def test_matrices_can_be_filled_slice_by_slice() -> None:
    rng = np.random.default_rng(0)
    raw = random_rows(Q4_K, 10, 512, rng)
    whole, sliced = PlaneMatrix.of(Q4_K, raw, 512, CPU), PlaneMatrix.empty(Q4_K, 10, 512, CPU)
    for first in (6, 0, 3):
        sliced.put(first, raw[first : first + 4])
    assert torch.equal(sliced.values(), whole.values())
    assert torch.equal(sliced.values([7, 2]), whole.values()[[7, 2]])
    assert whole.num_bytes == 10 * (256 + 48)


def test_what_does_not_fit_together_is_refused() -> None:
    matrix = draw("q4_0", 4, 2, 0)
    with pytest.raises(ValueError, match="rows of 64 columns do not go to"):
        dequant.prepare(matrix, torch.zeros(4, 65)[:, 1:])
    with pytest.raises(ValueError, match="there are no 5 rows, but 4"):
        dequant.prepare(matrix, torch.zeros(5, 64))
    with pytest.raises(ValueError, match="2 ids are int32"):
        dequant.prepare(matrix, torch.zeros(2, 64), ids=torch.zeros(2, dtype=torch.int64))
