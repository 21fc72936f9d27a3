"""Main memory as the memory guard reads it, for the CPU and for APUs. Runs in: anywhere; owns: nothing.

- total       MemTotal, or the tightest limit of a control group around this process
- used        total - what could be had without swapping (less where a control group is near its limit)
- own         resident anonymous pages: the weights' and the KV pool's, and all that Python and torch hold
- spilled     own pages in swap
"""

from dataclasses import dataclass
from pathlib import Path

import psutil

from edgekv.core.reading import Holder, Reading
from edgekv.smi.host import PROC, SYSFS, kib, read_memory
from edgekv.smi.reader import ReadingFailed
from edgekv.smi.small_files import parse_number, parse_table, read_bytes


@dataclass(frozen=True, slots=True)
class OwnMemory:
    """What the process itself holds. `major_faults` (pages read back from disk) only ever grows; None: not told."""

    resident_bytes: int
    swapped_bytes: int
    major_faults: int | None


def read_own(proc: Path = PROC) -> OwnMemory:
    """Its memory now."""
    table = parse_table(read_bytes(proc / "self/status") or b"")
    resident = kib(table, b"RssAnon")
    if resident is None:
        resident = psutil.Process().memory_info().rss
    return OwnMemory(resident, kib(table, b"VmSwap") or 0, _major_faults(proc))


class HostReader:
    """Reads main memory. Who else holds it takes long to find out: `biggest_programs` tells, where somebody asks."""

    def __init__(self, sysfs: Path = SYSFS, proc: Path = PROC) -> None:
        self._sysfs, self._proc = sysfs, proc

    def read(self, at: float) -> Reading:
        """See `Reader`."""
        try:
            memory, own = read_memory(self._sysfs, self._proc), read_own(self._proc)
        except (OSError, psutil.Error) as error:
            raise ReadingFailed(f"main memory cannot be read: {error}") from error
        return Reading(
            total_bytes=memory.total_bytes,
            used_bytes=memory.total_bytes - memory.available_bytes,
            own_bytes=own.resident_bytes,
            source="host",
            at=at,
            spilled_own_bytes=own.swapped_bytes,
            major_faults=own.major_faults,
            unified=True,
        )

    def close(self) -> None:
        """See `Reader`."""


def biggest_programs(most: int = 5) -> tuple[Holder, ...]:
    """The other processes that hold most of main memory, biggest first; takes a tenth of a second on a full machine."""
    mine = psutil.Process().pid
    found = []
    for process in psutil.process_iter(["pid", "name", "memory_info"]):
        memory = process.info["memory_info"]
        if memory is not None and process.info["pid"] != mine:
            num_bytes = memory.rss - getattr(memory, "shared", 0)
            found.append(Holder(process.info["pid"], process.info["name"] or "?", num_bytes))
    return tuple(sorted(found, key=lambda holder: -(holder.num_bytes or 0))[:most])


def _major_faults(proc: Path) -> int | None:
    # pid (name) state ppid pgrp session tty_nr tpgid flags minflt cminflt majflt …: the name may hold anything.
    fields = (read_bytes(proc / "self/stat") or b"").rpartition(b")")[2].split()
    return parse_number(fields[9]) if len(fields) > 9 else None
