"""Arrays that the address sanitizer watches to the byte, and the library with its pools."""

import ctypes
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from edgekv.kernels.cpu.library import Library, load_library

_ALIGNMENT, _GUARD = 64, 256


@cache
def _poison() -> Any:
    function = ctypes.CDLL(None).__asan_poison_memory_region
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    return function


@cache
def _kept() -> list[NDArray[np.uint8]]:
    """All memory that was ever handed out: what is poisoned must not be handed to somebody else."""
    return []


def guarded(shape: int | tuple[int, ...], dtype: DTypeLike, *, last: int | None = None) -> NDArray[Any]:
    """Zeros at a multiple of 64 bytes, followed by memory that may not be touched; never freed.

    `last`: of the last row, only so many elements may be touched.
    """
    wanted = np.dtype(dtype)
    rows = (shape,) if isinstance(shape, int) else shape
    num_bytes = int(np.prod(rows)) * wanted.itemsize
    memory = np.zeros(num_bytes + _ALIGNMENT + _GUARD, np.uint8)
    _kept().append(memory)
    offset = -memory.ctypes.data % _ALIGNMENT
    usable = num_bytes if last is None else num_bytes - (rows[-1] - last) * wanted.itemsize
    array = memory[offset : offset + num_bytes].view(wanted).reshape(rows)
    start = memory.ctypes.data
    if offset:
        _poison()(start, offset)
    _poison()(start + offset + usable, len(memory) - offset - usable)
    return array


@cache
def library() -> Library:
    return load_library()


@cache
def pool(tier: str, threads: int) -> int:
    made: int | None = library().functions.ek_pool_new(tier.encode(), threads, None)
    assert made is not None
    return made


def any_pool(rng: np.random.Generator) -> int:
    """Of any tier, with one thread or two."""
    return pool(str(rng.choice(library().tiers)), int(rng.integers(1, 3)))
