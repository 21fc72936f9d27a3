"""Rows as files store them, in panels and out again: bit for bit what their bytes mean."""

import ctypes

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekv.kernels.cpu import abi
from edgekv.kernels.cpu.abi import Error, Form
from edgekv.kernels.cpu.formats import (
    PanelFormat,
    activation_form,
    activation_stride,
    panel_bytes,
    panel_format,
)
from edgekv.kernels.cpu.library import load_library
from edgekv.kernels.quant.encodings import BF16, ENCODINGS, F32, Q4_0, Q4_K, Q8_0, Encoding
from tests.kernels.cpu.linear_harness import (
    Floats,
    Packed,
    Weight,
    pool,
    random_rows,
    random_weight,
    weight_of,
)

TIERS = load_library().tiers
every_encoding = pytest.mark.parametrize("encoding", ENCODINGS.values(), ids=ENCODINGS)


def assert_same_bits(found: Floats, wanted: Floats) -> None:
    """NaN for NaN; and 0 for what has a scale or a value too small for float32's full precision: runs flush those."""
    tiny = np.abs(wanted) < 128 * np.finfo(np.float32).tiny
    same = found.view(np.int32) == wanted.view(np.int32)
    assert (same | (np.isnan(found) & np.isnan(wanted)) | (tiny & (found == 0))).all()


@pytest.mark.parametrize("tier", TIERS)
@every_encoding
@settings(deadline=None, max_examples=15)
@given(rows=st.integers(1, 50), blocks=st.integers(1, 4), seed=st.integers(0, 2**32))
def test_any_bytes_come_back_as_what_they_mean(
    tier: str, encoding: Encoding, rows: int, blocks: int, seed: int
) -> None:
    raw = np.random.default_rng(seed).integers(0, 256, (rows, blocks * encoding.block_bytes), np.uint8)
    weight, handle = weight_of(encoding, raw), pool(tier, 2)
    assert_same_bits(weight.pack(handle).row_values(handle, range(rows)), weight.values)


@every_encoding
def test_rows_lie_where_they_are_asked_for_and_zeros_around_them(encoding: Encoding) -> None:
    rng, handle = np.random.default_rng(0), pool(TIERS[0], 1)
    weight = random_weight(encoding.name, 5, 2 * encoding.block_cols, rng)
    places = [37, 0, 16, 15, 31]
    packed = weight.pack(handle, places, rows=40)
    expected = np.zeros((40, 2 * encoding.block_cols), np.float32)
    expected[places] = weight.values
    assert np.array_equal(packed.row_values(handle, range(40)), expected)
    assert (packed.memory[packed.num_bytes :] == 0xFF).all()


@every_encoding
def test_rows_may_be_packed_in_any_portions(encoding: Encoding) -> None:
    rng, handle = np.random.default_rng(1), pool(TIERS[0], 2)
    weight = random_weight(encoding.name, 70, encoding.block_cols, rng)
    whole = weight.pack(handle)
    again = Packed.empty(weight.panels, 70, encoding.block_cols, encoding.group)
    for first, stop in ((0, 1), (1, 20), (20, 70)):
        part = np.ascontiguousarray(weight.raw[first:stop])
        places = np.arange(first, stop)
        error = load_library().functions.ek_pack(
            handle, encoding.number, encoding.group, part.ctypes.data, part.shape[1], stop - first,
            places.ctypes.data, ctypes.byref(again.matrix),
        )  # fmt: skip
        assert error == 0
    assert np.array_equal(again.memory, whole.memory)


@pytest.mark.parametrize("cols", [1, 15, 17, 255, 257, 515])
@pytest.mark.parametrize("name", ["f32", "f16", "bf16"])
def test_floats_have_any_number_of_columns(name: str, cols: int) -> None:
    handle = pool(TIERS[0], 1)
    weight = random_weight(name, 18, cols, np.random.default_rng(cols))
    packed = weight.pack(handle)
    assert np.array_equal(packed.row_values(handle, range(18)), weight.values)
    assert (packed.memory[packed.num_bytes :] == 0xFF).all()


def test_rows_may_lie_apart_in_the_file() -> None:
    handle, rng = pool(TIERS[0], 2), np.random.default_rng(0)
    raw = rng.integers(0, 256, (33, 3 * Q8_0.block_bytes + 5), np.uint8)
    inner = np.ascontiguousarray(raw[:, : 3 * Q8_0.block_bytes])
    wanted = weight_of(Q8_0, inner)
    apart = Weight(Q8_0, raw, wanted.values)
    assert_same_bits(apart.pack(handle).row_values(handle, range(33)), wanted.values)


def pack_error(encoding: Encoding, packed: Packed, **changes: int) -> Error:
    asked = {"number": encoding.number, "group": encoding.group, "row_bytes": encoding.row_bytes(256), "rows": 2,
             "place": 1} | changes  # fmt: skip
    raw, places = np.zeros(4096, np.uint8), np.array([0, asked["place"]], np.int64)
    error = load_library().functions.ek_pack(
        pool(TIERS[0], 1), asked["number"], asked["group"], raw.ctypes.data, asked["row_bytes"], asked["rows"],
        places.ctypes.data, ctypes.byref(packed.matrix),
    )  # fmt: skip
    assert not packed.memory[: packed.num_bytes].any()
    return Error(error)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"number": Q8_0.number}, Error.KIND),  # goes into other panels
        ({"number": 99}, Error.KIND),
        ({"number": -1}, Error.KIND),
        ({"rows": -1}, Error.SHAPE),
        ({"row_bytes": Q4_0.row_bytes(256) - 1}, Error.SHAPE),
        ({"place": 40}, Error.SHAPE),
        ({"place": -1}, Error.SHAPE),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, int], error: Error) -> None:
    assert pack_error(Q4_0, Packed.empty(PanelFormat.Q4, 40, 256, 0), **changes) is error


