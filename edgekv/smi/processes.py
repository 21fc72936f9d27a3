"""Which other processes there are, what they are called, and what they hold of a card. Runs in: anywhere (may block).

Owns: nothing but what it remembers of processes seen earlier.
"""

import os
import time
from collections.abc import Callable, Collection
from pathlib import Path

from edgekv.smi.fdinfo import ClientMemory, memory_of
from edgekv.smi.small_files import list_folder, read_line

LEAST = 8
LEAST_S, SHARE = 0.001, 0.01


def own_pid(proc: Path) -> int:
    """The number by which this process goes under `proc`."""
    try:
        return int(os.readlink(proc / "self"))
    except (OSError, ValueError):
        return os.getpid()


class Names:
    """The names of processes, each looked up once. `elsewhere` is asked for those that the kernel does not name."""

    def __init__(self, proc: Path, elsewhere: Callable[[int], str | None] | None = None) -> None:
        self._proc, self._elsewhere = proc, elsewhere
        self._names: dict[int, str] = {}

    def of(self, pid: int) -> str:
        """What the kernel calls it; "?" where it is gone, or another container's."""
        if pid not in self._names:
            name = read_line(self._proc / str(pid) / "comm")
            if name is None and self._elsewhere is not None:
                name = self._elsewhere(pid)
            # A program may call itself anything, and its name is printed to terminals.
            self._names[pid] = "".join(c if c.isprintable() else "?" for c in name or "?")
        return self._names[pid]

    def keep(self, pids: Collection[int]) -> None:
        """Forget all but these: another process may come to have a number again."""
        for pid in self._names.keys() - set(pids):
            del self._names[pid]


class CardClients:
    """What the processes that may be looked at (those of the same user) have on one amdgpu card.

    A look at every process takes tens of milliseconds on a full desktop. So each call looks at some, the ones that are
    new first, and the next call goes on from there: it takes a hundredth of the time between the calls, from
    `least_s` to four times that (of the thread's own time: a busy machine tells as much), and looks at `least`
    whatever it takes.
    What is told of a process is a few seconds old at most.
    """

    def __init__(self, proc: Path, pci_id: str, least_s: float = LEAST_S, least: int = LEAST) -> None:
        self._proc, self._pci_id, self._least_s, self._least = proc, pci_id, least_s, least
        self._seen: set[int] = set()
        self._round: list[int] = []
        self._known: dict[int, ClientMemory] = {}
        self._last_at: float | None = None

    def look(self) -> dict[int, ClientMemory]:
        """The processes known to have memory on the card, this one among them."""
        now = time.perf_counter()
        elapsed_s = 0.0 if self._last_at is None else now - self._last_at
        self._last_at = now
        until = time.thread_time() + max(self._least_s, min(SHARE * elapsed_s, 4 * self._least_s))
        self._line_up({int(name) for name in list_folder(self._proc) or () if name.isdecimal()})
        looked = 0
        while self._round and (looked < self._least or time.thread_time() < until):
            looked += 1
            pid = self._round.pop()
            memory = memory_of(self._proc / str(pid), self._pci_id)
            if memory is not None and (memory.vram_bytes or memory.gtt_bytes):
                self._known[pid] = memory
            else:
                self._known.pop(pid, None)
        return dict(self._known)

    def _line_up(self, alive: set[int]) -> None:
        for gone in self._known.keys() - alive:
            del self._known[gone]
        if not self._round:
            self._round = sorted(alive & self._seen)
        self._round += sorted(alive - self._seen)
        self._seen = alive
