"""A quantised matrix on the card: its planes as tensors, and what kernels are told of it.

Runs in: engine thread; owns: the planes' memory.
"""

from collections.abc import Sequence
from ctypes import Structure, c_int32, c_int64, c_uint64
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgekv.kernels.gemm.planes import GROUP, Planes, join, plane_rows, split
from edgekv.kernels.quant.dequantise import dequantise
from edgekv.kernels.quant.encodings import Encoding


class EkPlanes(Structure):
    """What the kernel is told."""

    _fields_ = (
        ("q", c_uint64),
        ("h", c_uint64),
        ("s", c_uint64),
        ("q_stride", c_int64),
        ("h_stride", c_int64),
        ("s_stride", c_int64),
        ("rows", c_int32),
        ("groups", c_int32),
    )


@dataclass(frozen=True, slots=True, eq=False)
class PlaneMatrix:
    """Rows of one encoding; each plane is uint8 [rows, bytes] of contiguous memory, on any device.

    Of a matrix that is gated, the first half of the rows is the gate and the second what it gates.
    """

    encoding: Encoding
    cols: int
    q: Tensor
    h: Tensor
    s: Tensor

    @staticmethod
    def empty(encoding: Encoding, rows: int, cols: int, device: torch.device) -> "PlaneMatrix":
        """Memory for rows that `put` fills in; raises ValueError where there are no kernels for the encoding."""
        sizes = plane_rows(encoding, cols)
        planes = (torch.empty((rows, size), dtype=torch.uint8, device=device) for size in (sizes.q, sizes.h, sizes.s))
        return PlaneMatrix(encoding, cols, *planes)

    @staticmethod
    def of(encoding: Encoding, raw: NDArray[np.uint8], cols: int, device: torch.device) -> "PlaneMatrix":
        """Rows as stored, uint8 [rows, encoding.row_bytes(cols)]."""
        matrix = PlaneMatrix.empty(encoding, len(raw), cols, device)
        matrix.put(0, raw)
        return matrix

    @property
    def rows(self) -> int:
        """Of all that lie one under the other."""
        return self.q.shape[0]

    @property
    def groups(self) -> int:
        """Of 32 columns, in a row."""
        return self.cols // GROUP

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return self.q.numel() + self.h.numel() + self.s.numel()

    def put(self, first_row: int, raw: NDArray[np.uint8]) -> None:
        """Fill in rows from `first_row` on, as stored."""
        for plane, part in zip((self.q, self.h, self.s), split(self.encoding, raw, self.cols), strict=True):
            plane[first_row : first_row + len(raw)].copy_(torch.from_numpy(part))

    def args(self) -> EkPlanes:
        """What kernels are told of it."""
        high = self.h.data_ptr() if self.h.shape[1] else 0
        strides = (plane.shape[1] for plane in (self.q, self.h, self.s))
        return EkPlanes(self.q.data_ptr(), high, self.s.data_ptr(), *strides, self.rows, self.groups)

    def values(self, rows: Sequence[int] | None = None) -> Tensor:
        """The exact weights of all rows, or of those named, float32 [rows, cols] on the host."""
        chosen = slice(None) if rows is None else list(rows)
        planes = Planes(*(plane.cpu().numpy()[chosen] for plane in (self.q, self.h, self.s)))
        return dequantise(self.encoding, torch.from_numpy(join(self.encoding, planes, self.cols)), self.cols)
