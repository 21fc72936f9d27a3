"""What amdkfd (compute on AMD) says under /sys/class/kfd: which cards it drives, and which processes use them.

Runs in: anywhere (may block); owns: nothing.
"""

from dataclasses import dataclass
from pathlib import Path

from edgekv.smi.pci import pci_address
from edgekv.smi.small_files import list_folder, parse_number, parse_table, read_bytes, read_number


@dataclass(frozen=True, slots=True)
class KfdNode:
    """A card as KFD numbers it: `number` is its place in the topology, `gpu_id` the one in names of files.

    `target`: what compilers call it, as gfx1100; None where it is not told.
    """

    number: int
    gpu_id: int
    pci_id: str
    target: str | None = None


@dataclass(frozen=True, slots=True)
class KfdUse:
    """One process's use of one card: VRAM that it allocated (wherever that lies by now)."""

    pid: int
    vram_bytes: int


def read_nodes(sysfs: Path) -> tuple[KfdNode, ...]:
    """The cards in the topology's order, which is the one in which HIP numbers them."""
    folder = sysfs / "class/kfd/kfd/topology/nodes"
    nodes = []
    for name in list_folder(folder) or ():
        if not name.isdecimal():
            continue
        gpu_id = read_number(folder / name / "gpu_id")
        table = parse_table(read_bytes(folder / name / "properties") or b"")
        location = parse_number(table.get(b"location_id", b""))
        domain = parse_number(table.get(b"domain", b"0"))  # kernels before 5.6 do not write it
        if not gpu_id or location is None or domain is None:  # gpu_id 0: a processor
            continue
        address = pci_address(domain, location >> 8 & 0xFF, location >> 3 & 0x1F, location & 7)
        version = parse_number(table.get(b"gfx_target_version", b""))
        nodes.append(KfdNode(int(name), gpu_id, address, gfx_target(version) if version else None))
    return tuple(sorted(nodes, key=lambda node: node.number))


def gfx_target(version: int) -> str:
    """gfx90a of 90010: major, minor and step, two decimal digits each and the last two as one hexadecimal one.

    (KFD_TOPOLOGY's gfx_target_version: drivers/gpu/drm/amd/amdkfd/kfd_device.c.)
    """
    return f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"


def read_uses(sysfs: Path, node: KfdNode) -> list[KfdUse]:
    """Everybody's use of one card; processes of other users are among them."""
    folder = f"{sysfs}/class/kfd/kfd/proc"
    uses = []
    for name in list_folder(folder) or ():
        if name.isdecimal() and (vram := read_number(f"{folder}/{name}/vram_{node.gpu_id}")) is not None:
            uses.append(KfdUse(int(name), vram))
    return uses


def read_evicted_ms(sysfs: Path, node: KfdNode, pid: int) -> int | None:
    """For how long in all the driver has kept a process's queues on one card stopped to move its memory."""
    return read_number(f"{sysfs}/class/kfd/kfd/proc/{pid}/stats_{node.gpu_id}/evicted_ms")
