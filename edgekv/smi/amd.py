"""AMD cards and APUs as the memory guard reads them. Runs in: the watch's thread (calls may block).

Owns: a session of amdsmi, where that is there.

Totals come from amdsmi or, where that is not there or fails, from sysfs; all else from /proc and KFD, the same in both:

                       a card                                    an APU: GTT is its memory, and nothing is amiss there
    total, used        VRAM                                      GTT, as far as main memory is free (`memory_use`)
    own                resident in VRAM (fdinfo)                 resident in GTT
    spilled            wants VRAM and lies elsewhere (fdinfo)    swapped out
    evicted_ms         KFD: our queues were stopped              the same
    holders            KFD's processes, and clients of the same user's (fdinfo)
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekv.core.reading import Holder, Reading
from edgekv.smi.amdgpu_sysfs import CardTotals, card_folders, read_totals, shares_main_memory
from edgekv.smi.amdsmi_library import AmdSmi
from edgekv.smi.fdinfo import ClientMemory, memory_of
from edgekv.smi.host import HostMemory, read_memory
from edgekv.smi.kfd import read_evicted_ms, read_nodes, read_uses
from edgekv.smi.main_memory import OwnMemory, read_own
from edgekv.smi.processes import LEAST_S, CardClients, Names, own_pid
from edgekv.smi.reader import Reader, ReadingFailed


def open_amdsmi(pci_id: str | None, sysfs: Path, proc: Path) -> Reader:
    """A reader with amdsmi's totals. Raises ReadingFailed where amdsmi or the card is not there."""
    library = AmdSmi.open()
    try:
        handle = library.handle(pci_id)
        address = pci_id or library.pci_address(handle)
        return AmdReader(AmdsmiTotals(library, handle), address, sysfs, proc)
    except BaseException:
        library.close()
        raise


def open_sysfs(pci_id: str | None, sysfs: Path, proc: Path) -> Reader:
    """A reader with sysfs's totals. Raises ReadingFailed where the card is not there."""
    folders = card_folders(sysfs)
    if pci_id is None and len(folders) == 1:
        pci_id = next(iter(folders))
    if pci_id is None or pci_id not in folders:
        raise ReadingFailed(f"amdgpu drives no card at {pci_id or 'an unnamed address'} ({_seen(folders)})")
    return AmdReader(SysfsTotals(folders[pci_id]), pci_id, sysfs, proc)


class AmdsmiTotals:
    """Totals from an open session of amdsmi, which it closes with itself."""

    name = "amdsmi"

    def __init__(self, library: AmdSmi, handle: Any) -> None:
        self._library, self._handle = library, handle

    def read(self) -> CardTotals:
        """The card's memory now. Raises ReadingFailed."""
        return self._library.totals(self._handle)

    def close(self) -> None:
        """End the session."""
        self._library.close()


class SysfsTotals:
    """Totals from amdgpu's files."""

    name = "sysfs"

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self) -> CardTotals:
        """The card's memory now. Raises ReadingFailed."""
        return read_totals(self._folder)

    def close(self) -> None:
        """Nothing is open."""


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """The part of a card's memory that programs get: everybody's use, and whether it is main memory."""

    total_bytes: int
    used_bytes: int
    unified: bool
    in_gtt: bool


class AmdReader:
    """Reads one card. The parts that never change are looked up once, when it is made."""

    def __init__(
        self, totals: AmdsmiTotals | SysfsTotals, pci_id: str, sysfs: Path, proc: Path, look_s: float = LEAST_S
    ) -> None:
        self._totals, self._pci_id, self._sysfs, self._proc = totals, pci_id, sysfs, proc
        folder = card_folders(sysfs).get(pci_id)
        self._unified = folder is not None and shares_main_memory(folder)
        self._node = next((node for node in read_nodes(sysfs) if node.pci_id == pci_id), None)
        self._pid = own_pid(proc)
        self._clients = CardClients(proc, pci_id, look_s)
        self._names = Names(proc)

    def read(self, at: float) -> Reading:
        """See `Reader`."""
        totals = self._totals.read()
        use = memory_use(totals, read_memory(self._sysfs, self._proc) if self._unified else None)
        own = memory_of(self._proc / "self", self._pci_id)
        host = read_own(self._proc) if self._unified else None
        asked = {one.pid: one.vram_bytes for one in read_uses(self._sysfs, self._node)} if self._node else {}
        return Reading(
            total_bytes=use.total_bytes,
            used_bytes=use.used_bytes,
            own_bytes=_own_bytes(own, asked.get(self._pid), use),
            source=self._totals.name,
            at=at,
            spilled_own_bytes=_spilled_bytes(own, host),
            gtt_used_bytes=totals.gtt_used_bytes,
            evicted_ms=read_evicted_ms(self._sysfs, self._node, self._pid) if self._node else None,
            major_faults=host.major_faults if host is not None else None,
            unified=use.unified,
            holders=self._holders(asked, use),
        )

    def close(self) -> None:
        """See `Reader`."""
        self._totals.close()

    def _holders(self, asked: dict[int, int], use: MemoryUse) -> tuple[Holder, ...]:
        held: dict[int, int | None] = dict(asked)
        for pid, memory in self._clients.look().items():
            # KFD says what was asked for; the client what is there.
            told = memory.gtt_bytes if use.in_gtt else memory.vram_bytes
            held[pid] = told if told is not None else held.get(pid)
        held.pop(self._pid, None)
        self._names.keep(held)
        found = [Holder(pid, self._names.of(pid), num_bytes) for pid, num_bytes in held.items() if num_bytes != 0]
        return tuple(sorted(found, key=lambda holder: (-(holder.num_bytes or 0), holder.pid)))


def memory_use(totals: CardTotals, host: HostMemory | None) -> MemoryUse:
    """The memory that programs get. `host`: main memory now, for an APU; None for a card.

    On an APU, amdgpu puts compute memory into GTT unless the part that the firmware set aside as VRAM is larger
    (apu_prefer_gtt in amdgpu_ttm.c); then that is the memory, and no other program can take it.
    """
    gtt_total = totals.gtt_total_bytes
    if host is None or gtt_total is None or totals.vram_total_bytes >= gtt_total:
        used = min(totals.vram_used_bytes, totals.vram_total_bytes)
        return MemoryUse(totals.vram_total_bytes, used, unified=host is not None, in_gtt=False)
    total = min(gtt_total, host.total_bytes)
    free = min(max(0, gtt_total - (totals.gtt_used_bytes or 0)), host.available_bytes, total)
    return MemoryUse(total, total - free, unified=True, in_gtt=True)


def _own_bytes(own: ClientMemory | None, kfd_bytes: int | None, use: MemoryUse) -> int | None:
    if own is not None:
        told = own.gtt_bytes if use.in_gtt else own.vram_bytes
        if told is not None:
            return told
    return kfd_bytes


def _spilled_bytes(own: ClientMemory | None, host: OwnMemory | None) -> int:
    if host is not None:
        return host.swapped_bytes
    return (own.spilled_bytes or 0) if own is not None else 0


def _seen(folders: dict[str, Path]) -> str:
    return f"it drives {', '.join(folders)}" if folders else "it drives none"
