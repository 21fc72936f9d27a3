"""Memory for one segment, taken from the system for it alone and returned to the system with it.

Runs in: engine thread; owns: nothing (whoever allocates holds the memory).

An allocator's cache would keep what a segment had: on a card each segment has a `MemPool` of its own, whose end returns
it to the driver; in main memory each is a mapping of its own, unmapped with the last tensor that uses it.
"""

from math import prod

import torch
from torch import Tensor

from edgekv.kernels.pages import map_pages


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
            pages = map_pages(prod(shape) * dtype.itemsize, commit=commit)
            self.data = torch.frombuffer(pages, dtype=torch.uint8).view(dtype).view(shape)
        else:
            self.data = torch.zeros(shape, dtype=dtype, device=device)

    def free(self) -> None:
        """Return the memory; on a card this waits for what still runs there."""
        self.data = None
        # The pool's end empties it (cudaFree): only after the tensor, or it would still be in use.
        self._pool = None
