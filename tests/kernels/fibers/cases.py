"""Mirrors of the kernels in csrc/, which are no part of the project but are compiled and run like those that are."""

from collections.abc import Mapping
from ctypes import Structure, c_int, c_int64, c_uint64
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgekv.kernels.rt.registry import KernelSpec

CSRC = Path(__file__).parent / "csrc"
THREADS = 128

Words = NDArray[np.uint32]


class EkCase(Structure):
    _fields_ = [("input", c_uint64), ("output", c_uint64), ("steps", c_int), ("blocks", c_int)]


class EkNumbers(Structure):
    _fields_ = [("input", c_uint64), ("output", c_uint64), ("count", c_int64)]


class EkWarps(Structure):
    _fields_ = [("input", c_uint64), ("lanes", c_uint64), ("output", c_uint64), ("count", c_int64)]


class EkKv(Structure):
    _fields_ = [
        ("seg", c_uint64),
        *((name, c_int64) for name in ("block_stride", "k_off", "v_off", "ks_off", "vs_off", "head_stride")),
        ("seg_shift", c_int),
        ("kv_heads", c_int),
    ]


class EkRows(Structure):
    _fields_ = [
        ("kv", EkKv),
        ("rows", c_uint64),
        ("back", c_uint64),
        ("block_table", c_uint64),
        ("tokens", c_int64),
    ]


class EkProduct(Structure):
    _fields_ = [("a", c_uint64), ("b", c_uint64), ("c", c_uint64)]


def order_case(entry: str, threads: int = THREADS) -> KernelSpec:
    return _spec("order_cases.h", entry, threads, EkCase)


def numbers_case() -> KernelSpec:
    return _spec("number_cases.h", "ek_numbers", THREADS, EkNumbers)


def warps_case() -> KernelSpec:
    return _spec("warp_cases.h", "ek_warps", THREADS, EkWarps)


def kv_case(entry: str, kv_format: int, head_dim: int, block_size: int) -> KernelSpec:
    return _spec("kv_cases.h", entry, 32, EkRows, {"EK_KV": kv_format, "EK_D": head_dim, "EK_BS": block_size})


def product_case(*, is_f16: bool, order: int | None = None) -> KernelSpec:
    """`order`: that of which card; on a card it has its own."""
    defines = {"EK_F16": int(is_f16)} | ({} if order is None else {"EK_ORDER": order})
    return _spec("mma_cases.h", "ek_product", 32, EkProduct, defines)


def _spec(
    name: str, entry: str, threads: int, args: type[Structure], defines: Mapping[str, int] | None = None
) -> KernelSpec:
    return KernelSpec(str(CSRC / name), entry, threads, args, defines or {})
