"""epilogue.h: what becomes of y = W x.

Runs in: engine thread; owns: nothing.
"""

from ctypes import Structure, c_int32, c_int64, c_uint64

import torch
from torch import Tensor

from edgekv.kernels.common.prepared import address_of
from edgekv.kernels.cpu.abi import Epilogue

__all__ = ["EkFinish", "Epilogue", "columns", "finish", "finish_args", "is_gated"]


class EkFinish(Structure):
    """What the kernel is told."""

    _fields_ = (
        ("out", c_uint64),
        ("bias", c_uint64),
        ("stride", c_int64),
        ("tokens", c_int32),
        ("epilogue", c_int32),
    )


def is_gated(epilogue: Epilogue) -> bool:
    """Whether half of the rows gate the others."""
    return epilogue in (Epilogue.SILU_MUL, Epilogue.GELU_MUL)


def columns(rows: int, epilogue: Epilogue) -> int:
    """Of the output, for a matrix of so many rows."""
    return rows // 2 if is_gated(epilogue) else rows


def finish_args(rows: int, out: Tensor, epilogue: Epilogue, bias: Tensor | None) -> EkFinish:
    """`out` [tokens, columns], neighbouring columns side by side; `bias` float32 [rows]. Raises ValueError."""
    width = columns(rows, epilogue)
    if is_gated(epilogue) and rows % 2:
        raise ValueError(f"{rows} rows are no gate and what it gates")
    if out.ndim != 2 or out.shape[1] != width or out.stride(1) != 1:
        raise ValueError(f"{rows} rows and {epilogue.name} make {width} columns, not {list(out.shape)}")
    if bias is not None and (bias.dtype != torch.float32 or bias.shape != (rows,) or not bias.is_contiguous()):
        raise ValueError(f"a bias of {rows} rows is float32 [{rows}], not {bias.dtype} {list(bias.shape)}")
    return EkFinish(out.data_ptr(), address_of(bias), out.stride(0), out.shape[0], int(epilogue))


def finish(y: Tensor, before: Tensor | None, epilogue: Epilogue, bias: Tensor | None) -> Tensor:
    """The same in plain torch, in y's dtype: y [tokens, rows], and what lies in the output before."""
    if bias is not None:
        y = y + bias.to(y.dtype)
    if epilogue is Epilogue.ADD:
        assert before is not None
        return y + before.to(y.dtype)
    if not is_gated(epilogue):
        return y
    gate, up = y.chunk(2, dim=1)
    if epilogue is Epilogue.SILU_MUL:
        return torch.nn.functional.silu(gate) * up
    return torch.nn.functional.gelu(gate, approximate="tanh") * up
