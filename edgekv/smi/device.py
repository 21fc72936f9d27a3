"""Which device a model goes to, decided without torch. Runs in: anywhere; owns: nothing."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from edgekv.errors import ConfigError
from edgekv.smi.cards import Card, survey_amd, survey_nvidia
from edgekv.smi.host import read_memory
from edgekv.smi.torch_build import TorchBuild, read_torch_build


class Wanted(Protocol):
    """What a configuration asks for under `devices`."""

    @property
    def vendor(self) -> Literal["cpu", "nvidia", "amd"]:
        """Whose device."""

    @property
    def name(self) -> str | None:
        """Part of its name."""

    @property
    def index(self) -> int | None:
        """Its number among those that fit."""


@dataclass(frozen=True, slots=True)
class Watched:
    """Which device the memory guard is to read: a vendor's card by its PCI address (`0000:03:00.0`), or main memory."""

    vendor: Literal["cpu", "nvidia", "amd"]
    pci_id: str | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """A device as torch calls it, its memory, and how much of that nobody holds.

    `reserve_bytes` is what its owner wants left free (the headroom; None: the usual), `most_bytes` the most that edgekv
    may have of it in all (None: no limit).
    """

    kind: Literal["cpu", "card"]
    torch_name: str
    title: str
    free_bytes: int
    note: str = ""
    total_bytes: int = 0
    reserve_bytes: int | None = None
    most_bytes: int | None = None
    watched: Watched = Watched("cpu")


def choose_place(device: str, devices: Mapping[str, Wanted]) -> Place:
    """The device that `device` ("auto", "cpu" or a name in `devices`) stands for.

    "auto" is the first card that the installed torch can drive, else the CPU. Raises ConfigError when a named one is
    not there.
    """
    if device == "auto":
        build = read_torch_build()
        cards = usable_cards(build)
        if cards:
            return _card_place(cards[0])
        return _cpu_place(_why_no_card(build))
    if device == "cpu" or devices[device].vendor == "cpu":
        return _cpu_place("")
    wanted = devices[device]
    found = survey_nvidia() if wanted.vendor == "nvidia" else survey_amd()
    fitting = [card for card in found.cards if wanted.name is None or wanted.name.lower() in card.name.lower()]
    index = wanted.index or 0
    if index >= len(fitting):
        seen = ", ".join(card.name for card in found.cards) or found.problem or "none"
        raise ConfigError([f"error: devices.{device}: no such card here (found: {seen}); use device: cpu or auto"])
    build = read_torch_build()
    if fitting[index] not in usable_cards(build):
        version = build.version if build else "missing"
        raise ConfigError([f"error: devices.{device}: the installed torch ({version}) was not built for this card"])
    return _card_place(fitting[index])


def usable_cards(build: TorchBuild | None) -> tuple[Card, ...]:
    """The cards that the installed torch was built for."""
    if build is None:
        return ()
    if build.cuda is not None:
        return survey_nvidia().cards
    return survey_amd().cards if build.hip is not None else ()


def _card_place(card: Card) -> Place:
    return Place("card", f"cuda:{card.index}", card.name, card.free_bytes)


def _cpu_place(note: str) -> Place:
    return Place("cpu", "cpu", "CPU", read_memory().available_bytes, note)


def _why_no_card(build: TorchBuild | None) -> str:
    if build is not None and build.cuda is None and build.hip is None:
        cards = (*survey_nvidia().cards, *survey_amd().cards)
        if cards:
            return f"{cards[0].name} is idle: the installed torch ({build.version}) is a CPU build"
    return ""
