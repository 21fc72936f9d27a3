"""rope.h: queries and keys turned to their positions, in place, where kv_append does not do it.

Runs in: engine thread; owns: nothing.
"""

from collections.abc import Iterator
from ctypes import Structure, c_int32, c_int64, c_uint64

import torch
from torch import Tensor

from edgekv.kernels.common.prepared import Prepared, address_of, kind, row_stride
from edgekv.kernels.rt.registry import KernelSpec

THREADS = 128


class EkRope(Structure):
    """The kernel's arguments."""

    _fields_ = (
        ("q", c_uint64),
        ("k", c_uint64),
        ("table", c_uint64),
        ("rows", c_uint64),
        ("q_stride", c_int64),
        ("k_stride", c_int64),
        ("table_stride", c_int64),
        ("q_heads", c_int32),
        ("k_heads", c_int32),
        ("head_dim", c_int32),
        ("rope_dim", c_int32),
    )


def spec(act: torch.dtype) -> KernelSpec:
    """For numbers of type `act`."""
    return KernelSpec("fused/rope.h", "ek_rope", THREADS, EkRope, {"EK_ACT": kind(act)})


def variants() -> Iterator[KernelSpec]:
    """Those that stand for all in the compile matrix: each width of numbers."""
    for act in (torch.bfloat16, torch.float32):
        yield spec(act)


def prepare(q: Tensor, k: Tensor, angles: Tensor, rows: Tensor | None = None) -> Prepared:
    """Turn every head of `q` and `k`. Raises ValueError for what does not fit together.

    Args:
        q: [tokens, heads, head_dim], rows as `row_stride` takes them.
        k: [tokens, kv_heads, head_dim], likewise.
        angles: [rows, 2, rope_dim / 2] float32, contiguous: cosines and sines. Numbers from rope_dim on stay.
        rows: [tokens] int32, each token's row of the angles; None: token t has row t.
    """
    tokens, _, head_dim = q.shape
    rope_dim = 2 * angles.shape[2]
    if head_dim % 16 or rope_dim % 16 or rope_dim > head_dim:
        raise ValueError(f"{rope_dim} of {head_dim} numbers cannot be turned: both are multiples of 16")
    if angles.dtype != torch.float32 or not angles.is_contiguous():
        raise ValueError("angles are contiguous float32")
    if (k.shape[0], k.shape[2], k.dtype) != (tokens, head_dim, q.dtype):
        raise ValueError(f"keys {k.dtype} {list(k.shape)} are not those of queries {q.dtype} {list(q.shape)}")
    if rows is None:
        if angles.shape[0] < tokens:
            raise ValueError(f"{angles.shape[0]} rows of angles are too few for {tokens} tokens")
    elif rows.dtype != torch.int32 or rows.shape != (tokens,) or not rows.is_contiguous():
        raise ValueError(f"the tokens' rows are int32 [{tokens}], not {rows.dtype} {list(rows.shape)}")
    args = EkRope(
        q.data_ptr(),
        k.data_ptr(),
        angles.data_ptr(),
        address_of(rows),
        row_stride(q),
        row_stride(k),
        rope_dim,
        q.shape[1],
        k.shape[1],
        head_dim,
        rope_dim,
    )
    return Prepared(spec(q.dtype), (tokens, 1, 1), args)


def reference(x: Tensor, angles: Tensor, rows: Tensor | None = None) -> Tensor:
    """`x` [tokens, heads, head_dim] turned, of its type."""
    own = angles if rows is None else angles[rows.long()]  # [tokens, 2, rope_dim / 2]
    cosines, sines = own[:, :1], own[:, 1:]
    half = angles.shape[2]
    a, b, rest = x.float().tensor_split((half, 2 * half), -1)
    return torch.cat((a * cosines - b * sines, b * cosines + a * sines, rest), -1).to(x.dtype)
