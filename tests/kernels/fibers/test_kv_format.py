"""kv.h: rows go into the cache and come out as their format says, and nothing else of the cache is written."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from edgekv.kernels.cpu.abi import KvFormat
from edgekv.kernels.cpu.kv import KEYS, KvLayout
from tests.kernels.fibers.cases import EkKv, EkRows, kv_case
from tests.kernels.fibers.harness import SEEDS, FiberFault, fiber_kernel, in_all_orders

BF16, F16, E4M3, INT8, INT4, F32 = range(6)
BITS = {BF16: 16, F16: 16, E4M3: 8, INT8: 8, INT4: 4, F32: 32}
SCALE_BYTES = {BF16: 0, F16: 0, E4M3: 0, INT8: 2, INT4: 4, F32: 0}
POISON = 0xFF
SHIFT, SEGMENTS = 1, (1, 0, 1, 1)  # segments of two blocks; 0: a hole
TABLE = [5, 0, 7, 4]  # block numbers: in segments 2, 0, 3 and 2
KV_HEADS = 3

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


def padded(num_bytes: int) -> int:
    return -(-num_bytes // 128) * 128


@dataclass(frozen=True)
class Format:
    kv: int
    head_dim: int
    block_size: int

    @property
    def row(self) -> int:
        return self.head_dim * BITS[self.kv] // 8

    @property
    def plane(self) -> int:
        return padded(KV_HEADS * self.block_size * self.row)

    @property
    def scale_plane(self) -> int:
        return padded(KV_HEADS * self.block_size * SCALE_BYTES[self.kv])

    @property
    def block(self) -> int:
        return 128 + 2 * (self.plane + self.scale_plane)  # as if another layer came first


# Where all lanes of a row have a piece of it, and where some have none.
FORMATS = [
    *(Format(kv, 96, 16) for kv in range(6)),
    Format(INT8, 128, 32),
    Format(INT4, 256, 16),
    Format(F32, 256, 32),
]


def rows_of(format: Format) -> Floats:
    """[tokens, kv_heads, head_dim]: of all sizes, with zeros and constant rows among them."""
    tokens = len(TABLE) * format.block_size
    rng = np.random.default_rng(format.head_dim + format.kv)
    rows = rng.standard_normal((tokens, KV_HEADS, format.head_dim)) * 4.0 ** rng.integers(-4, 4, (tokens, KV_HEADS, 1))
    rows[3], rows[5], rows[7] = 0, 1.5, 1e-9
    return rows.astype(np.float32)


class Cache:
    """Poisoned segments, and the launch's arguments."""

    def __init__(self, format: Format, rows: Floats) -> None:
        self.format, self.rows = format, np.ascontiguousarray(rows)
        self.back = np.zeros((2, *rows.shape), np.float32)
        size = format.block << SHIFT
        memory = [np.full(size + 128, POISON, np.uint8) for _ in SEGMENTS]
        self.segments = [each[(start := -each.ctypes.data % 128) : start + size] for each in memory]
        self.addresses = np.array(
            [each.ctypes.data if there else 0 for each, there in zip(self.segments, SEGMENTS, strict=True)], np.uint64
        )
        self.table = np.array(TABLE, np.int32)
        values, scales = 128 + format.plane, 128 + 2 * format.plane
        kv = EkKv(
            self.addresses.ctypes.data, format.block, 128, values, scales, scales + format.scale_plane,
            format.block_size * format.row, SHIFT, KV_HEADS,
        )  # fmt: skip
        self.args = EkRows(kv, self.rows.ctypes.data, self.back.ctypes.data, self.table.ctypes.data, len(rows))

    def run(self, entry: str, seed: int) -> None:
        kernel = fiber_kernel(kv_case(entry, self.format.kv, self.format.head_dim, self.format.block_size))
        kernel(self.args, (len(self.rows), KV_HEADS), seed=seed)

    def stored(self, side: int) -> tuple[Bytes, NDArray[np.float16]]:
        """Rows [tokens, kv_heads, row] and scales [tokens, kv_heads, 0, 1 or 2] as they lie in the cache."""
        format = self.format
        rows, scales = [], []
        for number in TABLE:
            start = (number & 1) * format.block + 128
            block = self.segments[number >> SHIFT][start:]
            plane = block[side * format.plane :][: KV_HEADS * format.block_size * format.row]
            rows.append(plane.reshape(KV_HEADS, format.block_size, format.row).swapaxes(0, 1))
            offset = 2 * format.plane + side * format.scale_plane
            halves = block[offset:][: KV_HEADS * format.block_size * SCALE_BYTES[format.kv]].view(np.float16)
            count = SCALE_BYTES[format.kv] // 2
            scales.append(halves.reshape(KV_HEADS, format.block_size, count).swapaxes(0, 1))
        return np.concatenate(rows), np.concatenate(scales)


