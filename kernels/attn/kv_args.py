"""What the attention kernels' arguments have in common: the mirror of EkKv, what is compiled in, and rows in memory.

Runs in: anywhere; owns: nothing.
"""

from collections.abc import Iterator
from ctypes import Structure, c_int32, c_int64, c_uint64

import torch
from torch import Tensor

from edgekv.kernels.attn.gpu_layout import BlockOrder, GpuCache, GpuKvFormat, GpuLayout
from edgekv.kernels.common.prepared import kind


class EkKv(Structure):
    """`EkKv` of common/kv.h."""

    _fields_ = (
        ("seg", c_uint64),
        ("slot_stride", c_int64),
        ("k_off", c_int64),
        ("v_off", c_int64),
        ("ks_off", c_int64),
        ("vs_off", c_int64),
        ("head_stride", c_int64),
        ("seg_shift", c_int32),
        ("kv_heads", c_int32),
    )


def kv_args(cache: GpuCache, layer: int) -> EkKv:
    """One layer of a cache."""
    strides, layout = cache.layout.strides(layer), cache.layout
    return EkKv(
        cache.table.data_ptr(),
        strides.slot_stride,
        strides.k_off,
        strides.v_off,
        strides.ks_off,
        strides.vs_off,
        strides.head_stride,
        layout.segment_shift,
        layout.num_kv_heads,
    )


def kv_defines(layout: GpuLayout, act: torch.dtype) -> dict[str, int]:
    """What every kernel that knows a cache of this kind is compiled with; `act` is the activations' type."""
    return {"EK_KV": layout.kv_format, "EK_D": layout.head_dim, "EK_BS": layout.block_size, "EK_ACT": kind(act)}


def cache_layouts(kv_format: GpuKvFormat | None = None) -> Iterator[GpuLayout]:
    """Those that stand for all in the compile matrix: every format, and every head in the widest and the narrowest.

    With `kv_format` those of it alone. The first of a format has heads of 128.
    """
    for each in GpuKvFormat if kv_format is None else (kv_format,):
        is_extreme = each in (GpuKvFormat.BF16, GpuKvFormat.INT4, GpuKvFormat.F32)
        for head_dim in (128, 64, 96, 256) if is_extreme else (128,):
            yield GpuLayout(each, BlockOrder.BLOCK_MAJOR, 1, 8, head_dim, 16, 32)
        if each is GpuKvFormat.BF16:
            yield GpuLayout(each, BlockOrder.BLOCK_MAJOR, 1, 8, 128, 32, 32)


def row_stride(rows: Tensor) -> int:
    """Bytes from row to row of [rows, heads, head_dim], which may be part of a wider matrix.

    Raises ValueError where the kernels could not read whole vectors.
    """
    _, heads, head_dim = rows.shape
    num_bytes = rows.stride(0) * rows.itemsize
    is_dense = rows.stride(2) == 1 and (heads == 1 or rows.stride(1) == head_dim)
    if not is_dense or num_bytes % 16 or rows.data_ptr() % 16:
        raise ValueError(f"rows of {tuple(rows.shape)} with strides {rows.stride()} are not dense or not aligned to 16")
    return num_bytes
