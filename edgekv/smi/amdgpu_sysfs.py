"""What amdgpu says of a card's memory under /sys. Runs in: anywhere (may block); owns: nothing."""

import os
from dataclasses import dataclass
from pathlib import Path

from edgekv.smi.pci import parse_pci_address
from edgekv.smi.reader import ReadingFailed
from edgekv.smi.small_files import list_folder, read_line, read_number

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class CardTotals:
    """Everybody's use of a card. GTT is main memory that the card reaches; None where it is not told."""

    vram_total_bytes: int
    vram_used_bytes: int
    gtt_total_bytes: int | None
    gtt_used_bytes: int | None


def card_folders(sysfs: Path) -> dict[str, Path]:
    """Where each card that amdgpu drives has its files, by PCI address and in that order."""
    drm = sysfs / "class/drm"
    found = {}
    for name in list_folder(drm) or ():
        folder = Path(os.path.realpath(drm / name / "device"))  # of card0-DP-1, a socket, that is card0
        pci_id = parse_pci_address(folder.name)
        if pci_id is not None and (folder / "mem_info_vram_total").exists():
            found[pci_id] = folder
    return dict(sorted(found.items()))


def read_totals(folder: Path) -> CardTotals:
    """The card's memory now. Raises ReadingFailed where its files are gone or make no sense."""
    total = read_number(folder / "mem_info_vram_total")
    used = read_number(folder / "mem_info_vram_used")
    if total is None or used is None:
        raise ReadingFailed(f"{folder.name}: amdgpu does not tell its memory (mem_info_vram_* cannot be read)")
    return CardTotals(
        total, used, read_number(folder / "mem_info_gtt_total"), read_number(folder / "mem_info_gtt_used")
    )


def shares_main_memory(folder: Path) -> bool:
    """Whether the card is an APU's: its programs' memory is main memory, and GTT is where it belongs.

    No file says so outright. amdgpu makes `board_info` for every card but an APU's (amdgpu_board_attrs_is_visible, end
    of 2023), so where it is, that settles it; and `uma` only for an APU's. Where neither is, an older kernel is asked
    for the maker of the memory chips, which amdgpu knows of cards (samsung, hynix, micron) and not of main memory, and
    at last whether there is less VRAM than GTT and less than any card has that could run a model. KFD's topology does
    not help: since 2020 it describes an APU as it does a card (cpu_cores_count 0, local_mem_size 0).
    """
    if (folder / "board_info").exists():
        return False
    if (folder / "uma").exists():
        return True
    maker = read_line(folder / "mem_info_vram_vendor")
    if maker not in (None, "unknown"):
        return False
    vram, gtt = read_number(folder / "mem_info_vram_total"), read_number(folder / "mem_info_gtt_total")
    if vram is None or gtt is None:
        return False
    return maker is None or (vram < gtt and vram < 4 * GIB)


def name_of(folder: Path, ids: Path = Path("/usr/share/libdrm/amdgpu.ids")) -> str:
    """What the card is sold as, where amdgpu or libdrm's list knows it, else its PCI numbers."""
    told = read_line(folder / "product_name")
    if told is not None:
        return told
    device, revision = ((read_line(folder / name) or "0x0")[2:].upper() for name in ("device", "revision"))
    try:
        lines = ids.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:  # 744C,	C8,	AMD Radeon RX 7900 XTX
        parts = [part.strip() for part in line.split(",", 2)]
        if len(parts) == 3 and parts[0].upper() == device and parts[1].upper() == revision:
            return parts[2]
    return f"AMD card 1002:{device.lower()}"


def uuid_of(folder: Path) -> str | None:
    """The name by which ROCR_VISIBLE_DEVICES may call the card."""
    unique = read_line(folder / "unique_id")
    return f"GPU-{unique}" if unique is not None else None


def link_of(folder: Path) -> tuple[int, int] | None:
    """PCIe generation and number of lanes: as fast as it can be (it idles slower), as wide as it is."""
    speed = (read_line(folder / "max_link_speed") or "").partition(" ")[0]
    generation = {"2.5": 1, "5.0": 2, "8.0": 3, "16.0": 4, "32.0": 5, "64.0": 6}.get(speed)
    width = read_number(folder / "current_link_width")
    return (generation, width) if generation is not None and width else None
