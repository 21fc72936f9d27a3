"""Main memory taken from the system for one thing alone, and returned to it with that thing.

Runs in: anywhere; owns: nothing (whoever asks holds the mapping; it is unmapped with the last view of it).
"""

import errno
import mmap
import sys
from contextlib import suppress

import numpy as np

_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE of Linux 5.14 and later; Python's mmap has no name for it


def map_pages(num_bytes: int, *, commit: bool) -> mmap.mmap:
    """A private anonymous mapping: zeros, with huge pages where the system has them. Raises MemoryError.

    `commit`: take the pages now, so that running out is seen here and not where they are written to.
    """
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
    np.frombuffer(pages, np.uint8)[:] = 0
