"""A device's memory by owner, as a bar and a table. Runs in: anywhere; owns: nothing.

Each owner has a colour and a fill of its own, so that the bar can be read without colours too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from edgekv.config.units import format_size

LOOKS = {
    "runtime": ("blue", "▚"),
    "weights": ("cyan", "█"),
    "workspace": ("bright_blue", "▞"),
    "graphs": ("bright_black", "▤"),
    "libraries": ("blue", "▙"),
    "weights.draft": ("bright_cyan", "▥"),
    "workspace.draft": ("bright_blue", "▨"),
    "kv.draft": ("bright_green", "▦"),
    "kv.target": ("green", "▓"),
    "unleased": ("red", "▧"),
    "unused": ("white", "·"),
    "free": ("white", "·"),
    "withheld": ("white", "-"),
    "headroom": ("yellow", "░"),
    "others": ("magenta", "▒"),
}
UNKNOWN_LOOK = ("white", "?")
WIDEST_BAR = 100


@dataclass(frozen=True, slots=True)
class Owned:
    """What one owner has of the device. `name` chooses the look, `how` says more."""

    name: str
    num_bytes: int
    how: str = ""


def owner_bar(shares: Sequence[Owned], cells: int) -> Text:
    """One line of `cells`, divided as the bytes are; what is less than half a cell may get none."""
    total = sum(share.num_bytes for share in shares)
    bar = Text()
    done_bytes = done_cells = 0
    for share in shares:
        done_bytes += share.num_bytes
        until = round(cells * done_bytes / total) if total else 0
        colour, fill = LOOKS.get(share.name, UNKNOWN_LOOK)
        bar.append(fill * (until - done_cells), style=colour)
        done_cells = until
    return bar


def owner_table(shares: Sequence[Owned], total_bytes: int) -> Table:
    """Owner, bytes, size, share of the device and how; the fill of the bar in front."""
    made = Table(box=None, pad_edge=False, show_header=False)
    made.add_column(no_wrap=True)
    for _ in range(4):
        made.add_column(no_wrap=True, justify="right")
    made.columns[1].justify = "left"
    made.add_column(justify="left", overflow="fold")
    for share in shares:
        colour, fill = LOOKS.get(share.name, UNKNOWN_LOOK)
        part = f"{100 * share.num_bytes / total_bytes:.1f} %" if total_bytes else ""
        size = format_size(share.num_bytes)
        # As Text: a program's name may look like markup.
        made.add_row(Text(fill * 2, style=colour), share.name, f"{share.num_bytes:,}", size, part, Text(share.how))
    return made
