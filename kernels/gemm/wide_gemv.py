"""wide_gemv.h: y = W x for one to eight tokens, of a matrix of plain numbers.

Runs in: engine thread; owns: nothing. For more tokens torch multiplies.
"""

from collections.abc import Iterator
from ctypes import Structure, c_int32, c_int64, c_uint64

import torch
from torch import Tensor

from edgekv.kernels.common.prepared import Prepared, kind
from edgekv.kernels.gemm.epilogue import EkFinish, Epilogue, columns, finish, finish_args, is_gated
from edgekv.kernels.gemm.numbers import are_rows, described
from edgekv.kernels.gemm.shape import MOST_TOKENS, THREADS, WARPS_WANTED, GemvShape, choose_shape
from edgekv.kernels.rt.registry import KernelSpec

_VECTOR_BYTES = 16  # of a row, that a lane takes in one go
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class EkWideGemv(Structure):
    """What the kernel is told."""

    _fields_ = (
        ("w", c_uint64),
        ("x", c_uint64),
        ("w_stride", c_int64),
        ("x_stride", c_int64),
        ("out", EkFinish),
        ("rows", c_int32),
        ("vectors", c_int32),
    )


def spec(weights_dtype: torch.dtype, x_dtype: torch.dtype, shape: GemvShape, out_dtype: torch.dtype) -> KernelSpec:
    """The kernel for such numbers, each bfloat16, float16 or float32."""
    kinds = {"EK_W": kind(weights_dtype), "EK_ACT": kind(x_dtype), "EK_OUT": kind(out_dtype)}
    return KernelSpec("gemm/wide_gemv.h", "ek_wide_gemv", THREADS, EkWideGemv, {**kinds, **shape.defines})


def variants() -> Iterator[KernelSpec]:
    """What stands for all kernels where they are compiled for every card: least and most work of a thread."""
    for dtype in _DTYPES:
        yield spec(dtype, dtype, GemvShape(1, 2, 1), dtype)
        yield spec(dtype, dtype, GemvShape(8, 4, 4), torch.float32)
    yield spec(torch.bfloat16, torch.float32, GemvShape(8, 4, 1), torch.float32)
    yield spec(torch.float32, torch.bfloat16, GemvShape(1, 1, 4), torch.bfloat16)


def prepare(
    weights: Tensor,
    x: Tensor,
    out: Tensor,
    *,
    multiprocessors: int,
    warps_wanted: int = WARPS_WANTED,
    epilogue: Epilogue = Epilogue.STORE,
    bias: Tensor | None = None,
    shape: GemvShape | None = None,
) -> Prepared:
    """`weights` [rows, cols] and `x` [tokens, cols], whose rows are whole vectors of 16 bytes and begin at multiples.

    Of a gated matrix the first half of the rows is the gate. `out` [tokens, columns]; `bias` float32 [rows];
    `warps_wanted` as choose_shape's. For the
    same matrix and card a token comes out the same to the bit, however many others there are. Raises ValueError for
    what does not fit together.
    """
    (rows, cols), tokens, gated = weights.shape, out.shape[0], is_gated(epilogue)
    if not is_supported(weights):
        raise ValueError(f"weights are whole vectors of {_VECTOR_BYTES} bytes, not {described(weights)}")
    if not 1 <= tokens <= MOST_TOKENS or not are_rows(x, tokens, cols):
        raise ValueError(f"{tokens} tokens of {cols} columns are not {described(x)}")
    finishing = finish_args(rows, out, epilogue, bias)
    width, vectors = columns(rows, epilogue), cols * weights.itemsize // _VECTOR_BYTES
    if shape is None:
        shape = choose_shape(
            width, vectors, tokens, gated=gated, multiprocessors=multiprocessors, warps_wanted=warps_wanted
        )
    if not shape.has_room_for(tokens, gated=gated):
        raise ValueError(f"{shape} is not for {tokens} tokens and {epilogue.name}")
    args = EkWideGemv(
        weights.data_ptr(), x.data_ptr(), weights.stride(0) * weights.itemsize, x.stride(0) * x.itemsize,
        finishing, rows, vectors,
    )  # fmt: skip
    grid = (shape.blocks(width, gated=gated), 1, 1)
    return Prepared(spec(weights.dtype, x.dtype, shape, out.dtype), grid, args)


def is_supported(weights: Tensor) -> bool:
    """Whether there are kernels for such weights: rows are whole vectors, from a multiple of 16 bytes on."""
    if weights.dtype not in _DTYPES or weights.ndim != 2 or 0 in weights.shape:
        return False
    return are_rows(weights, *weights.shape) and weights.shape[1] * weights.itemsize % _VECTOR_BYTES == 0


def reference(
    weights: Tensor, x: Tensor, before: Tensor | None, epilogue: Epilogue = Epilogue.STORE, bias: Tensor | None = None
) -> Tensor:
    """Plain torch in float64. `before` is what lies in the output."""
    return finish(x.double() @ weights.double().T, before, epilogue, bias)
