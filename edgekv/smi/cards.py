"""Which cards there are, how full they are and who holds that, for `doctor`, `plan` and the choice of a device.

Runs in: anywhere (calls may block: off the trio thread); owns: nothing. Memory is what the memory guard's own readers
read, so that a plan and the guard never differ.
"""

import os
import platform
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from edgekv.core.reading import Holder
from edgekv.smi import amdsmi_library, nvml
from edgekv.smi.amd import AmdReader, AmdsmiTotals, SysfsTotals
from edgekv.smi.amdgpu_sysfs import card_folders, link_of, name_of, uuid_of
from edgekv.smi.host import PROC, SYSFS
from edgekv.smi.kfd import read_nodes
from edgekv.smi.nvidia import NvidiaReader
from edgekv.smi.reader import ReadingFailed
from edgekv.smi.small_files import list_folder, read_line

_PCI_VENDORS = {"nvidia": "0x10de", "amd": "0x1002"}
_FREE_DRIVERS = ("nouveau", "nova_core")  # the kernel's own for NVIDIA's cards; nothing is computed with them
_PATIENCE_S = 1.0


@dataclass(frozen=True, slots=True)
class Link:
    """The card's way to main memory: PCIe generation (of which it is capable) and number of lanes (in use)."""

    generation: int
    width: int

    def __str__(self) -> str:
        return f"PCIe {self.generation}.0 x{self.width}"


@dataclass(frozen=True, slots=True)
class Card:
    """One card and its memory now. None: not told.

    `index` is its number among its vendor's cards here; `unified`: its memory is main memory (an APU).
    `bandwidth_bytes_per_s` is the data sheet's, between the card and its own memory. `target`: what compilers call the
    chip, as sm_89 or gfx1100.
    """

    vendor: Literal["nvidia", "amd"]
    index: int
    name: str
    total_bytes: int
    used_bytes: int
    driver: str
    pci_id: str | None = None
    link: Link | None = None
    bandwidth_bytes_per_s: int | None = None
    holders: tuple[Holder, ...] = ()
    unified: bool = False
    uuid: str | None = None
    target: str | None = None

    @property
    def free_bytes(self) -> int:
        """Memory that no program holds."""
        return self.total_bytes - self.used_bytes


@dataclass(frozen=True, slots=True)
class Survey:
    """The cards of one vendor, and by what they were found (`library`).

    `problem` says in one line what is amiss, `absent` that this is no fault (there is no such card, or no driver for
    one). Cards may have been found all the same.
    """

    vendor: Literal["nvidia", "amd"]
    cards: tuple[Card, ...] = ()
    problem: str | None = None
    absent: bool = False
    library: str | None = None


def survey() -> tuple[Survey, Survey]:
    """Both vendors' cards; never raises."""
    return survey_nvidia(), survey_amd()


def survey_nvidia(sysfs: Path = SYSFS, proc: Path = PROC) -> Survey:
    """NVIDIA's cards through NVML."""
    try:
        library = nvml.Nvml.open()
    except nvml.NoLibrary as error:
        there = _told_of(sysfs, "nvidia", besides=("nvidia",))
        problem = f"an NVIDIA card is there ({there}), but {error}" if there else str(error)
        return Survey("nvidia", problem=problem, absent=there is None)
    except nvml.NoDriver as error:
        idle = _told_of(sysfs, "nvidia")
        problem = f"an NVIDIA card is there ({idle}), but NVIDIA's kernel driver is not loaded" if idle else str(error)
        return Survey("nvidia", problem=problem, absent=idle is None)
    except ReadingFailed as error:
        return Survey("nvidia", problem=str(error))
    try:
        driver = library.optional("nvmlSystemGetDriverVersion") or "unknown"
        version = library.optional("nvmlSystemGetNVMLVersion")
        found: list[Card] = []
        lost: str | None = None
        for index in range(library.num_cards()):
            try:
                found.append(_nvidia_card(library, index, library.nth(index), str(driver), proc))
            except ReadingFailed as error:
                lost = lost or f"card {index}: {error}"
        return Survey("nvidia", tuple(found), lost or library.missing, library=f"NVML {version or 'unknown'}")
    except ReadingFailed as error:
        return Survey("nvidia", problem=str(error))
    finally:
        library.close()


def survey_amd(sysfs: Path = SYSFS, proc: Path = PROC) -> Survey:
    """AMD's cards through amdsmi; where that cannot be asked, through amdgpu's files, which say the same of memory."""
    try:
        library = amdsmi_library.AmdSmi.open()
    except amdsmi_library.NoLibrary as error:
        return _amd_files(sysfs, proc, str(error), absent=True)
    except ReadingFailed as error:
        return _amd_files(sysfs, proc, str(error), absent=False)
    try:
        driver, found = _amdgpu_version(sysfs), []
        for handle in library.handles():
            pci_id = library.pci_address(handle)
            totals = AmdsmiTotals(library, handle)
            name, bandwidth = library.market_name(handle), library.bandwidth_bytes_per_s(handle)
            found.append(_amd_card(totals, pci_id, name, driver, bandwidth, sysfs, proc))
        if not found:
            return _amd_files(sysfs, proc, "amdsmi sees no card", absent=True)
        return Survey("amd", _in_order(found, sysfs), library=f"amdsmi {library.version()}")
    except ReadingFailed as error:
        return _amd_files(sysfs, proc, str(error), absent=False)
    finally:
        library.close()


