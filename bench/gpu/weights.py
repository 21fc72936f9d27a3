"""Random weights on the card, quantised or plain. Runs in: the main thread; owns: what it hands out."""

from collections.abc import Callable

import torch
from torch import Tensor

from edgekv.kernels.gemm.matrix import PlaneMatrix
from edgekv.kernels.gemm.planes import plane_rows
from edgekv.kernels.quant.encodings import Encoding

# As a float16 0.00025, as a byte 12: scales of all formats, so that products are small whatever the codes are.
_SCALE_BYTE = 0x0C


def random_planes(encoding: Encoding, rows: int, cols: int, allocate: Callable[[int], Tensor]) -> PlaneMatrix:
    """Any codes, and scales that are numbers."""
    sizes = plane_rows(encoding, cols)
    q, h, s = (allocate(rows * size).view(rows, size) for size in (sizes.q, sizes.h, sizes.s))
    for codes in (q, h):
        codes.random_(0, 256)
    s.fill_(_SCALE_BYTE)
    return PlaneMatrix(encoding, cols, q, h, s)


def random_plain(dtype: torch.dtype, rows: int, cols: int, allocate: Callable[[int], Tensor]) -> Tensor:
    """As wide as those of a model."""
    return allocate(rows * cols * dtype.itemsize).view(dtype).view(rows, cols).normal_(0.0, 0.02)
