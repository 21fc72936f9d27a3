"""How fast this machine reads its memory, measured as the kernels read it. Runs in: the main thread; owns: a buffer."""

import time

import torch

from edgekv.kernels.cpu.library import load_library
from edgekv.kernels.cpu.program import Pool
from edgekv.kernels.cpu.threads import default_threads
from edgekv.kernels.pages import map_pages

BUFFER_BYTES = 512 << 20  # far beyond any cache
ROUNDS = 5


class ReadMeter:
    """Reads a buffer on the threads of a pool of the compiled kernels; without one with torch, on a device.

    `title` says which.
    """

    def __init__(self, pool: Pool | None, device: str = "cpu") -> None:
        if device == "cpu":
            # On pages as weights and caches have them, or their kernels would seem better than they are.
            pages = map_pages(BUFFER_BYTES, commit=True)
            self._buffer = torch.frombuffer(pages, dtype=torch.float32)
        else:
            self._buffer = torch.ones(BUFFER_BYTES // 4, device=device)
        self._pool = pool
        if pool is not None:
            self.title = f"the kernels, {pool.threads} threads"
        else:
            self.title = f"torch, {torch.get_num_threads()} threads" if device == "cpu" else f"torch, {device}"

    def read(self) -> float:
        """Bytes a second, the best of a few passes: whatever disturbs one of them is no property of the memory."""
        return BUFFER_BYTES / min(self._pass() for _ in range(ROUNDS))

    def _pass(self) -> float:
        begun = time.perf_counter()
        if self._pool is None:
            self._buffer.sum().item()  # which waits for a card
        else:
            self._pool.read(self._buffer.data_ptr(), BUFFER_BYTES)  # torch aligns to 64 bytes
        return time.perf_counter() - begun


def read_meter(device: str, *, native: bool) -> ReadMeter:
    """A meter for an engine on a device; with the kernels where it runs on them."""
    return ReadMeter(Pool(load_library(), default_threads()) if native else None, device)
