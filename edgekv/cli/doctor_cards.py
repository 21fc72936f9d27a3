"""What `edgekv doctor` finds about cards: drivers, libraries, memory and who holds it, and whether torch fits.

Runs in: the main thread; owns: nothing.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from edgekv.cli.doctor_gpu_kernels import kernel_findings
from edgekv.cli.finding import Finding
from edgekv.config.units import format_size
from edgekv.core.spill import Headroom
from edgekv.smi.torch_code import NoCode, driven_as, why_no_code

if TYPE_CHECKING:
    from edgekv.smi.cards import Card, Survey
    from edgekv.smi.torch_build import TorchBuild

DEV = Path("/dev")
MOST_HOLDERS = 8
_MAKERS = {"nvidia": "NVIDIA", "amd": "AMD"}
_REPAIRS = {
    "nvidia": "install NVIDIA's driver for this kernel, or restart after an upgrade of it; until then: device: cpu",
    "amd": "install the amdsmi library of the driver's ROCm release, or leave it: the CPU serves without",
}

_SKEWED = {  # the cards were found all the same
    "nvidia": "update NVIDIA's driver, or install nvidia-ml-py of its version; it is read as far as it tells",
    "amd": "install the amdsmi library of the driver's ROCm release; until then amdgpu's own files are read",
}


def card_findings(survey: "Survey", build: "TorchBuild | None", dev: Path = DEV) -> Iterator[Finding]:
    """One vendor's library, its cards and who is on them."""
    maker = _MAKERS[survey.vendor]
    if survey.problem is not None and not survey.absent:
        yield Finding("warn", f"{maker} library", survey.problem, _repair(survey))
    elif survey.cards:
        note = f" ({survey.problem})" if survey.problem else ""
        yield Finding("ok", f"{maker} library", f"{survey.library or 'the files of amdgpu'}{note}")
    elif survey.problem is not None:
        yield Finding("ok", f"{maker} cards", f"none: {survey.problem}")
    else:
        yield Finding("ok", f"{maker} cards", f"none ({survey.library})" if survey.library else "none")
    for card in survey.cards:
        yield _card(card, build)
        if card.holders:
            yield Finding("ok", "held by others", _holders(card))
    if build is not None and any(_wrong_make(card, build) is None for card in survey.cards):
        yield from kernel_findings(survey, build)
    if survey.vendor == "amd" and (survey.cards or (dev / "kfd").exists()):
        yield _compute_access(dev)


def _repair(survey: "Survey") -> str:
    return (_SKEWED if survey.cards else _REPAIRS)[survey.vendor]


def _card(card: "Card", build: "TorchBuild | None") -> Finding:
    headroom = Headroom.of(card.total_bytes).num_bytes
    facts = [
        f"{format_size(card.free_bytes)} free of {format_size(card.total_bytes)}",
        f"headroom {format_size(headroom)}",
        f"driver {card.driver}",
        str(card.link) if card.link is not None else "",
        f"{card.bandwidth_bytes_per_s / 1e9:,.0f} GB/s" if card.bandwidth_bytes_per_s else "",
        "shares main memory" if card.unified else "",
        card.target or "",
        f"at {card.pci_id}" if card.pci_id else "",
    ]
    found = ", ".join(fact for fact in facts if fact)
    if build is None:
        return Finding("warn", card.name, f"{found}; there is no torch to drive it", "pip install torch")
    wrong = _wrong_make(card, build)
    if wrong is not None:
        return Finding("warn", card.name, f"{found}; torch {build.version} {wrong.reason}", wrong.remedy)
    target = driven_as(card.target, os.environ)
    lacking = why_no_code(target, build.targets) if target is not None else None
    if lacking is not None:
        return Finding("warn", card.name, f"{found}; torch {build.version} {lacking.reason}", lacking.remedy)
    if card.free_bytes < headroom:
        return Finding("warn", card.name, found, "close what holds it: less than the headroom is free")
    return Finding("ok", card.name, found)


def _wrong_make(card: "Card", build: "TorchBuild") -> NoCode | None:
    """Why torch does not drive any card of this vendor."""
    if card.vendor == "nvidia":
        return NoCode("has no CUDA", "install torch's CUDA build: pip install torch") if build.cuda is None else None
    if build.cuda is None and build.hip is not None:
        return None
    kind = "is built for NVIDIA's cards" if build.cuda is not None else "has no HIP"
    return NoCode(kind, "install torch's ROCm build (pytorch.org, Linux, ROCm)")


def _holders(card: "Card") -> str:
    """Biggest first; those whose size the driver does not tell come last."""
    known = sorted(card.holders, key=lambda holder: -(holder.num_bytes or -1))
    shown = [
        f"{holder.name} ({holder.pid}) {'?' if holder.num_bytes is None else format_size(holder.num_bytes)}"
        for holder in known[:MOST_HOLDERS]
    ]
    more = len(known) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _compute_access(dev: Path) -> Finding:
    """Whether this user may compute on AMD's cards: torch opens /dev/kfd and the card's /dev/dri/renderD*."""
    subject = "AMD compute"
    kfd, renders = dev / "kfd", sorted((dev / "dri").glob("renderD*"))
    if not kfd.exists():
        fix = "load amdgpu with compute support; in a container pass --device /dev/kfd --device /dev/dri"
        return Finding("warn", subject, f"{kfd} is not there", fix)
    closed = [node for node in (kfd, *renders) if not os.access(node, os.R_OK | os.W_OK)]
    if closed and (kfd in closed or len(closed) == len(renders)):
        groups = ",".join(dict.fromkeys(_group(node) for node in closed))
        nodes = ", ".join(map(str, closed))
        fix = f"sudo usermod -aG {groups} $USER, then log in again; in a container: --group-add {groups}"
        return Finding("warn", subject, f"{nodes}: no permission to read and write", fix)
    return Finding("ok", subject, f"{kfd} and {len(renders)} render nodes can be used")


def _group(node: Path) -> str:
    """The group that may open it; render or video where it has no name here."""
    try:
        name = node.group()
    except (KeyError, OSError):
        name = "root"
    return name if name != "root" else "render,video"
