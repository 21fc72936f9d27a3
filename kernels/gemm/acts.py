"""acts.h, int8_rows.h: activations in int8, once for all matrices that they are multiplied with.

Runs in: engine thread; owns: nothing.
"""

from collections.abc import Iterator
from ctypes import Structure, c_int32, c_int64, c_uint64
from dataclasses import dataclass

import torch
from torch import Tensor

from edgekv.kernels.common.prepared import Prepared, blocks_of, kind
from edgekv.kernels.gemm.numbers import are_rows, described
from edgekv.kernels.gemm.planes import GROUP
from edgekv.kernels.rt.registry import KernelSpec

THREADS = 128
_LANES_PER_GROUP = 4


class EkInt8(Structure):
    """What the kernel is told."""

    _fields_ = (("codes", c_uint64), ("sums", c_uint64))


class EkQuantise(Structure):
    """What the kernel is told."""

    _fields_ = (
        ("x", c_uint64),
        ("codes", c_uint64),
        ("sums", c_uint64),
        ("x_stride", c_int64),
        ("groups", c_int32),
        ("tokens", c_int32),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Int8Rows:
    """Rows of tokens, as int8_rows.h draws them. `sums` is raw: a float32 scale and two int16."""

    codes: Tensor  # int8 [tokens, 2, groups, 16]
    sums: Tensor  # int32 [tokens, groups, 2]

    @staticmethod
    def empty(tokens: int, cols: int, device: torch.device) -> "Int8Rows":
        """Memory that `prepare` fills."""
        groups = cols // GROUP
        return Int8Rows(
            torch.empty((tokens, 2, groups, GROUP // 2), dtype=torch.int8, device=device),
            torch.empty((tokens, groups, 2), dtype=torch.int32, device=device),
        )

    def args(self) -> EkInt8:
        """What kernels are told of them."""
        return EkInt8(self.codes.data_ptr(), self.sums.data_ptr())

    @property
    def scales(self) -> Tensor:
        """[tokens, groups]."""
        return self.sums.view(torch.float32)[..., 0]

    def values(self) -> Tensor:
        """The numbers that matrices are multiplied with, float64 [tokens, cols]."""
        groups = self.codes.transpose(1, 2).flatten(2).double()  # [tokens, groups, 32]
        return (groups * self.scales.double().unsqueeze(-1)).flatten(1)


def spec(dtype: torch.dtype) -> KernelSpec:
    """The kernel for activations of a dtype."""
    return KernelSpec("gemm/acts.h", "ek_quantise", THREADS, EkQuantise, {"EK_ACT": kind(dtype)})


def variants() -> Iterator[KernelSpec]:
    """All of them."""
    return map(spec, (torch.bfloat16, torch.float16, torch.float32))


def prepare(x: Tensor, into: Int8Rows) -> Prepared:
    """`x` [tokens, cols] with rows that begin at multiples of 16 bytes; raises ValueError for anything else."""
    tokens, _, groups, _ = into.codes.shape
    if not are_rows(x, tokens, groups * GROUP):
        raise ValueError(f"{tokens} tokens of {groups * GROUP} columns are not {described(x)}")
    stride = x.stride(0) * x.itemsize
    args = EkQuantise(x.data_ptr(), into.codes.data_ptr(), into.sums.data_ptr(), stride, groups, tokens)
    return Prepared(spec(x.dtype), (tokens, blocks_of(groups * _LANES_PER_GROUP, THREADS), 1), args)


def reference(x: Tensor) -> Int8Rows:
    """The same in plain torch, to the bit where x is finite."""
    groups = x.float().reshape(len(x), -1, GROUP)  # [tokens, groups, 32]
    top = groups.abs().amax(2, keepdim=True)
    finite = groups.isfinite().all(2, keepdim=True)
    usable = finite & (top > 1e-30)
    most = torch.full_like(top, 127)  # `127 / top` would be 127 times the reciprocal, which is another number
    inverse = torch.where(usable, most / torch.where(usable, top, 1), 0)
    codes = torch.where(usable, groups * inverse, 0).round().to(torch.int8)
    halves = codes.view(*codes.shape[:2], 2, GROUP // 2)
    sums = torch.empty((*codes.shape[:2], 2), dtype=torch.int32, device=x.device)
    sums.view(torch.float32)[..., 0] = torch.where(finite, top / 127, torch.nan).squeeze(2)
    sums.view(torch.int16)[..., 2:] = halves.sum(3, dtype=torch.int16)
    return Int8Rows(halves.transpose(1, 2).contiguous(), sums)