def _nvidia_card(library: nvml.Nvml, index: int, handle: Any, driver: str, proc: Path) -> Card:
    reading = NvidiaReader(library, handle, proc).read(0.0)
    generation = library.optional("nvmlDeviceGetMaxPcieLinkGeneration", handle)
    width = library.optional("nvmlDeviceGetCurrPcieLinkWidth", handle)
    clock_mhz = library.optional("nvmlDeviceGetMaxClockInfo", handle, library.module.NVML_CLOCK_MEM)
    width_bits = library.optional("nvmlDeviceGetMemoryBusWidth", handle)
    uuid = library.optional("nvmlDeviceGetUUID", handle)
    capability = library.optional("nvmlDeviceGetCudaComputeCapability", handle)
    return Card(
        "nvidia",
        index,
        str(library.optional("nvmlDeviceGetName", handle) or "NVIDIA card"),
        reading.total_bytes,
        reading.used_bytes,
        driver,
        pci_id=library.pci_address(handle),
        link=Link(int(generation), int(width)) if generation and width else None,
        # NVML's memory clock is half of the rate of transfers: 4090: 2 x 10501 MHz x 384 bit / 8 = 1008 GB/s.
        bandwidth_bytes_per_s=int(clock_mhz) * 2 * int(width_bits) // 8 * 10**6 if clock_mhz and width_bits else None,
        holders=reading.holders,
        uuid=str(uuid) if uuid else None,
        target="sm_{}{}".format(*capability) if capability else None,
    )


def _amd_files(sysfs: Path, proc: Path, problem: str, *, absent: bool) -> Survey:
    """The cards as amdgpu's files show them, after amdsmi could not be asked because of `problem`."""
    driver, found = _amdgpu_version(sysfs), []
    for pci_id, folder in card_folders(sysfs).items():
        try:
            found.append(_amd_card(SysfsTotals(folder), pci_id, None, driver, None, sysfs, proc))
        except ReadingFailed as error:
            problem, absent = str(error), False
    if found:
        # Without amdsmi nothing is amiss: the files tell all that is needed.
        return Survey("amd", _in_order(found, sysfs), None if absent else problem, library="amdgpu's files in /sys")
    idle = _told_of(sysfs, "amd")
    if idle is not None:
        return Survey("amd", problem=f"an AMD card is there ({idle}), but its kernel driver (amdgpu) does not drive it")
    return Survey("amd", problem=problem, absent=absent or not _on_bus(sysfs, "amd"))


def _amd_card(
    totals: AmdsmiTotals | SysfsTotals,
    pci_id: str,
    name: str | None,
    driver: str,
    bandwidth_bytes_per_s: int | None,
    sysfs: Path,
    proc: Path,
) -> Card:
    reading = AmdReader(totals, pci_id, sysfs, proc, look_s=_PATIENCE_S).read(0.0)
    folder = card_folders(sysfs).get(pci_id)
    node = next((node for node in read_nodes(sysfs) if node.pci_id == pci_id), None)
    link = link_of(folder) if folder is not None and not reading.unified else None  # an APU has none to speak of
    return Card(
        "amd",
        0,
        name or (name_of(folder) if folder is not None else f"AMD card at {pci_id}"),
        reading.total_bytes,
        reading.used_bytes,
        driver,
        pci_id=pci_id,
        link=Link(*link) if link is not None else None,
        bandwidth_bytes_per_s=bandwidth_bytes_per_s,
        holders=reading.holders,
        unified=reading.unified,
        uuid=uuid_of(folder) if folder is not None else None,
        target=node.target if node is not None else None,
    )


def _in_order(cards: list[Card], sysfs: Path) -> tuple[Card, ...]:
    """In KFD's order, which is HIP's; cards that KFD does not drive come last."""
    ranks = {node.pci_id: rank for rank, node in enumerate(read_nodes(sysfs))}
    ordered = sorted(cards, key=lambda card: (ranks.get(card.pci_id or "", len(ranks)), card.pci_id or ""))
    return tuple(replace(card, index=index) for index, card in enumerate(ordered))


def _amdgpu_version(sysfs: Path) -> str:
    # Only ROCm's own build of amdgpu has a version; the kernel's is as old as the kernel.
    return read_line(sysfs / "module/amdgpu/version") or f"Linux {platform.release()}"


def _told_of(sysfs: Path, vendor: Literal["nvidia", "amd"], besides: Collection[str] = ()) -> str | None:
    """The first card that no driver has, or one with which nothing can be computed (or one of `besides`): its address.

    One that was handed to a virtual machine (vfio) is not meant.
    """
    for folder in _on_bus(sysfs, vendor):
        link = folder / "driver"
        driver = os.path.basename(os.path.realpath(link)) if os.path.lexists(link) else None
        if driver is None:
            return folder.name
        if driver in (*_FREE_DRIVERS, *besides):
            return f"{folder.name}, driven by {driver}"
    return None


def _on_bus(sysfs: Path, vendor: Literal["nvidia", "amd"]) -> list[Path]:
    """The vendor's display adapters and accelerators on the PCI bus."""
    devices = sysfs / "bus/pci/devices"
    return [
        devices / name
        for name in sorted(list_folder(devices) or ())
        if read_line(devices / name / "vendor") == _PCI_VENDORS[vendor]
        and (read_line(devices / name / "class") or "").startswith(("0x03", "0x12"))
    ]
