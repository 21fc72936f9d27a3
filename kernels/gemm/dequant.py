"""dequant.h: weights as plain numbers, for torch's matrix products and for embeddings.

Runs in: engine thread; owns: nothing.
"""

from collections.abc import Iterator
from ctypes import Structure, c_float, c_int32, c_int64, c_uint64

import torch
from torch import Tensor

from edgekv.kernels.common.prepared import Prepared, address_of, blocks_of, kind
from edgekv.kernels.gemm.matrix import EkPlanes, PlaneMatrix
from edgekv.kernels.gemm.numbers import are_rows, described
from edgekv.kernels.gemm.planes import ONE_OF_EACH_FORMAT, format_defines
from edgekv.kernels.quant.encodings import Q4_K, Q6_K, Encoding
from edgekv.kernels.rt.registry import KernelSpec

THREADS = 128


class EkDequant(Structure):
    """What the kernel is told."""

    _fields_ = (
        ("w", EkPlanes),
        ("out", c_uint64),
        ("ids", c_uint64),
        ("stride", c_int64),
        ("count", c_int32),
        ("scale", c_float),
    )


def spec(encoding: Encoding, dtype: torch.dtype) -> KernelSpec:
    """The kernel for matrices of an encoding."""
    defines = {**format_defines(encoding), "EK_OUT": kind(dtype)}
    return KernelSpec("gemm/dequant.h", "ek_dequant", THREADS, EkDequant, defines)


def variants() -> Iterator[KernelSpec]:
    """What stands for all kernels where they are compiled for every card."""
    for encoding in ONE_OF_EACH_FORMAT:
        yield spec(encoding, torch.bfloat16)
    yield spec(Q6_K, torch.float16)
    yield spec(Q4_K, torch.float32)


def prepare(weights: PlaneMatrix, out: Tensor, *, ids: Tensor | None = None, scale: float = 1.0) -> Prepared:
    """`out` [count, cols]: the first `count` rows, or those of `ids` int32 [count].

    Rows of `out` begin at multiples of 16 bytes. An id that the matrix has no row for is taken for its first or last
    one. Raises ValueError for what does not fit together.
    """
    count = out.shape[0]
    if not are_rows(out, count, weights.cols):
        raise ValueError(f"rows of {weights.cols} columns do not go to {described(out)}")
    if ids is None and count > weights.rows:
        raise ValueError(f"there are no {count} rows, but {weights.rows}")
    if ids is not None and (ids.dtype != torch.int32 or ids.shape != (count,) or not ids.is_contiguous()):
        raise ValueError(f"{count} ids are int32 [{count}], not {ids.dtype} {list(ids.shape)}")
    args = EkDequant(weights.args(), out.data_ptr(), address_of(ids), out.stride(0), count, scale)
    return Prepared(spec(weights.encoding, out.dtype), (blocks_of(count * weights.groups, THREADS), 1, 1), args)


def reference(values: Tensor, dtype: torch.dtype, ids: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """Plain torch: exact weights [rows, cols] float32, to the bit."""
    chosen = values if ids is None else values[ids.long().clamp(0, len(values) - 1)]
    return (chosen * torch.tensor(scale, dtype=torch.float32)).to(dtype)
