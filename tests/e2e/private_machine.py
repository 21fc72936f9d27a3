"""`edgekv` as if it and a few programs had the machine to themselves: `python -m tests.e2e.private_machine serve`.

What is held is real, and counted by the kernel. Only which programs count is chosen: this one, and those whose process
ids are in the file PRIVATE_PROGRAMS, on a machine with PRIVATE_BYTES of main memory. What all other programs of the
real machine take meanwhile, and what that drives out of memory, makes no difference.
"""

import os
from pathlib import Path
from typing import Any

from edgekv.smi import host, main_memory
from edgekv.smi.small_files import parse_table, read_bytes

BYTES, PROGRAMS = "PRIVATE_BYTES", "PRIVATE_PROGRAMS"


def held_bytes(pid: int | str) -> int:
    """What a program holds of main memory that is not a file's; nothing once it has ended."""
    table = parse_table(read_bytes(f"/proc/{pid}/status") or b"")
    return sum(host.kib(table, name) or 0 for name in (b"RssAnon", b"VmSwap"))


def read_private_memory(*_: Any) -> host.HostMemory:
    """In place of `host.read_memory`."""
    total_bytes = int(os.environ[BYTES])
    pids = Path(os.environ[PROGRAMS]).read_text(encoding="ascii").split()
    held = sum(map(held_bytes, ("self", *pids)))
    return host.HostMemory(total_bytes, max(0, total_bytes - held))


def read_own_unmoved(*_: Any) -> main_memory.OwnMemory:
    """In place of `main_memory.read_own`: what others have driven into swap counts as if it were still here."""
    return main_memory.OwnMemory(held_bytes("self"), swapped_bytes=0, major_faults=None)


def make_private() -> None:
    """From now on, for whoever imports them later too."""
    host.read_memory = main_memory.read_memory = read_private_memory  # type: ignore[assignment,attr-defined]
    main_memory.read_own = read_own_unmoved


if __name__ == "__main__":
    make_private()
    from edgekv.cli.app import main

    main()
