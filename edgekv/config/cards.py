"""The table of cards that memory can be planned for without having one. Runs in: anywhere; owns: nothing.

The table is `cards.yaml` beside this file.
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from typing import Literal

import yaml

from edgekv.config.units import GIB
from edgekv.errors import EdgeKVError

_BRANDS = frozenset({"nvidia", "amd", "geforce", "radeon", "rtx", "rx", "quadro", "graphics", "gpu", "tm"})
_PART = re.compile(r"[a-z]+|[0-9]+")
_SIZE = re.compile(r"\b[0-9]+ ?GB\b", re.IGNORECASE)
_CLOSE = 0.6


@dataclass(frozen=True, slots=True)
class KnownCard:
    """A card as its maker specifies it. `bandwidth` is in bytes a second; `unified`: its memory is the machine's."""

    name: str
    vendor: Literal["nvidia", "amd"]
    vram_bytes: int
    bandwidth: float
    source: str
    unified: bool = False


class UnknownCard(EdgeKVError):
    """No card, or more than one, goes by this name."""


def known_cards() -> tuple[KnownCard, ...]:
    """The whole table."""
    groups = yaml.safe_load((files("edgekv.config") / "cards.yaml").read_text(encoding="utf-8"))
    return tuple(
        KnownCard(
            name=entry["name"],
            vendor=group["vendor"],
            vram_bytes=entry["vram_gib"] * GIB,
            bandwidth=entry["bus_bits"] * entry["gbit_per_pin"] * 1e9 / 8,
            source=group["source"],
            unified=entry.get("unified", False),
        )
        for group in groups
        for entry in group["cards"]
    )


def find_card(name: str) -> KnownCard:
    """The card that a person means by "RX 7900 XTX", "7900xtx" or "GeForce RTX 4060 Ti 16GB". Raises UnknownCard."""
    cards, wanted = known_cards(), _telling(name)
    fitting = [card for card in cards if wanted and wanted <= _telling(card.name)]
    exact = [card for card in fitting if _telling(card.name) == wanted]
    if len(exact) == 1 or len(fitting) == 1:
        return (exact or fitting)[0]
    if fitting:
        raise UnknownCard(f"{name!r} may be any of {', '.join(card.name for card in fitting)}: say more of its name.")
    near = _near(name, cards)
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    raise UnknownCard(f"No card {name!r} is known{hint} Any other can be planned for by its memory: --vram 16GiB")


def live_card(name: str, total_bytes: int) -> KnownCard | None:
    """The entry of a card that a driver calls `name`; None where the table has none.

    Drivers call cards that come with more or less memory by one name, and these differ in bandwidth too: the entry is
    the one whose memory is nearest to `total_bytes`.
    """
    called = [card for card in known_cards() if _telling(_SIZE.sub("", card.name)) == _telling(_SIZE.sub("", name))]
    return min(called, key=lambda card: abs(card.vram_bytes - total_bytes), default=None)


def _telling(name: str) -> frozenset[str]:
    """The parts of a name without the brand: a driver says "NVIDIA GeForce RTX 4090", a person "4090"."""
    return frozenset(_words(name))


def _words(name: str) -> list[str]:
    return [part for part in _PART.findall(name.lower()) if part not in _BRANDS]


def _near(name: str, cards: Iterable[KnownCard]) -> list[str]:
    spelled = {" ".join(_words(card.name)): card.name for card in cards}
    return [spelled[key] for key in difflib.get_close_matches(" ".join(_words(name)), spelled, n=3, cutoff=_CLOSE)]
