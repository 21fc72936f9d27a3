"""Which number torch gives a card (`cuda:N`), worked out without torch. Runs in: anywhere; owns: nothing.

CUDA counts the cards from the fastest on, unless CUDA_DEVICE_ORDER=PCI_BUS_ID says by PCI address; HIP counts them in
the order of KFD's topology. Either then counts only what the *_VISIBLE_DEVICES variables name, in the order they name
it. What cannot be known: how CUDA ranks cards of different kinds (`settle_order` takes that question away before CUDA
starts, where it may); parts of a card (MIG) as devices; and torch itself can be told otherwise until the engine runs,
so who opens the device should hold its PCI address against the one that is watched.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass

_ORDER = "CUDA_DEVICE_ORDER"
_VISIBLE = {
    "nvidia": ("CUDA_VISIBLE_DEVICES",),
    # The runtime below HIP hides first; of HIP's two names its own goes first.
    "amd": ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES|CUDA_VISIBLE_DEVICES"),
}


@dataclass(frozen=True, slots=True)
class Numbered:
    """A card as the order is worked out from: `uuid` is how the variables may name it, where it is known."""

    pci_id: str
    kind: str
    uuid: str | None = None


@dataclass(frozen=True, slots=True)
class TorchNumber:
    """The number, and in `doubt` what it would take to be sure of it ("" where it is sure)."""

    number: int
    doubt: str = ""


def settle_order(vendor: str, cards: Sequence[Numbered], environ: MutableMapping[str, str]) -> None:
    """Have CUDA count by PCI address where cards differ and nobody has said anything about their order.

    Not where CUDA_VISIBLE_DEVICES counts cards: its numbers were meant in the order that CUDA would have.
    """
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    counts = visible is not None and any(part.strip().isdecimal() for part in visible.split(","))
    if vendor == "nvidia" and len({card.kind for card in cards}) > 1 and not counts:
        environ.setdefault(_ORDER, "PCI_BUS_ID")


def torch_number(vendor: str, cards: Sequence[Numbered], pci_id: str, environ: Mapping[str, str]) -> TorchNumber | None:
    """The number of the card at `pci_id` among `cards` (in the driver's order); None where torch does not see it."""
    doubt = ""
    if vendor == "nvidia" and environ.get(_ORDER) != "PCI_BUS_ID" and len({card.kind for card in cards}) > 1:
        doubt = "which of the cards torch takes is not sure: set CUDA_DEVICE_ORDER=PCI_BUS_ID"
    seen = list(cards)
    for names in _VISIBLE.get(vendor, ()):
        # Set to nothing hides every card; the first variable that is set counts.
        value = next((environ[name] for name in names.split("|") if name in environ), None)
        if value is not None:
            seen = _visible(seen, value)
    for number, card in enumerate(seen):
        if card.pci_id == pci_id:
            return TorchNumber(number, doubt)
    return None


def _visible(cards: list[Numbered], value: str) -> list[Numbered]:
    """The cards that a list of numbers and (beginnings of) UUIDs names, up to the first that names none."""
    seen: list[Numbered] = []
    for part in (part.strip() for part in value.split(",")):
        if part.isdecimal():
            named = cards[int(part) : int(part) + 1]
        else:
            named = [card for card in cards if part and card.uuid is not None and card.uuid.startswith(part)]
        if len(named) != 1 or named[0] in seen:
            break
        seen.extend(named)
    return seen
