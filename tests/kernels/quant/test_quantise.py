"""On-load quantisation: int8 is ggml's to the bit, int4 is nearer to the weights than ggml's."""

import math

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from edgekv.kernels.quant.dequantise import dequantise
from edgekv.kernels.quant.encodings import Q4_0, Q8_0, Encoding
from edgekv.kernels.quant.quantise import quantise


def back(encoding: Encoding, rows: Tensor) -> Tensor:
    return dequantise(encoding, quantise(encoding, rows), rows.shape[1])


def theirs(rows: Tensor, kind: Type) -> Tensor:
    packed = gguf.quants.quantize(rows.float().numpy(), kind)
    return torch.from_numpy(np.array(gguf.quants.dequantize(packed, kind)))


def noise(rows: int, cols: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(rows, cols, generator=generator)
    return made * torch.exp(torch.randn(rows, 1, generator=generator) * 2)


@given(
    rows=st.integers(1, 9),
    blocks=st.integers(1, 5),
    seed=st.integers(0, 1 << 20),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    steps=st.sampled_from([0, 4, 254]),
)
def test_int8_is_ggmls_to_the_bit(rows: int, blocks: int, seed: int, dtype: torch.dtype, steps: int) -> None:
    """Coarse values are multiples of half a step, on which rounding differs from kind to kind."""
    values = noise(rows, 32 * blocks, seed).to(dtype)
    if steps:
        values = (torch.randint(-steps, steps + 1, values.shape) / 2).to(dtype)
        values[:, ::32] = steps / 2
    expected = gguf.quants.quantize(values.float().numpy(), Type.Q8_0)
    assert np.array_equal(quantise(Q8_0, values).numpy(), expected)


def test_just_below_a_half_is_rounded_down() -> None:
    values = torch.zeros(1, 32)
    values[0, 0], values[0, 1] = 127.0, float(np.nextafter(np.float32(0.5), np.float32(0)))
    assert quantise(Q8_0, values)[0, 2:4].view(torch.int8).tolist() == [127, 0]


@given(seed=st.integers(0, 1 << 20), kind=st.sampled_from(["normal", "uniform", "laplace", "one-sided"]))
def test_int4_is_nearer_than_ggmls(seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    shape = (16, 256)
    made = {
        "normal": lambda: rng.normal(size=shape),
        "uniform": lambda: rng.uniform(-1, 1, shape),
        "laplace": lambda: rng.laplace(size=shape),
        "one-sided": lambda: np.abs(rng.normal(size=shape)),
    }[kind]()
    values = torch.from_numpy(made.astype(np.float32))
    ours = (back(Q4_0, values) - values).square().sum()
    ggmls = (theirs(values, Type.Q4_0) - values).square().sum()
    assert ours < 0.97 * ggmls


def test_by_how_much_int4_is_nearer() -> None:
    values = torch.randn(2048, 512, generator=torch.Generator().manual_seed(3))
    ours = (back(Q4_0, values) - values).square().mean()
    ggmls = (theirs(values, Type.Q4_0) - values).square().mean()
    assert ours < 0.9 * ggmls
    assert ours.sqrt() < 0.082  # of a standard deviation


@given(seed=st.integers(0, 1 << 20), encoding=st.sampled_from([Q8_0, Q4_0]))
def test_no_value_is_further_off_than_the_format_allows(seed: int, encoding: Encoding) -> None:
    values = noise(8, 128, seed)
    largest = values.view(8, -1, 32).abs().amax(2, keepdim=True)
    error = (back(encoding, values) - values).view(8, -1, 32).abs()
    # int8: half a step and the scale's rounding; int4: the peak may be cut off by 1.75 of 8.75 steps. Below 2^-14 the
    # scale, a float16, is rounded to a multiple of 2^-24.
    bound = largest * {"q8_0": 0.5 / 127 + 1e-3, "q4_0": 0.21}[encoding.name] + 127 * 2.0**-25
    assert (error <= bound).all()


@pytest.mark.parametrize("encoding", [Q8_0, Q4_0], ids=lambda encoding: encoding.name)
class TestBoth:
    def test_zeros_stay_zeros(self, encoding: Encoding) -> None:
        values = torch.zeros(3, 64)
        values[1, 40] = -2.5
        made = back(encoding, values)
        assert (made[[0, 2]] == 0).all()
        assert (made[1, :32] == 0).all()
        assert made[1, 40] == pytest.approx(-2.5, rel=1e-3)

    def test_a_row_is_the_same_in_any_company(self, encoding: Encoding, monkeypatch: pytest.MonkeyPatch) -> None:
        values = noise(300, 96, 5)
        whole = quantise(encoding, values)
        assert torch.equal(quantise(encoding, values[37:38]), whole[37:38])
        monkeypatch.setattr("edgekv.kernels.quant.quantise._SLICE_BLOCKS", 7)
        assert torch.equal(quantise(encoding, values), whole)

    def test_rows_may_be_strided(self, encoding: Encoding) -> None:
        values = noise(64, 64, 6)
        assert torch.equal(quantise(encoding, values.T), quantise(encoding, values.T.contiguous()))

    def test_columns_that_are_no_whole_blocks_are_refused(self, encoding: Encoding) -> None:
        with pytest.raises(ValueError, match="48 columns are no multiple of the 32"):
            quantise(encoding, torch.zeros(2, 48))

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
    def test_what_has_no_scale_is_refused(self, encoding: Encoding, bad: float) -> None:
        values = noise(4, 64, 7)
        values[2, 33] = bad
        with pytest.raises(ValueError, match="infinities, NaN or values too large"):
            quantise(encoding, values)

    def test_the_smallest_numbers_become_zeros(self, encoding: Encoding) -> None:
        assert (back(encoding, torch.full((1, 32), 1e-40)) == 0).all()
