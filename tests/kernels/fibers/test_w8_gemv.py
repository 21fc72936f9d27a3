"""Matrices of eight bits times one to eight tokens, in all shapes of the kernel."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgekv.kernels.gemm import acts, gemv
from edgekv.kernels.gemm.epilogue import Epilogue, is_gated
from edgekv.kernels.gemm.shape import GemvShape, choose_shape
from tests.kernels.fibers.gemm_cases import EPILOGUES, check_gemv, draw, draw_layer, run_gemv
from tests.kernels.fibers.harness import SEEDS

# Every number of tokens, rows and parts with every other; kinds of output go round.
KINDS = (
    ("q8_0", GemvShape(1, 2, 1), torch.bfloat16),
    ("iq4_nl", GemvShape(1, 1, 4), torch.float32),
    ("q8_0", GemvShape(1, 4, 2), torch.float16),
    ("q8_0", GemvShape(2, 1, 2), torch.bfloat16),
    ("q8_0", GemvShape(2, 4, 1), torch.float32),
    ("q8_0", GemvShape(4, 2, 4), torch.float32),
    ("q8_0", GemvShape(8, 2, 2), torch.bfloat16),
    ("iq4_nl", GemvShape(8, 1, 1), torch.float16),
    ("q8_0", GemvShape(8, 4, 4), torch.float32),
)


@pytest.mark.parametrize(("name", "shape", "dtype"), KINDS, ids=str)
@settings(max_examples=8, derandomize=True)
@given(
    num_columns=st.integers(1, 40),
    groups=st.integers(1, 70),
    tokens=st.integers(1, 8),
    epilogue=st.sampled_from(EPILOGUES),
    biased=st.booleans(),
    seed=st.integers(0, 2**32),
)
@example(num_columns=1, groups=1, tokens=8, epilogue=Epilogue.STORE, biased=False, seed=0)
@example(num_columns=33, groups=129, tokens=7, epilogue=Epilogue.SILU_MUL, biased=True, seed=1)
def test_product(
    name: str, shape: GemvShape, dtype: torch.dtype, num_columns: int, groups: int, tokens: int, epilogue: Epilogue,
    biased: bool, seed: int,
) -> None:  # fmt: skip
    if is_gated(epilogue) and shape.rows == 1:
        epilogue = Epilogue.ADD
    tokens, rng = min(tokens, shape.tokens), np.random.default_rng(seed)
    layer = draw_layer(name, num_columns, groups, rng, epilogue, biased=biased)
    check_gemv(layer, draw(rng, tokens, 32 * groups, torch.float32), draw(rng, tokens, num_columns, dtype), shape)


def test_the_largest_codes_of_both_signs_do_not_overflow() -> None:
    """The sum of a group is at most a quarter of what the float that it starts as has room for."""
    rng = np.random.default_rng(0)
    layer = draw_layer("q8_0", 4, 64, rng, Epilogue.STORE, biased=False)
    layer.planes.q.fill_(0x80)  # -128
    layer.values[:] = layer.planes.values()
    for sign in (1.0, -1.0):
        before = torch.zeros(1, 4, dtype=torch.bfloat16)
        check_gemv(layer, torch.full((1, 2048), sign), before, GemvShape(1, 2, 1))


def test_a_token_comes_out_the_same_whoever_is_beside_it() -> None:
    rng = np.random.default_rng(4)
    layer = draw_layer("q8_0", 9, 150, rng, Epilogue.STORE, biased=True)
    x, before = acts.reference(draw(rng, 8, 4800, torch.float32)), torch.zeros(8, 9)
    wanted = run_gemv(layer, x, before, GemvShape(8, 4, 4))
    for tokens, rows in ((1, 1), (4, 2)):
        few = acts.Int8Rows(x.codes[:tokens], x.sums[:tokens])
        found = run_gemv(layer, few, before[:tokens], GemvShape(tokens, rows, 4))
        assert torch.equal(found, wanted[:tokens])


def test_a_token_that_is_no_number_spoils_itself_alone() -> None:
    rng = np.random.default_rng(0)
    layer = draw_layer("q8_0", 6, 40, rng, Epilogue.STORE, biased=False)
    x = draw(rng, 4, 1280, torch.float32)
    x[2, 1000] = torch.nan
    found = run_gemv(layer, acts.reference(x), torch.zeros(4, 6), GemvShape(4, 2, 4))
    assert found[2].isnan().all()
    assert found[[0, 1, 3]].isfinite().all()


def test_no_order_of_threads_matters_and_a_missing_barrier_is_found() -> None:
    rng = np.random.default_rng(0)
    layer = draw_layer("q8_0", 11, 130, rng, Epilogue.SILU_MUL, biased=True)
    x, before = draw(rng, 8, 4160, torch.float32), draw(rng, 8, 11, torch.float32)
    check_gemv(layer, x, before, GemvShape(8, 4, 4), SEEDS)
    with pytest.raises(AssertionError):
        check_gemv(layer, x, before, GemvShape(8, 4, 4), SEEDS, "EK_PLANT_BARRIER")


@settings(derandomize=True)
@given(
    num_columns=st.integers(1, 200_000),
    steps=st.integers(1, 2000),
    gated=st.booleans(),
    multiprocessors=st.integers(1, 200),
    most_sums=st.sampled_from([16, 32]),
)
def test_shapes_are_those_of_the_kernel_and_split_alike_for_all_tokens(
    num_columns: int, steps: int, gated: bool, multiprocessors: int, most_sums: int
) -> None:
    shapes = [
        choose_shape(num_columns, steps, tokens, gated=gated, multiprocessors=multiprocessors, most_sums=most_sums)
        for tokens in range(1, 9)
    ]
    assert [shape.tokens for shape in shapes] == [1, 2, 4, 4, 8, 8, 8, 8]
    assert len({shape.split for shape in shapes}) == 1
    for shape in shapes:
        assert shape.split in (1, 2, 4)
        assert shape.split == 1 or steps >= 32 * shape.split
        assert shape.rows in ((2, 4) if gated else (1, 2, 4))
        assert shape.rows * shape.tokens <= most_sums
        each = shape.rows // 2 if gated else shape.rows
        assert shape.blocks(num_columns, gated=gated) * (4 // shape.split) * each >= num_columns


def test_what_does_not_fit_together_is_refused() -> None:
    rng = np.random.default_rng(0)
    layer = draw_layer("q8_0", 4, 2, rng, Epilogue.STORE, biased=False)
    x = acts.reference(draw(rng, 2, 64, torch.float32))

    def prepare(out: torch.Tensor, shape: GemvShape | None = None, epilogue: Epilogue = Epilogue.STORE) -> None:
        gemv.prepare(layer.planes, x, out, multiprocessors=1, epilogue=epilogue, shape=shape)

    prepare(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="3 tokens of 64 columns"):
        prepare(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="4 rows and STORE make 4 columns"):
        prepare(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="is not for 2 tokens"):
        prepare(torch.zeros(2, 4), GemvShape(1, 2, 1))
    with pytest.raises(ValueError, match="is not for 2 tokens and SILU_MUL"):
        prepare(torch.zeros(2, 2), GemvShape(2, 1, 1), Epilogue.SILU_MUL)
    with pytest.raises(ValueError, match="float64 is none of"):
        prepare(torch.zeros(2, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"a bias of 4 rows is float32 \[4\]"):
        gemv.prepare(layer.planes, x, torch.zeros(2, 4), multiprocessors=1, bias=torch.zeros(3))
