"""What all launches have in common: which kernel, over how many thread blocks, with what arguments.

Runs in: engine thread; owns: nothing. A launch is prepared from tensors once, and can be made, and captured in graphs,
for as long as they stay where they are.
"""

from collections.abc import Callable, Iterable
from ctypes import Structure
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from edgekv.kernels.rt.registry import KernelSpec

Grid = tuple[int, int, int]

_KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


@dataclass(frozen=True, slots=True)
class Prepared:
    """One launch. `args` holds addresses: whoever prepared it keeps the tensors alive."""

    spec: KernelSpec
    grid: Grid
    args: Structure


class Launchers(Protocol):
    """Where kernels come from: `kernels.rt.registry.Loader`, or fibers on the host."""

    def launcher(self, spec: KernelSpec) -> Callable[[Grid, Structure, int], object]:
        """What launches it over a grid, with arguments, on a stream."""
        ...


def launch(prepared: Iterable[Prepared], launchers: Launchers, stream: int) -> None:
    """One after the other on a stream; does not wait for them."""
    for each in prepared:
        launchers.launcher(each.spec)(each.grid, each.args, stream)


def kind(dtype: torch.dtype) -> int:
    """EK_ACT and EK_OUT, as common/act.h numbers them; raises ValueError where there are no kernels for it."""
    if dtype not in _KINDS:
        raise ValueError(f"{dtype} is none of {', '.join(map(str, _KINDS))}")
    return _KINDS[dtype]


def address_of(tensor: Tensor | None) -> int:
    """What a kernel is told of a tensor; 0 of none."""
    return 0 if tensor is None else tensor.data_ptr()


def row_stride(rows: Tensor) -> int:
    """Bytes from row to row of [rows, ...], each dense, which may be part of a wider matrix.

    Raises ValueError where kernels could not read whole vectors of 16 bytes.
    """
    num_bytes = rows.stride(0) * rows.itemsize
    if not rows[:1].is_contiguous() or num_bytes % 16 or rows.data_ptr() % 16:
        raise ValueError(f"rows of {tuple(rows.shape)} with strides {rows.stride()} are not dense or not aligned to 16")
    return num_bytes


def blocks_of(number: int, each: int) -> int:
    """How many blocks it takes."""
    return -(-number // each)
