"""Which device a model goes to, decided without torch. Runs in: anywhere (calls may block); owns: nothing."""

import os
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from edgekv.config.units import Share
from edgekv.errors import ConfigError
from edgekv.smi.cards import Card, survey_amd, survey_nvidia
from edgekv.smi.device_order import Numbered, settle_order, torch_number
from edgekv.smi.host import read_memory
from edgekv.smi.reader import ReadingFailed, Source
from edgekv.smi.reader import Watched as Watched
from edgekv.smi.sources import sources_for
from edgekv.smi.torch_build import TorchBuild, read_torch_build
from edgekv.smi.torch_code import NoCode, driven_as, why_no_code

_MAIN_MEMORY = Watched("cpu")


class Match(Protocol):
    """Which device a configuration means; every given field has to fit."""

    @property
    def vendor(self) -> Literal["cpu", "nvidia", "amd"]:
        """Whose device."""

    @property
    def name(self) -> str | None:
        """Part of its name."""

    @property
    def index(self) -> int | None:
        """Its number among those that fit."""


class Wanted(Protocol):
    """What a configuration says of a device under `devices`."""

    @property
    def match(self) -> Match:
        """Which it is."""

    @property
    def desktop_reserve_bytes(self) -> int | None:
        """What is to stay free for other programs; None: the usual headroom."""

    @property
    def vram_budget(self) -> int | Share | None:
        """The most that edgekv may have of it; None: no limit."""


@dataclass(frozen=True, slots=True)
class Place:
    """A device as torch calls it, its memory, and how much of that nobody holds.

    `reserve_bytes` is what its owner wants left free (the headroom; None: the usual), `most_bytes` the most that edgekv
    may have of it in all (None: no limit). `target`: what compilers call the card, as sm_89 or gfx1100; None where that
    is not known.
    """

    kind: Literal["cpu", "card"]
    torch_name: str
    title: str
    free_bytes: int
    note: str = ""
    total_bytes: int = 0
    reserve_bytes: int | None = None
    most_bytes: int | None = None
    watched: Watched = _MAIN_MEMORY
    target: str | None = None

    @property
    def is_real_card(self) -> bool:
        """Whether it is a card that torch drives, rather than main memory that plays one."""
        return self.kind == "card" and self.torch_name.startswith("cuda")


def choose_place(device: str, devices: Mapping[str, Wanted], environ: MutableMapping[str, str] | None = None) -> Place:
    """The device that `device` ("auto", "cpu" or a name in `devices`) stands for.

    "auto" is the first card that the installed torch can drive (an APU's only where there is no other), else the CPU.
    The first of `devices` that means the chosen device sets its reserve and budget, also when it was not asked for by
    name. `environ` is the process's: see `settle_order`. Raises ConfigError when a named device is not there.
    """
    environ = os.environ if environ is None else environ
    build = read_torch_build()
    if device == "auto":
        cards = usable_cards(build)
        able = [card for card in sorted(cards, key=_last_unified) if _lacking_code(card, build, environ) is None]
        seen = [place for card in able if (place := _card_place(card, cards, environ))]
        if seen:
            return _lent(seen[0], cards, devices)
        return _lent(_cpu_place(_why_no_card(build, cards, able)), (), devices)
    if device == "cpu" or devices[device].match.vendor == "cpu":
        return _lent(_cpu_place(""), (), devices, first=device)
    return _named_place(device, devices, build, environ)


def refreshed(place: Place, sources: Sequence[Source] | None = None) -> Place:
    """The same place with what is free there now, as far as it can be read.

    What this process still holds there counts as free: a plan leases it first, as `runtime`, and would else pay twice.
    `sources` are the ways to read it, in the order in which they are tried; None: those of `place.watched`.
    """
    if sources is None:
        if place.kind == "card" and place.watched.vendor == "cpu":  # a card that is only thought of
            return place
        # Files before libraries: to end a session of amdsmi here may end the one that the memory guard reads with.
        sources = sources_for(place.watched)[::-1]
    for source in sources:
        try:
            reader = source.open()
        except ReadingFailed:
            continue
        try:
            reading = reader.read(0.0)
        except ReadingFailed:
            continue
        finally:
            reader.close()
        free = min(reading.total_bytes, reading.free_bytes + (reading.own_bytes or 0))
        return replace(place, free_bytes=free, total_bytes=reading.total_bytes)
    return place


def lent(place: Place, wanted: Wanted) -> Place:
    """The place with the reserve and the budget of `wanted`."""
    budget = wanted.vram_budget
    most = int(place.total_bytes * budget.fraction) if isinstance(budget, Share) else budget
    return replace(place, reserve_bytes=wanted.desktop_reserve_bytes, most_bytes=most)


