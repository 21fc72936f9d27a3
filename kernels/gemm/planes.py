"""Quantised rows as the card keeps them: codes, high bits and scales apart, each in a plane of its own. And back.

No value changes, and nothing is rounded: what a file's blocks interleave is only put where 32 lanes can load it side by
side. In all formats a lane takes a group of 32 columns, and a plane's row begins at a multiple of 16 bytes:

    q   4 bits: [groups][16], byte j has column j low and column j + 16 high (as in a q4_0 block);
        8 bits (q8_0): [2][groups][16], columns 0-15 of all groups, then columns 16-31
    h   what codes have above four bits: one bit [groups] u32, two (q6_K) [groups] u32[2]. Bytes 4i .. 4i + 3 of a
        group's 32 codes have theirs in the four bytes of one word, as bit i, or bits 2i and 2i + 1 of 8 (q6_K: i < 4
        in the first word, i - 4 in the second): a shift and a mask bring them to where they belong
    s   q8_0, q4_0, q5_0   [groups] f16 d
        q4_1, q5_1         [groups] { f16 d; f16 m }
        affine4            [cols / group] { f16 d; u8 z; u8 0 }
        q4_K, q5_K         [cols / 256] { f16 d; f16 dmin; [8] { u8 scale; u8 minimum } }
        q6_K               [cols / 256] { i8 scale[16]; f16 d; u16 0 }

iq4_nl becomes q8_0, as its values are whole numbers: twice its size, and half of bfloat16's. Two others have no planes,
since their scales are no float16: iq4_xs, whose step is one times a number of six bits, and mxfp4's powers of two.

Runs in: anywhere (numpy, no torch); owns: nothing. kernels/gemm/planes.h reads the same; what encodings mean is for
kernels/quant/dequantise.py to say, and how their blocks come apart, plane_bytes.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from edgekv.kernels.gemm.plane_bytes import GROUP, WAYS, Bytes
from edgekv.kernels.quant.encodings import ENCODINGS, Encoding

__all__ = [
    "ALIGNMENT", "ENCODINGS_IN_PLANES", "GROUP", "ONE_OF_EACH_FORMAT", "PlaneFormat", "PlaneRows", "Planes",
    "format_defines", "is_supported", "join", "plane_format", "plane_rows", "split",
]  # fmt: skip

ALIGNMENT = 16  # of a plane's rows


class PlaneFormat(IntEnum):
    """EK_FMT of planes.h."""

    Q8_0 = 0
    Q4_0 = 1
    AFFINE4 = 2
    Q4_K = 3
    Q5_K = 4
    Q6_K = 5
    Q4_1 = 6
    Q5_0 = 7
    Q5_1 = 8


_FORMATS: Mapping[str, PlaneFormat] = MappingProxyType(
    {
        "iq4_nl": PlaneFormat.Q8_0,
        "q8_0": PlaneFormat.Q8_0,
        "q4_0": PlaneFormat.Q4_0,
        "q4_1": PlaneFormat.Q4_1,
        "q5_0": PlaneFormat.Q5_0,
        "q5_1": PlaneFormat.Q5_1,
        "affine4_32": PlaneFormat.AFFINE4,
        "affine4_64": PlaneFormat.AFFINE4,
        "affine4_128": PlaneFormat.AFFINE4,
        "q4_K": PlaneFormat.Q4_K,
        "q5_K": PlaneFormat.Q5_K,
        "q6_K": PlaneFormat.Q6_K,
    }
)
ENCODINGS_IN_PLANES = tuple(map(ENCODINGS.__getitem__, _FORMATS))
"""All that there are kernels for."""
ONE_OF_EACH_FORMAT = tuple({_FORMATS[encoding.name]: encoding for encoding in ENCODINGS_IN_PLANES}.values())
"""The last one of each format: those of q8_0 are alike, and affine4's groups differ in a shift."""

# Bytes of q and of h for a group, columns that share an entry of s, and its bytes (affine4's columns are its group).
_SIZES: Mapping[PlaneFormat, tuple[int, int, int, int]] = MappingProxyType(
    {
        PlaneFormat.Q8_0: (32, 0, 32, 2),
        PlaneFormat.Q4_0: (16, 0, 32, 2),
        PlaneFormat.AFFINE4: (16, 0, 0, 4),
        PlaneFormat.Q4_K: (16, 0, 256, 20),
        PlaneFormat.Q5_K: (16, 4, 256, 20),
        PlaneFormat.Q6_K: (16, 8, 256, 20),
        PlaneFormat.Q4_1: (16, 0, 32, 4),
        PlaneFormat.Q5_0: (16, 4, 32, 2),
        PlaneFormat.Q5_1: (16, 4, 32, 4),
    }
)


