"""gemv.h: y = W x for one to eight tokens, of any format of planes.h.

Runs in: engine thread; owns: nothing.
"""

from collections.abc import Iterator
from ctypes import Structure

import torch
from torch import Tensor

from edgekv.kernels.common.prepared import Prepared, kind
from edgekv.kernels.gemm.acts import EkInt8, Int8Rows
from edgekv.kernels.gemm.epilogue import EkFinish, Epilogue, columns, finish, finish_args, is_gated
from edgekv.kernels.gemm.matrix import EkPlanes, PlaneMatrix
from edgekv.kernels.gemm.planes import ONE_OF_EACH_FORMAT, format_defines
from edgekv.kernels.gemm.shape import MOST_TOKENS, THREADS, WARPS_WANTED, GemvShape, choose_shape
from edgekv.kernels.quant.encodings import Q4_0, Encoding
from edgekv.kernels.rt.registry import KernelSpec

_MOST_SUMS = 16  # a warp keeps codes as well: of 32 there would be fewer warps, or registers would be spilled


class EkGemv(Structure):
    """What the kernel is told."""

    _fields_ = (("w", EkPlanes), ("x", EkInt8), ("out", EkFinish))


def spec(encoding: Encoding, shape: GemvShape, out_dtype: torch.dtype) -> KernelSpec:
    """The kernel for matrices of an encoding."""
    defines = {**format_defines(encoding), **shape.defines, "EK_OUT": kind(out_dtype)}
    return KernelSpec("gemm/gemv.h", "ek_gemv", THREADS, EkGemv, defines)


def variants() -> Iterator[KernelSpec]:
    """What stands for all kernels where they are compiled for every card: least and most work of a thread."""
    for encoding in ONE_OF_EACH_FORMAT:
        yield spec(encoding, GemvShape(1, 2, 1), torch.bfloat16)
        yield spec(encoding, GemvShape(4, 4, 4), torch.float32)
        yield spec(encoding, GemvShape(8, 2, 1), torch.float16)
    yield spec(Q4_0, GemvShape(1, 1, 4), torch.float16)


def prepare(
    weights: PlaneMatrix,
    x: Int8Rows,
    out: Tensor,
    *,
    multiprocessors: int,
    warps_wanted: int = WARPS_WANTED,
    epilogue: Epilogue = Epilogue.STORE,
    bias: Tensor | None = None,
    shape: GemvShape | None = None,
) -> Prepared:
    """`out` [tokens, columns], of bfloat16, float16 or float32; `bias` float32 [rows];
    `warps_wanted` as choose_shape's.

    For the same matrix and card a token comes out the same to the bit, however many others there are. Raises
    ValueError for what does not fit together.
    """
    tokens, gated = out.shape[0], is_gated(epilogue)
    if not 1 <= tokens <= MOST_TOKENS or x.codes.shape != (tokens, 2, weights.groups, 16):
        raise ValueError(f"{tokens} tokens of {weights.cols} columns have no codes {list(x.codes.shape)}")
    finishing = finish_args(weights.rows, out, epilogue, bias)
    width = columns(weights.rows, epilogue)
    if shape is None:
        shape = choose_shape(
            width, weights.groups, tokens, gated=gated, multiprocessors=multiprocessors, most_sums=_MOST_SUMS,
            warps_wanted=warps_wanted,
        )  # fmt: skip
    if not shape.has_room_for(tokens, gated=gated):
        raise ValueError(f"{shape} is not for {tokens} tokens and {epilogue.name}")
    grid = (shape.blocks(width, gated=gated), 1, 1)
    return Prepared(spec(weights.encoding, shape, out.dtype), grid, EkGemv(weights.args(), x.args(), finishing))


def reference(
    values: Tensor, x: Tensor, before: Tensor | None, epilogue: Epilogue = Epilogue.STORE, bias: Tensor | None = None
) -> Tensor:
    """Plain torch in float64, of exact weights [rows, cols] and numbers x [tokens, cols] (`Int8Rows.values`).

    `before` is what lies in the output.
    """
    return finish(x.double() @ values.double().T, before, epilogue, bias)
