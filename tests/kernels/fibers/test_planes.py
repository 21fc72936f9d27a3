"""Planes hold what rows do: they become rows again to the bit, and have the sizes that kernels count on."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekv.kernels.gemm.planes import (
    ALIGNMENT,
    ENCODINGS_IN_PLANES,
    Planes,
    is_supported,
    join,
    plane_rows,
    split,
)
from edgekv.kernels.quant.encodings import (
    AFFINE4_128,
    BF16,
    IQ4_NL,
    IQ4_XS,
    MXFP4,
    Q4_0,
    Q4_K,
    Q5_K,
    Q6_K,
    Q8_0,
    Encoding,
)

of_all = pytest.mark.parametrize("encoding", ENCODINGS_IN_PLANES, ids=lambda encoding: encoding.name)


def draw(encoding: Encoding, rows: int, blocks: int, seed: int) -> tuple[np.ndarray, int]:
    raw = np.random.default_rng(seed).integers(0, 256, (rows, blocks * encoding.block_bytes), np.uint8)
    return raw, blocks * encoding.block_cols


@of_all
@given(rows=st.integers(1, 20), blocks=st.integers(1, 9), seed=st.integers(0, 2**32))
def test_any_rows_come_back(encoding: Encoding, rows: int, blocks: int, seed: int) -> None:
    raw, cols = draw(encoding, rows, blocks, seed)
    planes = split(encoding, raw, cols)
    back = join(encoding, planes, cols)
    assert back.dtype == np.uint8
    assert np.array_equal(back, raw)
    sizes = plane_rows(encoding, cols)
    assert [plane.shape for plane in planes] == [(rows, sizes.q), (rows, sizes.h), (rows, sizes.s)]


@of_all
@given(blocks=st.integers(1, 70))
def test_rows_are_aligned_and_hardly_larger_than_stored_ones(encoding: Encoding, blocks: int) -> None:
    cols = blocks * encoding.block_cols
    sizes = plane_rows(encoding, cols)
    assert not any(size % ALIGNMENT for size in (sizes.q, sizes.h, sizes.s))
    super_blocks = cols // 256 if encoding.block_cols == 256 else 0
    stored = Q8_0 if encoding is IQ4_NL else encoding
    assert 0 <= sizes.num_bytes - stored.row_bytes(cols) < 4 * super_blocks + 3 * ALIGNMENT


@of_all
def test_slices_lie_one_under_the_other(encoding: Encoding) -> None:
    raw, cols = draw(encoding, 7, 3, 0)
    whole = split(encoding, raw, cols)
    upper, lower = split(encoding, raw[:3], cols), split(encoding, raw[3:], cols)
    for plane, first, second in zip(whole, upper, lower, strict=True):
        assert np.array_equal(plane, np.concatenate((first, second)))


@of_all
def test_rows_of_a_file_that_cannot_be_written_to(encoding: Encoding) -> None:
    raw, cols = draw(encoding, 1, 1, 0)
    raw.setflags(write=False)
    assert all(plane.flags.writeable for plane in split(encoding, raw, cols))


def test_columns_of_a_group_lie_where_they_are_drawn() -> None:
    """Codes that count: column c of a row of one block has code c, or what is left of it."""
    counting = np.arange(256)
    q8 = np.zeros((1, 34), np.uint8)
    q8[0, 2:] = counting[:32]
    assert np.array_equal(split(Q8_0, q8, 32).q[0], counting[:32])
    q4 = np.zeros((1, 18), np.uint8)
    q4[0, 2:] = (counting[:16] & 15) | (counting[16:32] & 15) << 4
    assert np.array_equal(split(Q4_0, q4, 32).q, q4[:, 2:])


def test_q8_0_keeps_halves_of_groups_apart() -> None:
    raw, cols = draw(Q8_0, 2, 5, 1)
    q = split(Q8_0, raw, cols).q.reshape(2, 2, 5, 16)
    assert np.array_equal(q[:, 0], raw.reshape(2, 5, 34)[..., 2:18])
    assert np.array_equal(q[:, 1], raw.reshape(2, 5, 34)[..., 18:])


@pytest.mark.parametrize("encoding", [Q4_K, Q5_K, Q6_K], ids=lambda encoding: encoding.name)
def test_a_column_of_a_super_block_changes_its_own_place_only(encoding: Encoding) -> None:
    """All low halves in turn: the byte that changes is that of group, column of 16, and half as drawn."""
    first, size = {"q4_K": (16, 32), "q5_K": (48, 32), "q6_K": (0, 64)}[encoding.name]
    none = np.zeros((1, encoding.block_bytes), np.uint8)
    for byte in range(128):
        for high in (0, 1):
            raw = none.copy()
            raw[0, first + byte] = 15 << 4 * high
            column = byte // size * 2 * size + high * size + byte % size
            changed = split(encoding, raw, 256).q[0]
            assert np.flatnonzero(changed).tolist() == [column // 32 * 16 + column % 16]
            assert changed.max() == 15 << 4 * (column % 32 // 16)


def test_scales_of_q4_k_are_unpacked() -> None:
    raw, cols = draw(Q4_K, 3, 2, 2)
    s = split(Q4_K, raw, cols).s[:, :40].reshape(3, 2, 20)
    blocks = raw.reshape(3, 2, 144)
    assert np.array_equal(s[..., :4], blocks[..., :4])
    assert s[..., 4:].max() < 64
    assert np.array_equal(s[..., 4:12:2], blocks[..., 4:8] & 63)
    assert np.array_equal(s[..., 5:12:2], blocks[..., 8:12] & 63)


def test_values_of_iq4_nl_are_codes_of_q8_0() -> None:
    raw = np.zeros((1, 18), np.uint8)
    raw[0, 2:] = np.arange(16) | np.arange(16)[::-1] << 4
    low = split(IQ4_NL, raw, 32).q[0].view(np.int8)
    assert low[:16].tolist() == [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
    assert np.array_equal(low[16:], low[15::-1])


@pytest.mark.parametrize("encoding", [BF16, MXFP4, IQ4_XS], ids=lambda encoding: encoding.name)
def test_other_encodings_have_none(encoding: Encoding) -> None:
    assert not is_supported(encoding, 256)
    with pytest.raises(ValueError, match=f"{encoding.name} is not kept in planes"):
        plane_rows(encoding, 256)


@of_all
def test_rows_are_whole_blocks(encoding: Encoding) -> None:
    assert is_supported(encoding, encoding.block_cols)
    assert is_supported(encoding, 256)
    assert not is_supported(encoding, 0)
    assert not is_supported(encoding, 240)
    assert is_supported(encoding, 128) == (encoding.block_cols <= 128)
    assert not is_supported(AFFINE4_128, 192)


def test_rows_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="have 36 bytes each"):
        split(Q4_0, np.zeros((2, 35), np.uint8), 64)
    with pytest.raises(ValueError, match="no multiple of the 256"):
        plane_rows(Q4_K, 128)
    planes = split(Q4_0, np.zeros((2, 36), np.uint8), 64)
    with pytest.raises(ValueError, match="planes of 2 rows"):
        join(Q4_0, Planes(planes.q, planes.h, planes.s[:1]), 64)
