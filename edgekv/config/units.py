"""Sizes, shares and durations as people write them. Runs in: anywhere; owns: nothing."""

import re
from dataclasses import dataclass

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

_SIZE_UNITS = {
    "b": 1, "kib": KIB, "mib": MIB, "gib": GIB, "tib": 1 << 40,
    "kb": 1000, "mb": 1000**2, "gb": 1000**3, "tb": 1000**4,
}  # fmt: skip
_DURATION_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_NUMBER_UNIT = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z%]+)")


@dataclass(frozen=True, slots=True)
class Share:
    """A part of whatever there is, between 0 and 1."""

    fraction: float


def parse_size(text: object) -> int:
    """Bytes of "768MiB", "16 GiB" or "500MB" (decimal); ValueError says what is expected."""
    match = _NUMBER_UNIT.fullmatch(text.strip()) if isinstance(text, str) else None
    unit = _SIZE_UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise ValueError(f"expected a size with its unit such as '768MiB' or '16GiB', not {text!r}")
    return round(float(match[1]) * unit)


def parse_share(text: object) -> Share:
    """The share "94%" names; ValueError when it is not a percentage in (0, 100]."""
    match = _NUMBER_UNIT.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None or match[2] != "%" or not 0 < float(match[1]) <= 100:
        raise ValueError(f"expected a percentage between 0% and 100%, not {text!r}")
    return Share(float(match[1]) / 100)


def parse_size_or_share(text: object) -> int | Share:
    """A size in bytes or a share."""
    if isinstance(text, str) and text.strip().endswith("%"):
        return parse_share(text)
    try:
        return parse_size(text)
    except ValueError:
        raise ValueError(f"expected a size such as '16GiB' or a share such as '90%', not {text!r}") from None


def parse_duration(text: object) -> float:
    """Seconds of "250ms", "5s", "10m" or "2h"; ValueError says what is expected."""
    match = _NUMBER_UNIT.fullmatch(text.strip()) if isinstance(text, str) else None
    unit = _DURATION_UNITS.get(match[2]) if match else None
    if match is None or unit is None:
        raise ValueError(f"expected a duration with its unit such as '5s' or '10m', not {text!r}")
    return float(match[1]) * unit


def setting_size(num_bytes: int) -> str:
    """The most that a setting can ask for within `num_bytes`, to two places: `3.59GiB`."""
    for name, unit in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if num_bytes >= unit:
            return f"{num_bytes * 100 // unit / 100:.2f}".rstrip("0").rstrip(".") + name
    return f"{num_bytes}B"


def format_size(num_bytes: float) -> str:
    """Bytes in the largest binary unit that leaves at least one: `1.50 GiB`."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.2f} {unit}"
        size /= 1024
    return f"{size:,.2f} TiB"
