"""rmsnorm.h: x / rms(x) · weight, with the residual stream added before or after it.

Runs in: engine thread; owns: nothing.
"""

from collections.abc import Iterator
from ctypes import Structure, c_float, c_int32, c_int64, c_uint64
from enum import IntEnum

import torch
from torch import Tensor

from edgekv.kernels.common.prepared import Prepared, address_of, blocks_of, kind, row_stride
from edgekv.kernels.rt.registry import KernelSpec

THREADS = 256
MOST_VECTORS = 8


class Add(IntEnum):
    """What is added to the residual stream, if anything."""

    NOTHING = 0
    BEFORE = 1
    """sum = x + other, and the sum is normed."""
    AFTER = 2
    """The normed x is added to other."""


class EkRmsNorm(Structure):
    """The kernel's arguments."""

    _fields_ = (
        ("x", c_uint64),
        ("other", c_uint64),
        ("sum", c_uint64),
        ("out", c_uint64),
        ("weight", c_uint64),
        ("x_stride", c_int64),
        ("other_stride", c_int64),
        ("sum_stride", c_int64),
        ("out_stride", c_int64),
        ("width", c_int32),
        ("eps", c_float),
    )


def spec(width: int, act: torch.dtype, *, add: Add = Add.NOTHING, rounds_first: bool = True) -> KernelSpec:
    """For rows of so many numbers of type `act`.

    `rounds_first`: the normed row is rounded to `act` before it meets its weight, as in Llama; Gemma rounds once,
    behind it. Raises ValueError for a width that the kernel does not have.
    """
    vectors = blocks_of(width, THREADS * 8)
    if width < 8 or width % 8 or vectors > MOST_VECTORS:
        raise ValueError(f"rows of {width} numbers are no multiple of 8 up to {MOST_VECTORS * THREADS * 8}")
    defines = {
        "EK_ACT": kind(act),
        "EK_ADD": int(add),
        "EK_ROUND_FIRST": int(rounds_first),
        "EK_VECTORS": vectors,
    }
    return KernelSpec("fused/rmsnorm.h", "ek_rmsnorm", THREADS, EkRmsNorm, defines)


def variants() -> Iterator[KernelSpec]:
    """Those that stand for all in the compile matrix: each addition, and the widest rows."""
    for add in Add:
        yield spec(4096, torch.bfloat16, add=add)
    yield spec(THREADS * 8 * MOST_VECTORS, torch.float32, add=Add.BEFORE, rounds_first=False)


def prepare(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    eps: float,
    add: Add = Add.NOTHING,
    rounds_first: bool = True,
    other: Tensor | None = None,
    total: Tensor | None = None,
) -> Prepared:
    """Norm each row. Raises ValueError for what does not fit together.

    Args:
        x: [rows, width], dense in the last dimension, as all of these.
        weight: [width] float32, from a multiple of 16 bytes on; Gemma's with the 1 added that it is stored less.
        out: [rows, width]; may be x.
        eps: of the root mean square.
        add: what is added, and when.
        rounds_first: as of `spec`.
        other: [rows, width], what is added; none for `Add.NOTHING`.
        total: [rows, width], where x + other goes, for `Add.BEFORE` alone; may be x or other.
    """
    width = x.shape[1]
    if weight.dtype != torch.float32 or weight.shape != (width,) or not weight.is_contiguous():
        raise ValueError(f"a weight of {weight.dtype} {list(weight.shape)} does not fit rows of {width}")
    if weight.data_ptr() % 16:
        raise ValueError("a weight begins at a multiple of 16 bytes")
    if (other is None) != (add is Add.NOTHING) or (total is None) != (add is not Add.BEFORE):
        raise ValueError(f"{add.name} goes with other rows to add or a total to write, and these do not fit it")
    rows = [each for each in (x, out, other, total) if each is not None]
    if any(each.shape != x.shape or each.dtype != x.dtype for each in rows):
        raise ValueError(f"rows of {[(each.dtype, list(each.shape)) for each in rows]} are not all alike")
    args = EkRmsNorm(
        x.data_ptr(),
        address_of(other),
        address_of(total),
        out.data_ptr(),
        weight.data_ptr(),
        row_stride(x),
        0 if other is None else row_stride(other),
        0 if total is None else row_stride(total),
        row_stride(out),
        width,
        eps,
    )
    return Prepared(spec(width, x.dtype, add=add, rounds_first=rounds_first), (x.shape[0], 1, 1), args)


def reference(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    add: Add = Add.NOTHING,
    rounds_first: bool = True,
    other: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`out`, and `total` where there is one, of x's type."""
    if add is not Add.NOTHING and other is None:
        raise ValueError("there is nothing to add")
    total = x + other if add is Add.BEFORE and other is not None else None
    wide = (x if total is None else total).float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if rounds_first:
        normed = normed.to(x.dtype).float()
    out = (normed * weight).to(x.dtype)
    if add is Add.AFTER and other is not None:
        out = other + out
    return out, total