@dataclass(frozen=True, slots=True)
class PlaneRows:
    """Bytes from a row to the next in each plane; `h` is 0 where there is none."""

    q: int
    h: int
    s: int

    @property
    def num_bytes(self) -> int:
        """What a row takes on the card."""
        return self.q + self.h + self.s


class Planes(NamedTuple):
    """Some rows in planes, uint8 [rows, PlaneRows.q] and so on, C-contiguous."""

    q: Bytes
    h: Bytes
    s: Bytes


def is_supported(encoding: Encoding, cols: int) -> bool:
    """Whether there are kernels for rows of so many columns as they are; others are converted when they are loaded."""
    return encoding.name in _FORMATS and cols > 0 and cols % encoding.block_cols == 0


def plane_format(encoding: Encoding) -> PlaneFormat:
    """The format that kernels are compiled for; raises ValueError where there is none."""
    if encoding.name not in _FORMATS:
        raise ValueError(f"{encoding.name} is not kept in planes: {', '.join(_FORMATS)} are")
    return _FORMATS[encoding.name]


def format_defines(encoding: Encoding) -> dict[str, int]:
    """What kernels for an encoding are compiled with; raises ValueError where there are none."""
    form = plane_format(encoding)
    return {"EK_FMT": int(form)} | ({"EK_GROUP": encoding.group} if form is PlaneFormat.AFFINE4 else {})


def plane_rows(encoding: Encoding, cols: int) -> PlaneRows:
    """Sizes of a row; raises ValueError where `cols` are no whole number of blocks."""
    encoding.row_bytes(cols)
    q, h, per_entry, entry = _SIZES[plane_format(encoding)]
    groups, entries = cols // GROUP, cols // (per_entry or encoding.group)
    return PlaneRows(_padded(q * groups), _padded(h * groups), _padded(entry * entries))


def split(encoding: Encoding, raw: Bytes, cols: int) -> Planes:
    """Planes of rows as stored, uint8 [rows, encoding.row_bytes(cols)].

    Takes about three times the rows' memory while it works: hand over slices of large matrices, whose planes lie one
    under the other like their rows.
    """
    rows = len(raw)
    if raw.dtype != np.uint8 or raw.shape != (rows, encoding.row_bytes(cols)):
        wanted = f"{encoding.row_bytes(cols)} bytes each"
        raise ValueError(f"{encoding.name} rows of {cols} columns have {wanted}, not {raw.shape} {raw.dtype}")
    sizes = plane_rows(encoding, cols)
    blocks = raw.reshape(rows, -1, encoding.block_bytes)
    q, h, s = WAYS[encoding.name][0](blocks)
    return Planes(_row_plane(q, rows, sizes.q), _row_plane(h, rows, sizes.h), _row_plane(s, rows, sizes.s))


def join(encoding: Encoding, planes: Planes, cols: int) -> Bytes:
    """The rows that `split` was given."""
    sizes = plane_rows(encoding, cols)
    rows = len(planes.q)
    for plane, size in zip(planes, (sizes.q, sizes.h, sizes.s), strict=True):
        if plane.shape != (rows, size):
            raise ValueError(f"{encoding.name} planes of {rows} rows and {cols} columns have no {plane.shape}")
    q_bytes, h_bytes, per_entry, entry_bytes = _SIZES[plane_format(encoding)]
    groups, entries = cols // GROUP, cols // (per_entry or encoding.group)
    blocks = WAYS[encoding.name][1](
        planes.q[:, : q_bytes * groups].reshape(rows, groups, q_bytes),
        planes.h[:, : h_bytes * groups].reshape(rows, groups, h_bytes),
        planes.s[:, : entry_bytes * entries].reshape(rows, entries, entry_bytes),
    )
    return np.ascontiguousarray(blocks.reshape(rows, encoding.row_bytes(cols)))


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _row_plane(part: Bytes | None, rows: int, size: int) -> Bytes:
    """[rows, size], filled up with zeros."""
    plane = np.zeros((rows, size), np.uint8)
    if part is not None:
        flat = part.reshape(rows, -1)
        plane[:, : flat.shape[1]] = flat
    return plane
