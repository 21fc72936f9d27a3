"""What amdgpu says of a process's memory in /proc/PID/fdinfo. Runs in: anywhere (may block); owns: nothing.

Each descriptor of the card's device file shows the memory of one *client* of the driver; descriptors that were
duplicated show the same client. Compute memory (KFD) is among it: its address space is that of one of the clients.

    Linux 6.x           drm-memory-vram, drm-memory-gtt              what lies there
    Linux 6.14 to 7.2   drm-resident-vram, drm-resident-gtt          what lies there
                        drm-total-vram                               what prefers to lie there
    6.4 and later       amd-evicted-vram                             prefers VRAM and lies elsewhere: spilled
                        amd-requested-vram                           prefers VRAM, wherever it lies
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgekv.smi.pci import parse_pci_address
from edgekv.smi.small_files import list_folder, parse_number, parse_table, read_bytes

_UNITS = {b"": 1, b"B": 1, b"KiB": 1 << 10, b"MiB": 1 << 20, b"GiB": 1 << 30}


@dataclass(frozen=True, slots=True)
class ClientMemory:
    """The memory of one client, or of all clients of a process. None: this kernel does not tell."""

    vram_bytes: int | None
    gtt_bytes: int | None
    spilled_bytes: int | None

    def __add__(self, other: "ClientMemory") -> "ClientMemory":
        """Both together; what is not told of one is not told of the sum."""
        return ClientMemory(
            _sum(self.vram_bytes, other.vram_bytes),
            _sum(self.gtt_bytes, other.gtt_bytes),
            _sum(self.spilled_bytes, other.spilled_bytes),
        )


@dataclass(frozen=True, slots=True)
class Client:
    """One client of a card's driver, by the number that the driver gave it."""

    pci_id: str
    number: int
    memory: ClientMemory


NOTHING = ClientMemory(0, 0, 0)


def parse_fdinfo(raw: bytes) -> Client | None:
    """The client that one descriptor's text speaks of; None where it is not one of a card. Never raises."""
    if b"drm-client-id" not in raw:
        return None
    table = parse_table(raw)
    pci_id = parse_pci_address(table.get(b"drm-pdev", b"").decode("ascii", "replace"))
    number = parse_number(table.get(b"drm-client-id", b""))
    if pci_id is None or number is None:
        return None

    def size(*names: bytes) -> int | None:
        return next((num for name in names if (num := parse_size(table.get(name))) is not None), None)

    vram = size(b"drm-resident-vram", b"drm-memory-vram")
    wanted = size(b"amd-requested-vram", b"drm-total-vram")
    spilled = size(b"amd-evicted-vram")
    if spilled is None and wanted is not None and vram is not None:
        spilled = max(0, wanted - vram)
    return Client(pci_id, number, ClientMemory(vram, size(b"drm-resident-gtt", b"drm-memory-gtt"), spilled))


def parse_size(raw: bytes | None) -> int | None:
    """Bytes of `123 KiB`, `4 MiB` or `0`; None for anything else."""
    digits, _, unit = (raw or b"").partition(b" ")
    number = parse_number(digits)
    factor = _UNITS.get(unit.strip())
    return number * factor if number is not None and factor is not None else None


def memory_of(process: Path, pci_id: str) -> ClientMemory | None:
    """The memory that a process (`/proc/PID` or `/proc/self`) has on one card; None where that may not be looked at."""
    clients: dict[int, ClientMemory] = {}
    descriptors = _descriptors(process)
    if descriptors is None:
        return None
    for path in descriptors:
        raw = read_bytes(path)
        client = parse_fdinfo(raw) if raw else None
        if client is not None and client.pci_id == pci_id:
            clients.setdefault(client.number, client.memory)
    return sum(clients.values(), start=NOTHING)


def _descriptors(process: Path) -> Iterator[str] | None:
    """The fdinfo files of those descriptors that may be a card's."""
    base = str(process)
    names = list_folder(f"{base}/fdinfo")
    if names is None:
        return None
    return (f"{base}/fdinfo/{name}" for name in names if _may_be_card(f"{base}/fd/{name}"))


def _may_be_card(link: str) -> bool:
    # A server has hundreds of sockets: reading a link costs a tenth of what reading an fdinfo costs.
    try:
        return os.readlink(link).startswith("/dev/dri/")
    except OSError:
        return True


def _sum(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one + other
