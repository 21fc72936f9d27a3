"""The KV cache as the CPU kernels lay it out (src/ek.h): its sizes, and blocks to and from plain float32 rows.

Runs in: anywhere; owns: nothing. The kernels themselves read and write the cache; `encode` and `decode` say in numpy
what they do, bit for bit, for tests and for tools that look into a cache.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekv.kernels.cpu.abi import KvFormat

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Halves = NDArray[np.float16]

KEYS, VALUES = 0, 1

_ELEMENT_BYTES = {KvFormat.F32: 4, KvFormat.F16: 2, KvFormat.BF16: 2, KvFormat.INT8: 1}
_SCALE_BYTES = 2


@dataclass(frozen=True, slots=True)
class KvLayout:
    """A segment is [layers][2][kv_heads][blocks][plane], a plane being one block of one head.

    Behind the planes of an INT8 segment come float16 scales, [layers][2][kv_heads][blocks][block_size].
    """

    kv_format: KvFormat
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int

    def __post_init__(self) -> None:
        """Raises ValueError for sizes that the kernels do not have."""
        if self.block_size < 16 or self.block_size % 16:
            raise ValueError(f"block size {self.block_size} is no multiple of 16")
        if not 16 <= self.head_dim <= 256 or self.head_dim % 16:
            raise ValueError(f"head dim {self.head_dim} is no multiple of 16 up to 256")

    @property
    def planes_per_block(self) -> int:
        """K and V of every head of every layer."""
        return self.num_layers * 2 * self.num_kv_heads

    @property
    def plane_bytes(self) -> int:
        """Bytes of one block of one head's keys or values, without scales."""
        return self.block_size * self.head_dim * _ELEMENT_BYTES[self.kv_format]

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales that go with a plane."""
        return self.block_size * _SCALE_BYTES if self.kv_format is KvFormat.INT8 else 0

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers, with its scales."""
        return self.planes_per_block * (self.plane_bytes + self.scale_bytes)

    def segment_bytes(self, num_blocks: int) -> int:
        """Bytes of a segment."""
        return num_blocks * self.block_bytes

    def planes(self, segment: Bytes) -> Bytes:
        """A segment's planes, [layers, 2, kv_heads, blocks, plane_bytes]; a view."""
        num_blocks = self._num_blocks(segment)
        end = num_blocks * self.planes_per_block * self.plane_bytes
        return segment[:end].reshape(self.num_layers, 2, self.num_kv_heads, num_blocks, self.plane_bytes)

    def scales(self, segment: Bytes) -> Halves:
        """An INT8 segment's scales, [layers, 2, kv_heads, blocks, block_size]; a view. None in the other formats."""
        num_blocks = self._num_blocks(segment)
        scales = segment[num_blocks * self.planes_per_block * self.plane_bytes :].view(np.float16)
        return scales.reshape(self.num_layers, 2, self.num_kv_heads, num_blocks, self.scale_bytes // _SCALE_BYTES)

    def encode(self, rows: Floats, side: int) -> tuple[Bytes, Halves]:
        """Planes and scales of [..., block_size, head_dim] keys (`side` KEYS) or values."""
        if self.kv_format is KvFormat.INT8:
            q, scales = _to_int8(rows)
            return self._plane(q, side), scales
        encoded: NDArray[Any] = rows
        if self.kv_format is KvFormat.BF16:
            encoded = _to_bf16(rows)
        elif self.kv_format is KvFormat.F16:
            with np.errstate(over="ignore"):
                encoded = rows.astype(np.float16)
        return self._plane(encoded, side), np.empty((*rows.shape[:-2], 0), np.float16)

    def decode(self, planes: Bytes, scales: Halves, side: int) -> Floats:
        """What the kernels take [..., plane_bytes] and [..., block_size] for: [..., block_size, head_dim]."""
        if self.kv_format is KvFormat.F32:
            return self._rows(planes.view(np.float32), side)
        if self.kv_format is KvFormat.F16:
            return self._rows(planes.view(np.float16), side).astype(np.float32)
        if self.kv_format is KvFormat.BF16:
            return (self._rows(planes.view(np.uint16), side).astype(np.uint32) << 16).view(np.float32)
        with np.errstate(invalid="ignore"):
            return self._rows(planes.view(np.int8), side) * scales.astype(np.float32)[..., None]

    @property
    def _is_paired(self) -> bool:
        """Whether pairs of dimensions (keys) or slots (values) lie side by side."""
        return self.kv_format in (KvFormat.BF16, KvFormat.INT8)

    def _num_blocks(self, segment: Bytes) -> int:
        return segment.size // self.block_bytes

    def _plane(self, rows: NDArray[Any], side: int) -> Bytes:
        """Rows [..., block_size, head_dim] as flat planes [..., plane_bytes]."""
        *outer, size, dim = rows.shape
        if self._is_paired and side == KEYS:
            rows = rows.reshape(*outer, size, dim // 2, 2).swapaxes(-3, -2)  # [head_dim / 2][block_size][2]
        elif self._is_paired:
            rows = rows.reshape(*outer, size // 2, 2, dim).swapaxes(-2, -1)  # [block_size / 2][head_dim][2]
        elif side == KEYS:
            rows = rows.swapaxes(-2, -1)
        return np.ascontiguousarray(rows).reshape(*outer, -1).view(np.uint8)

    def _rows(self, plane: NDArray[Any], side: int) -> NDArray[Any]:
        """The reverse of `_plane`."""
        outer, size, dim = plane.shape[:-1], self.block_size, self.head_dim
        if self._is_paired and side == KEYS:
            return plane.reshape(*outer, dim // 2, size, 2).swapaxes(-3, -2).reshape(*outer, size, dim)
        if self._is_paired:
            return plane.reshape(*outer, size // 2, dim, 2).swapaxes(-2, -1).reshape(*outer, size, dim)
        return plane.reshape(*outer, dim, size).swapaxes(-2, -1) if side == KEYS else plane.reshape(*outer, size, dim)


def _to_bf16(numbers: Floats) -> NDArray[np.uint16]:
    """To nearest, ties to even; a NaN stays one."""
    bits = np.ascontiguousarray(numbers).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(numbers), bits >> 16 | 0x40, rounded).astype(np.uint16)


def _to_int8(rows: Floats) -> tuple[NDArray[np.int8], Halves]:
    """Symmetric, with one scale max |x| / 127 for each row, itself rounded to float16 first.

    A row with a NaN or an infinity gets a scale that is none either, so none of its numbers reads as a number.
    """
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        scales = (np.abs(rows).max(-1) / np.float32(127)).astype(np.float16)
        finite = np.isfinite(rows).all(-1)
        scales = np.where(finite, scales, np.float16(np.nan)).astype(np.float16)
        wide = scales.astype(np.float32)[..., None]
        ratio = np.divide(rows, np.where(wide > 0, wide, 1))
        q = np.where(np.isfinite(ratio), np.clip(np.rint(ratio), -127, 127), 0)
    return q.astype(np.int8), scales