def write_and_read(format: Format, rows: Floats, seed: int) -> Cache:
    cache = Cache(format, rows)
    cache.run("ek_write_rows", seed)
    cache.run("ek_read_rows", seed)
    return cache


def reference(format: Format, x: Floats) -> Floats:
    """What is left of rows [..., head_dim]; the formulas of kv.h in numpy and torch."""
    wide = torch.from_numpy(x)
    if format.kv == F32:
        return x
    if format.kv == BF16:
        return wide.bfloat16().float().numpy()
    if format.kv == F16:
        return x.astype(np.float16).astype(np.float32)
    if format.kv == E4M3:
        return wide.clamp(-448, 448).to(torch.float8_e4m3fn).float().numpy()
    if format.kv == INT8:
        scale = (np.abs(x).max(-1, keepdims=True) / np.float32(127)).astype(np.float16).astype(np.float32)
        codes = np.clip(np.rint(x / np.where(scale > 0, scale, np.float32(1))), -127, 127)
        return (codes * scale).astype(np.float32)
    zero = x.min(-1, keepdims=True).astype(np.float16).astype(np.float32)
    scale = (np.maximum(x.max(-1, keepdims=True) - zero, 0) / np.float32(15)).astype(np.float16).astype(np.float32)
    codes = np.clip(np.rint((x - zero) / np.where(scale > 0, scale, np.float32(1))), 0, 15)
    return (codes.astype(np.float64) * scale + zero).astype(np.float32)


def name(format: Format) -> str:
    return f"{('bf16', 'f16', 'e4m3', 'int8', 'int4', 'f32')[format.kv]}-{format.head_dim}-{format.block_size}"


@pytest.mark.parametrize("format", FORMATS, ids=name)
def test_rows_come_back_as_the_format_leaves_them(format: Format) -> None:
    rows = rows_of(format)
    back = in_all_orders(lambda seed: write_and_read(format, rows, seed).back, SEEDS[:2])
    np.testing.assert_array_equal(back[0], reference(format, rows))
    np.testing.assert_array_equal(back[1], reference(format, -rows))


@pytest.mark.parametrize("format", FORMATS, ids=name)
def test_nothing_else_is_written(format: Format) -> None:
    cache = Cache(format, rows_of(format))
    cache.run("ek_write_rows", 1)
    for number in range(len(SEGMENTS) << SHIFT):
        block = cache.segments[number >> SHIFT][(number & 1) * format.block :][: format.block]
        may_change = np.zeros(format.block, bool)
        if number in TABLE:
            for side in (0, 1):
                start = 128 + side * format.plane
                may_change[start : start + KV_HEADS * format.block_size * format.row] = True
                start = 128 + 2 * format.plane + side * format.scale_plane
                may_change[start : start + KV_HEADS * format.block_size * SCALE_BYTES[format.kv]] = True
        assert (block[~may_change] == POISON).all()


@pytest.mark.parametrize("head_dim", [96, 128])
def test_int8_is_the_processors_bit_for_bit(head_dim: int) -> None:
    format = next(each for each in FORMATS if (each.kv, each.head_dim) == (INT8, head_dim))
    rows = rows_of(format)
    cache = Cache(format, rows)
    cache.run("ek_write_rows", 2)
    layout = KvLayout(KvFormat.INT8, 1, KV_HEADS, head_dim, 16)
    codes, scales = cache.stored(0)
    wanted, wanted_scales = layout.encode(rows.reshape(-1, 16, KV_HEADS, head_dim).swapaxes(1, 2), KEYS)
    np.testing.assert_array_equal(scales[..., 0].reshape(-1, 16, KV_HEADS).swapaxes(1, 2), wanted_scales)
    # The processor's codes lie in another order.
    decoded = layout.decode(wanted, wanted_scales, KEYS).swapaxes(1, 2).reshape(rows.shape)
    np.testing.assert_array_equal(codes.view(np.int8) * scales.astype(np.float32), decoded)


@pytest.mark.parametrize("format", [format for format in FORMATS if format.kv in (INT8, INT4)], ids=name)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_with_no_number_in_it_is_none_and_its_neighbours_are(format: Format, bad: float) -> None:
    rows = rows_of(format)
    rows[4, 1, -1] = bad
    back = write_and_read(format, rows, 3).back
    assert np.isnan(back[:, 4, 1]).all()
    others = np.isfinite(back)
    others[:, 4, 1] = True
    assert others.all()


def test_a_block_in_a_segment_that_is_gone_is_a_fault() -> None:
    cache = Cache(FORMATS[0], rows_of(FORMATS[0]))
    cache.table[1] = 2
    with pytest.raises(FiberFault, match="where there is no memory"):
        cache.run("ek_write_rows", 0)