def test_groups_of_another_size_are_refused() -> None:
    encoding = ENCODINGS["affine4_64"]
    assert pack_error(encoding, Packed.empty(PanelFormat.Q4Z, 40, 256, 128)) is Error.KIND
    assert pack_error(encoding, Packed.empty(PanelFormat.Q4Z, 40, 256, 64), group=48) is Error.KIND


@pytest.mark.parametrize(("encoding", "cols"), [(Q4_K, 255), (ENCODINGS["iq4_xs"], 224)])
def test_columns_that_are_no_whole_blocks_are_refused(encoding: Encoding, cols: int) -> None:
    packed = Packed.empty(panel_format(encoding), 16, 256, 0)
    packed.matrix.cols = cols
    assert pack_error(encoding, packed, row_bytes=1000) is Error.SHAPE


def test_what_has_no_groups_is_not_packed_into_any() -> None:
    packed = Packed.empty(PanelFormat.Q4, 40, 256, 0)
    packed.matrix.group = 32
    assert pack_error(Q4_0, packed) is Error.SHAPE


@pytest.mark.parametrize("row", [-1, 16, 1 << 40])
def test_a_row_that_there_is_not_is_refused(row: int) -> None:
    handle = pool(TIERS[0], 1)
    packed = random_weight("bf16", 16, 32, np.random.default_rng(0)).pack(handle)
    rows, out = np.array([0, row], np.int64), np.full((2, 32), np.nan, np.float32)
    error = load_library().functions.ek_matrix_rows(
        handle, ctypes.byref(packed.matrix), rows.ctypes.data, 2, out.ctypes.data, 32
    )
    assert Error(error) is Error.SHAPE
    assert np.isnan(out).all()


@pytest.mark.parametrize(
    ("name", "field", "value", "error"),
    [
        ("q4_K", "data", None, Error.NULL),
        ("q4_K", "format", 11, Error.KIND),
        ("q4_K", "format", -1, Error.KIND),
        ("q4_K", "rows", 0, Error.SHAPE),
        ("q4_K", "cols", 0, Error.SHAPE),
        ("q4_K", "cols", 100, Error.SHAPE),
        ("q4_K", "group", 32, Error.SHAPE),
        ("affine4_128", "cols", 192, Error.SHAPE),
        *(("affine4_128", "group", group, Error.SHAPE) for group in (0, 1, 16, 96, 256, -32)),
    ],
)
def test_rows_of_an_impossible_matrix_are_refused(name: str, field: str, value: int | None, error: Error) -> None:
    handle = pool(TIERS[0], 1)
    packed = random_weight(name, 16, 256, np.random.default_rng(0)).pack(handle)
    matrix = abi.Matrix.from_buffer_copy(packed.matrix)
    setattr(matrix, field, value)
    rows, out = np.zeros(1, np.int64), np.zeros(512, np.float32)
    found = load_library().functions.ek_matrix_rows(
        handle, ctypes.byref(matrix), rows.ctypes.data, 1, out.ctypes.data, 512
    )
    assert Error(found) is error


def test_panels_take_the_bytes_that_their_layout_says() -> None:
    assert panel_bytes(PanelFormat.F32, 17, 3) == 2 * 16 * 3 * 4
    assert panel_bytes(PanelFormat.BF16, 16, 5) == 16 * 6 * 2  # columns in pairs
    assert panel_bytes(PanelFormat.Q4, 32, 64) == 32 * (2 * 18)  # as many as q4_0 has
    assert panel_bytes(PanelFormat.Q4Z, 16, 256, 128) == 16 * 2 * (2 + 1 + 64)
    assert panel_bytes(PanelFormat.Q4K, 16, 512) == 16 * 2 * (2 + 2 + 8 + 8 + 128)
    assert panel_bytes(PanelFormat.Q5K, 16, 512) == 16 * 2 * (2 + 2 + 8 + 8 + 160)
    assert panel_bytes(PanelFormat.Q6K, 16, 512) == 16 * 2 * 210


@pytest.mark.parametrize(
    ("panels", "cols", "group"),
    [(PanelFormat.Q4, 48, 0), (PanelFormat.Q6K, 128, 0), (PanelFormat.Q4Z, 96, 64), (PanelFormat.Q4Z, 96, 96)],
)
def test_columns_that_are_no_whole_units_have_no_panels(panels: PanelFormat, cols: int, group: int) -> None:
    with pytest.raises(ValueError, match="columns"):
        panel_bytes(panels, 16, cols, group)


@pytest.mark.parametrize(
    ("encoding", "form"),
    [(F32, Form.F32), (ENCODINGS["f16"], Form.F32), (BF16, Form.BF16), (Q4_0, Form.Q8), (Q4_K, Form.Q8)],
)
def test_form_of_activations(encoding: Encoding, form: Form) -> None:
    assert activation_form(panel_format(encoding)) is form


@given(cols=st.integers(1, 1 << 16), itemsize=st.sampled_from([1, 2, 4]))
def test_rows_of_activations_are_an_odd_number_of_cache_lines_apart(cols: int, itemsize: int) -> None:
    stride = activation_stride(cols, itemsize)
    assert stride * itemsize % 128 == 64
    assert cols <= stride < cols + 2 * 64 // itemsize


def test_random_rows_have_finite_values() -> None:
    rng = np.random.default_rng(0)
    for encoding in ENCODINGS.values():
        values = weight_of(encoding, random_rows(encoding, 8, 4 * encoding.block_cols, rng)).values
        assert np.isfinite(values).all()
        assert values.std() > 0
