"""The kernel's small files: one value or one table each, any of which may be odd, forbidden or gone by now.

Runs in: anywhere (a driver may block the read of its file); owns: nothing.
"""

import os
import re
from pathlib import Path

_MOST_BYTES = 1 << 16  # more than any such file holds; whoever finds a large one has the wrong file
_NUMBER = re.compile(rb"[0-9]{1,19}")  # 19 digits: at most 2^63, and never what `int` refuses


def read_bytes(path: str | Path) -> bytes | None:
    """The file's beginning; None where it cannot be read."""
    # Not Path.read_bytes: this is called for every descriptor at every poll, and takes a third of the time.
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return None
    try:
        parts = []
        room = _MOST_BYTES
        while room and (part := os.read(descriptor, room)):  # seq_files come in parts of a page
            parts.append(part)
            room -= len(part)
        return b"".join(parts)
    except OSError:
        return None
    finally:
        os.close(descriptor)


def read_line(path: str | Path) -> str | None:
    """The first line, stripped; None where there is none."""
    raw = read_bytes(path)
    lines = raw.decode("utf-8", "replace").splitlines() if raw else []
    return lines[0].strip() or None if lines else None


def read_number(path: str | Path) -> int | None:
    """The number that the file holds and nothing else; None for anything but a decimal number from zero up."""
    raw = read_bytes(path)
    return parse_number(raw) if raw is not None else None


def parse_number(raw: bytes) -> int | None:
    """A decimal number from zero up, with space around it; None for anything else."""
    raw = raw.strip()
    return int(raw) if _NUMBER.fullmatch(raw) else None


def parse_table(raw: bytes) -> dict[bytes, bytes]:
    """Lines of `name value` or `name: value`, the first of each name."""
    table: dict[bytes, bytes] = {}
    for line in raw.splitlines():
        name, _, value = line.replace(b":", b" ", 1).partition(b" ")
        table.setdefault(name.strip(), value.strip())
    return table


def list_folder(path: str | Path) -> list[str] | None:
    """The names in a folder, in no order; None where it cannot be read."""
    try:
        return os.listdir(path)
    except (OSError, ValueError):
        return None
