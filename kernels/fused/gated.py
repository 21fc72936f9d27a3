"""gated.h: act(gate) · up of a gated MLP.

Runs in: engine thread; owns: nothing.
"""

from collections.abc import Iterator
from ctypes import Structure, c_int32, c_int64, c_uint64
from enum import IntEnum

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekv.kernels.common.prepared import Prepared, blocks_of, kind, row_stride
from edgekv.kernels.rt.registry import KernelSpec

THREADS = 256


class Gate(IntEnum):
    """What the gate goes through."""

    SILU = 0
    GELU_TANH = 1


class EkGated(Structure):
    """The kernel's arguments."""

    _fields_ = (
        ("gate", c_uint64),
        ("up", c_uint64),
        ("out", c_uint64),
        ("gate_stride", c_int64),
        ("up_stride", c_int64),
        ("out_stride", c_int64),
        ("width", c_int32),
        ("unused", c_int32),
    )


def spec(activation: Gate, act: torch.dtype) -> KernelSpec:
    """For numbers of type `act`."""
    defines = {"EK_ACT": kind(act), "EK_GATE": int(activation)}
    return KernelSpec("fused/gated.h", "ek_gated", THREADS, EkGated, defines)


def variants() -> Iterator[KernelSpec]:
    """Those that stand for all in the compile matrix: each gate."""
    for activation in Gate:
        yield spec(activation, torch.bfloat16)


def prepare(gate: Tensor, up: Tensor, out: Tensor, activation: Gate) -> Prepared:
    """Write act(gate) · up to `out`, which may be one of them. Raises ValueError for what does not fit together.

    All are [rows, width] of one type, dense in the last dimension, the width a multiple of 8; `gate` and `up` may be
    halves of one matrix.
    """
    rows, width = gate.shape
    if width % 8:
        raise ValueError(f"rows of {width} numbers are no multiple of 8")
    if any(each.shape != gate.shape or each.dtype != gate.dtype for each in (up, out)):
        raise ValueError(f"{[(each.dtype, list(each.shape)) for each in (gate, up, out)]} are not all alike")
    strides = (row_stride(each) for each in (gate, up, out))
    args = EkGated(gate.data_ptr(), up.data_ptr(), out.data_ptr(), *strides, width, 0)
    return Prepared(spec(activation, gate.dtype), (rows, blocks_of(width, THREADS * 8), 1), args)


def reference(gate: Tensor, up: Tensor, activation: Gate) -> Tensor:
    """The activated gate is rounded to its type before the product.

    In float64: 1 + tanh of far below 0 has no digits left in float32.
    """
    activated = F.silu(gate.double()) if activation is Gate.SILU else F.gelu(gate.double(), approximate="tanh")
    return activated.to(gate.dtype) * up
