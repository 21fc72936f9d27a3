"""NVIDIA cards as the memory guard reads them. Runs in: the watch's thread (calls may block); owns: a session of NVML.

Nothing ever counts as spilled: on Linux what cudaMalloc gave lies in VRAM until it is freed, and running out is an
error; only managed memory could move, and edgekv has none. (Windows' driver does spill, and NVML does not show it.)
"""

import os
from pathlib import Path
from typing import Any

from edgekv.core.reading import Holder, Reading
from edgekv.smi.nvml import Nvml
from edgekv.smi.processes import Names
from edgekv.smi.reader import Reader


def open_nvml(pci_id: str | None, proc: Path) -> Reader:
    """A reader of the card at that address. Raises ReadingFailed where NVML or the card is not there."""
    library = Nvml.open()
    try:
        return NvidiaReader(library, library.handle(pci_id), proc)
    except BaseException:
        library.close()
        raise


class NvidiaReader:
    """Reads one card."""

    def __init__(self, library: Nvml, handle: Any, proc: Path) -> None:
        self._library, self._handle = library, handle
        self._names = Names(proc, library.process_name)

    def read(self, at: float) -> Reading:
        """See `Reader`."""
        total, used = self._library.memory(self._handle)
        held = self._library.processes(self._handle)
        # Not listed is not told, rather than nothing: inside a container NVML lists other numbers than ours, or none
        # at all. Before the first use of the card it comes to the same, for then nothing is leased.
        own = held.pop(os.getpid(), None)
        self._names.keep(held)
        holders = [Holder(pid, self._names.of(pid), num_bytes) for pid, num_bytes in held.items()]
        return Reading(
            total_bytes=total,
            used_bytes=min(used, total),
            own_bytes=own,
            source="nvml",
            at=at,
            holders=tuple(sorted(holders, key=lambda holder: (-(holder.num_bytes or 0), holder.pid))),
        )

    def close(self) -> None:
        """See `Reader`."""
        self._library.close()
