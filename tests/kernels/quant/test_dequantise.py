"""Every encoding means, bit for bit, what the gguf package and the format's own formula say."""

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgekv.kernels.quant.dequantise import dequantise
from edgekv.kernels.quant.encodings import AFFINE4, ENCODINGS, F32, MXFP4, Q4_0, Q8_0, Encoding

OF_GGUF = [encoding for encoding in ENCODINGS.values() if encoding.group == 0]
# Zero of either sign, the smallest and largest denormal, the smallest normal, largest, one, infinities and NaN.
SPECIAL_HALVES = np.array(
    [0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x7BFF, 0xFBFF, 0x3C00, 0xBC00, 0x7C00, 0xFC00, 0x7E00, 0x7C01],
    np.uint16,
)
# Where the half-precision scales of a block lie.
SCALES = {
    "q4_0": (0,), "q4_1": (0, 2), "q5_0": (0,), "q5_1": (0, 2), "q8_0": (0,), "q4_K": (0, 2), "q5_K": (0, 2),
    "q6_K": (208,), "iq4_nl": (0,), "iq4_xs": (0,), "f16": (0,),
}  # fmt: skip


def ours(encoding: Encoding, raw: NDArray[np.uint8], cols: int) -> NDArray[np.float32]:
    return dequantise(encoding, torch.from_numpy(raw), cols).numpy()


def theirs(encoding: Encoding, raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[encoding.name.upper()])


def assert_same_bits(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> None:
    """NaN for NaN: what a NaN carries depends on the instruction that numpy and torch happen to take."""
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype == np.float32
    same = found.view(np.int32) == wanted.view(np.int32)
    assert (same | (np.isnan(found) & np.isnan(wanted))).all()


@pytest.mark.parametrize("encoding", OF_GGUF, ids=lambda encoding: encoding.name)
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 40), blocks=st.integers(1, 5), seed=st.integers(0, 1 << 32))
def test_any_bytes_mean_what_gguf_says(encoding: Encoding, rows: int, blocks: int, seed: int) -> None:
    shape = (rows, blocks * encoding.block_bytes)
    raw = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    assert_same_bits(ours(encoding, raw, blocks * encoding.block_cols), theirs(encoding, raw))


@pytest.mark.parametrize("name", SCALES)
def test_special_scales_mean_what_gguf_says(name: str) -> None:
    encoding, rng = ENCODINGS[name], np.random.default_rng(0)
    pairs = [(first, second) for first in SPECIAL_HALVES for second in SPECIAL_HALVES]
    raw = rng.integers(0, 256, (len(pairs), encoding.block_bytes), np.uint8)
    for place, halves in zip(SCALES[name], np.array(pairs).T, strict=False):
        raw[:, place : place + 2] = halves[:, None].view(np.uint8)
    assert_same_bits(ours(encoding, raw, encoding.block_cols), theirs(encoding, raw))


def test_every_exponent_of_mxfp4() -> None:
    raw = np.tile(np.arange(17, dtype=np.uint8) * 17, (256, 1))
    raw[:, 0] = np.arange(256)
    assert_same_bits(ours(MXFP4, raw, 32), theirs(MXFP4, raw))


@pytest.mark.parametrize("encoding", AFFINE4.values(), ids=lambda encoding: encoding.name)
def test_affine_groups_follow_their_formula(encoding: Encoding) -> None:
    rng = np.random.default_rng(1)
    rows, groups, size = 5, 3, encoding.group
    raw = rng.integers(0, 256, (rows, groups, encoding.block_bytes), np.uint8)
    raw[..., :2] = rng.normal(size=(rows, groups, 1)).astype(np.float16).view(np.uint8)
    wanted = np.empty((rows, groups * size), np.float32)
    for row in range(rows):
        for col in range(groups * size):
            block, within = raw[row, col // size], col % size
            byte = int(block[4 + within // 32 * 16 + within % 16])
            value = byte & 15 if within % 32 < 16 else byte >> 4
            wanted[row, col] = np.float32(block[:2].view(np.float16)[0]) * np.float32(value - int(block[2]))
    assert_same_bits(ours(encoding, raw.reshape(rows, -1), groups * size), wanted)


@pytest.mark.parametrize("encoding", OF_GGUF, ids=lambda encoding: encoding.name)
@pytest.mark.parametrize("rows", [1, 6])
def test_rows_may_be_any_view(encoding: Encoding, rows: int) -> None:
    raw = torch.from_numpy(np.random.default_rng(2).integers(0, 256, (rows, encoding.block_bytes + 1), np.uint8))
    part = raw[::2, 1:]
    assert_same_bits(dequantise(encoding, part, encoding.block_cols).numpy(), theirs(encoding, part.numpy().copy()))


def test_the_result_is_a_copy() -> None:
    raw = torch.zeros(1, 8, dtype=torch.uint8)
    values = dequantise(F32, raw, 2)
    raw.fill_(255)
    assert values.tolist() == [[0.0, 0.0]]


def test_no_rows_are_no_values() -> None:
    assert dequantise(Q8_0, torch.empty(0, 34, dtype=torch.uint8), 32).shape == (0, 32)


@pytest.mark.parametrize(("width", "dtype"), [(17, torch.uint8), (18, torch.int8), (36, torch.uint8)])
def test_rows_of_another_size_or_type_are_refused(width: int, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="q4_0 rows of 32 columns have 18 bytes"):
        dequantise(Q4_0, torch.zeros(2, width, dtype=dtype), 32)
