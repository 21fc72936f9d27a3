"""Lines that are too long for a terminal are broken between phrases. Runs in: anywhere; owns: nothing."""

import re

from rich.cells import cell_len

_AFTER_PHRASE = re.compile(r"(?<=[,;:]) ")


def wrap_phrases(line: str, width: int, indent: int) -> str:
    """A line as one or more of at most `width` cells: those after the first are indented.

    It is broken after commas, semicolons and colons; between words only where a phrase is too long for a line.
    """
    lines: list[str] = []
    current = ""
    for phrase in _AFTER_PHRASE.split(line):
        pieces = [phrase] if indent + cell_len(phrase) <= width else phrase.split(" ")
        for piece in pieces:
            longer = f"{current} {piece}" if current else piece
            if current.strip() and cell_len(longer) > width:
                lines.append(current)
                current = " " * indent + piece
            else:
                current = longer
    return "\n".join([*lines, current])
