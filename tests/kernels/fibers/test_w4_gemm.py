"""Quantised matrices times 9 to 32 tokens by the matrix cores, in every order that cards have."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgekv.kernels.gemm import gemm
from edgekv.kernels.gemm.epilogue import Epilogue
from edgekv.kernels.gemm.gemm import GemmCut
from edgekv.kernels.gemm.planes import ONE_OF_EACH_FORMAT
from edgekv.kernels.quant.encodings import ENCODINGS
from tests.kernels.fibers.gemm_cases import EPILOGUES, check_gemm, draw, draw_layer, run_gemm
from tests.kernels.fibers.harness import SEEDS

# Orders of mma.h, rooms for tokens, kinds of operands and of output; they go round, as formats do not know of them.
VARIANTS = (
    (80, 16, torch.bfloat16, torch.bfloat16),
    (10, 16, torch.float16, torch.float32),
    (11, 32, torch.bfloat16, torch.bfloat16),
    (12, 16, torch.bfloat16, torch.float32),
    (80, 32, torch.float16, torch.float16),
)
KINDS = tuple((encoding.name, *VARIANTS[i % len(VARIANTS)]) for i, encoding in enumerate(ONE_OF_EACH_FORMAT))
IN_PARTS = ("q4_0", "q5_1", "q6_K")  # formats whose splits are added up: that does not know of formats either


def cut_of(cols: int, splits: int) -> GemmCut:
    steps = -(-cols // 128)
    each = -(-steps // min(splits, steps))
    return GemmCut(-(-steps // each), each)


@pytest.mark.parametrize(("name", "order", "room", "x_dtype", "out_dtype"), KINDS)
@settings(max_examples=4, derandomize=True)
@given(
    num_columns=st.integers(1, 80),
    groups=st.integers(1, 24),
    splits=st.integers(1, 3),
    tokens=st.integers(1, 16),
    epilogue=st.sampled_from(EPILOGUES),
    biased=st.booleans(),
    seed=st.integers(0, 2**32),
)
@example(num_columns=1, groups=1, splits=1, tokens=1, epilogue=Epilogue.STORE, biased=False, seed=0)
@example(num_columns=70, groups=9, splits=2, tokens=15, epilogue=Epilogue.GELU_MUL, biased=True, seed=0)
def test_product(
    name: str, order: int, room: int, x_dtype: torch.dtype, out_dtype: torch.dtype, num_columns: int, groups: int,
    splits: int, tokens: int, epilogue: Epilogue, biased: bool, seed: int,
) -> None:  # fmt: skip
    tokens, rng = room - 16 + tokens, np.random.default_rng(seed)
    blocks = -(-groups * 32 // ENCODINGS[name].block_cols)
    layer = draw_layer(name, num_columns, blocks, rng, epilogue, biased=biased)
    x, before = draw(rng, tokens, layer.planes.cols, x_dtype), draw(rng, tokens, num_columns, out_dtype)
    cut = cut_of(layer.planes.cols, splits if name in IN_PARTS else 1)
    check_gemm(layer, x, before, cut, EK_ORDER=order)


@pytest.mark.parametrize("splits", [1, 2])
def test_no_order_of_threads_matters(splits: int) -> None:
    rng, dtype = np.random.default_rng(0), torch.bfloat16
    layer = draw_layer("q6_K", 40, 2, rng, Epilogue.SILU_MUL, biased=True)
    x, before = draw(rng, 12, 512, dtype), draw(rng, 12, 40, dtype)
    check_gemm(layer, x, before, cut_of(512, splits), SEEDS)


@pytest.mark.parametrize(("splits", "plant"), [(1, "EK_PLANT_BARRIER"), (2, "EK_PLANT_PART")])
def test_a_planted_fault_is_found(splits: int, plant: str) -> None:
    """A missing barrier; a part of the sums that is not added."""
    rng, dtype = np.random.default_rng(0), torch.bfloat16
    layer = draw_layer("q6_K", 40, 2, rng, Epilogue.STORE, biased=False)
    x, before = draw(rng, 16, 512, dtype), draw(rng, 16, 40, dtype)
    with pytest.raises(AssertionError):
        check_gemm(layer, x, before, cut_of(512, splits), SEEDS, **{plant: 1})


def test_a_token_that_is_no_number_spoils_itself_alone() -> None:
    rng, dtype = np.random.default_rng(0), torch.bfloat16
    layer = draw_layer("q6_K", 70, 2, rng, Epilogue.STORE, biased=False)
    x = draw(rng, 11, 512, dtype)
    x[4, 150] = torch.inf
    found = run_gemm(layer, x, torch.zeros(11, 70, dtype=dtype), cut_of(512, 2))
    assert not found[4].isfinite().any()
    assert found[[*range(4), *range(5, 11)]].isfinite().all()


def test_a_token_comes_out_the_same_whoever_is_beside_it() -> None:
    rng, dtype = np.random.default_rng(0), torch.bfloat16
    layer = draw_layer("q6_K", 33, 4, rng, Epilogue.STORE, biased=False)
    x, before = draw(rng, 20, 1024, dtype), torch.zeros(20, 33, dtype=dtype)
    wanted = run_gemm(layer, x, before, cut_of(1024, 3))
    for tokens in (9, 16):
        assert torch.equal(run_gemm(layer, x[:tokens], before[:tokens], cut_of(1024, 3)), wanted[:tokens])


@settings(derandomize=True)
@given(
    num_columns=st.integers(1, 200_000),
    groups=st.integers(1, 2000),
    gated=st.booleans(),
    multiprocessors=st.integers(1, 200),
)
def test_splits_have_all_steps_between_them(
    num_columns: int, groups: int, gated: bool, multiprocessors: int
) -> None:
    cut = gemm.choose_cut(num_columns, groups, gated=gated, multiprocessors=multiprocessors)
    steps = -(-groups // 4)
    assert cut.splits * cut.steps >= steps > (cut.splits - 1) * cut.steps
    assert cut.splits <= 4 * multiprocessors


def test_what_does_not_fit_together_is_refused() -> None:
    rng, dtype = np.random.default_rng(0), torch.bfloat16
    layer = draw_layer("q4_0", 64, 16, rng, Epilogue.STORE, biased=False)
    out = torch.zeros(9, 64, dtype=dtype)

    def prepare(x: torch.Tensor, cut: GemmCut, **other: object) -> None:
        gemm.prepare(layer.planes, x, out, multiprocessors=1, cut=cut, **other)  # type: ignore[arg-type]

    whole, halves = GemmCut(1, 4), GemmCut(2, 2)
    prepare(torch.zeros(9, 512, dtype=dtype), whole)
    with pytest.raises(ValueError, match="9 tokens of 512 columns are not bfloat16"):
        prepare(torch.zeros(8, 512, dtype=dtype), whole)
    with pytest.raises(ValueError, match="9 tokens of 512 columns are not bfloat16"):
        prepare(torch.zeros(9, 513, dtype=dtype)[:, 1:], whole)
    with pytest.raises(ValueError, match="multiply bfloat16 or float16"):
        prepare(torch.zeros(9, 512), whole)
    with pytest.raises(ValueError, match="takes 1152 float32"):
        prepare(torch.zeros(9, 512, dtype=dtype), halves, parts=torch.zeros(1151))
    with pytest.raises(ValueError, match="takes 1152 float32"):
        prepare(torch.zeros(9, 512, dtype=dtype), halves)
