"""Memory for one segment, taken from the system for it alone and returned to the system with it.

Runs in: engine thread; owns: nothing (whoever allocates holds the memory).

An allocator's cache would keep what a segment had: on a card each segment has a `MemPool` of its own, whose end returns
it to the driver; in main memory each is a mapping of its own, unmapped with the last tensor that uses it.
"""

import errno
import mmap
import sys
from contextlib import suppress
from math import prod

import torch
from torch import Tensor

_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE of Linux 5.14 and later; Python's mmap has no name for it


class SegmentMemory:
    """One allocation and its tensor, all zeros.

    `data` must not be used after `free`; memory goes back with the last tensor that views it.
    """

    __slots__ = ("_pool", "data")

    def __init__(self, shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device, commit: bool) -> None:
        """Raises MemoryError or torch.OutOfMemoryError, keeping nothing.

        `commit`: in main memory, take the pages now, so that running out is seen here and not inside a step. Without
        it, pages come as they are written to.
        """
        self._pool: torch.cuda.MemPool | None = None
        if device.type == "cuda":
            with torch.cuda.device(device):
                self._pool = torch.cuda.MemPool(no_split=True)
                with torch.cuda.use_mem_pool(self._pool):
                    self.data: Tensor | None = torch.zeros(shape, dtype=dtype, device=device)
        elif device.type == "cpu":
            pages = _map(prod(shape) * dtype.itemsize, commit=commit)
            self.data = torch.frombuffer(pages, dtype=torch.uint8).view(dtype).view(shape)
        else:
            self.data = torch.zeros(shape, dtype=dtype, device=device)

    def free(self) -> None:
        """Return the memory; on a card this waits for what still runs there."""
        self.data = None
        # The pool's end empties it (cudaFree): only after the tensor, or it would still be in use.
        self._pool = None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it is the host's or the device's allocator that failed (torch's CPU allocator raises RuntimeError)."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _map(num_bytes: int, *, commit: bool) -> mmap.mmap:
    """A private anonymous mapping: zeros, with huge pages where the system has them."""
    try:
        if sys.platform == "win32":
            pages = mmap.mmap(-1, num_bytes)
        else:
            # Shared, which is Python's default, would be a file in memory and have no huge pages.
            pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no {num_bytes:,} bytes of main memory: {error}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    if commit:
        _commit(pages, num_bytes)
    return pages


def _commit(pages: mmap.mmap, num_bytes: int) -> None:
    if sys.platform == "linux":
        try:
            pages.madvise(_POPULATE_WRITE)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS):  # an older kernel
                raise MemoryError(f"no {num_bytes:,} bytes of main memory: {error}") from error
        else:
            return
    torch.frombuffer(pages, dtype=torch.uint8).zero_()