def usable_cards(build: TorchBuild | None) -> tuple[Card, ...]:
    """The cards that the installed torch was built for."""
    if build is None:
        return ()
    if build.cuda is not None:
        return survey_nvidia().cards
    return survey_amd().cards if build.hip is not None else ()


def _named_place(
    device: str, devices: Mapping[str, Wanted], build: TorchBuild | None, environ: MutableMapping[str, str]
) -> Place:
    wanted = devices[device]
    found = survey_nvidia() if wanted.match.vendor == "nvidia" else survey_amd()
    card = _meant(wanted.match, found.cards)
    if card is None:
        seen = ", ".join(card.name for card in found.cards) or found.problem or "none"
        raise ConfigError([f"error: devices.{device}: no such card here (found: {seen}); use device: cpu or auto"])
    if not _drives(build, wanted.match.vendor):
        version = build.version if build else "missing"
        raise ConfigError([f"error: devices.{device}: the installed torch ({version}) was not built for this card"])
    if (lacking := _lacking_code(card, build, environ)) is not None:
        raise ConfigError([f"error: devices.{device}: the installed torch {lacking.reason}; {lacking.remedy}"])
    place = _card_place(card, found.cards, environ)
    if place is None:
        hidden = "the environment hides this card from torch (*_VISIBLE_DEVICES)"
        raise ConfigError([f"error: devices.{device}: {hidden}"])
    return _lent(place, found.cards, devices, first=device)


def _drives(build: TorchBuild | None, vendor: str) -> bool:
    # The order in which `usable_cards` decides: a build is for one vendor's cards.
    return build is not None and (build.cuda is not None if vendor == "nvidia" else not build.cuda and bool(build.hip))


def _lacking_code(card: Card, build: TorchBuild | None, environ: Mapping[str, str]) -> NoCode | None:
    target = driven_as(card.target, environ)
    return why_no_code(target, build.targets) if build is not None and target is not None else None


def _meant(match: Match, cards: Sequence[Card]) -> Card | None:
    """The card among its vendor's that is meant."""
    fitting = [
        card
        for card in cards
        if card.vendor == match.vendor and (match.name is None or match.name.lower() in card.name.lower())
    ]
    index = match.index or 0
    return fitting[index] if index < len(fitting) else None


def _lent(place: Place, cards: Sequence[Card], devices: Mapping[str, Wanted], first: str | None = None) -> Place:
    """The place with the reserve and the budget of the device that means it, `first` before all others."""
    ordered = [devices[first]] if first is not None and first in devices else []
    for wanted in (*ordered, *devices.values()):
        if place.kind == "cpu":
            means = wanted.match.vendor == "cpu"
        else:
            card = _meant(wanted.match, cards)
            means = card is not None and (card.vendor, card.pci_id) == (place.watched.vendor, place.watched.pci_id)
        if means:
            return lent(place, wanted)
    return place


def _last_unified(card: Card) -> bool:
    return card.unified


def _card_place(card: Card, cards: Sequence[Card], environ: MutableMapping[str, str]) -> Place | None:
    """The card as torch calls it; None where torch cannot see it. `cards` are all of its vendor's."""
    numbered = [Numbered(other.pci_id or str(other.index), other.name, other.uuid) for other in cards]
    settle_order(card.vendor, numbered, environ)
    number = torch_number(card.vendor, numbered, card.pci_id or str(card.index), environ)
    if number is None:
        return None
    return Place(
        "card",
        f"cuda:{number.number}",
        card.name,
        card.free_bytes,
        note=number.doubt,
        total_bytes=card.total_bytes,
        watched=Watched(card.vendor, card.pci_id),
        target=driven_as(card.target, environ),
    )


def _cpu_place(note: str) -> Place:
    memory = read_memory()
    return Place("cpu", "cpu", "CPU", memory.available_bytes, note, total_bytes=memory.total_bytes)


def _why_no_card(build: TorchBuild | None, cards: Sequence[Card], able: Sequence[Card]) -> str:
    """Why the model goes to the CPU: `able` are those of `cards` that the installed torch has code for."""
    if able:
        return f"{able[0].name} is idle: the environment hides it from torch"
    if cards and build is not None:
        return f"{cards[0].name} is idle: the installed torch ({build.version}) has no code for it (edgekv doctor)"
    if build is not None and build.cuda is None and build.hip is None:
        idle = (*survey_nvidia().cards, *survey_amd().cards)
        if idle:
            return f"{idle[0].name} is idle: the installed torch ({build.version}) is a CPU build"
    return ""
