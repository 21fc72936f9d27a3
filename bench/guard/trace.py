"""A trace: what the other programs on a device did with its memory, and what its driver did. Format: bench/traces.

Runs in: anywhere; owns: nothing (frozen data).
"""

import json
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

MIB = 1 << 20

Vendor = Literal["nvidia", "amd", "amd-apu", "cpu"]
VENDORS: tuple[Vendor, ...] = get_args(Vendor)

DEFAULT_CLIENTS = 16
MOST_CLIENTS = 64
LONGEST_S = 24 * 3600.0
MOST_MIB = float(1 << 24)
FIELDS = ("name", "about", "vendor", "total_mib", "clients", "points")


class TraceError(Exception):
    """A trace that cannot be played: file, field and number."""


@dataclass(frozen=True, slots=True)
class Point:
    """What holds from `t` (seconds) until the next point. `ramp_s` and `hang_s` begin at `t` and are not held.

    `others_mib` is reached `ramp_s` after `t`, in a straight line. For `hang_s` seconds every call of the driver's
    library takes as long as is left of them.
    """

    t: float
    others_mib: float = 0.0
    gtt_mib: float = 0.0
    spill_mib: float = 0.0
    gone: bool = False
    ramp_s: float = 0.0
    hang_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Moment:
    """What a trace says of one moment. `others_bytes` is what other programs want, whether or not they get it."""

    others_bytes: int
    gtt_bytes: int
    spill_bytes: int
    hanging: bool
    gone: bool

    @property
    def blind(self) -> bool:
        """Whether nobody can know."""
        return self.hanging or self.gone


@dataclass(frozen=True, slots=True)
class Trace:
    """A whole trace; it ends at its last point. Invariant: the points' times rise, from 0."""

    name: str
    about: str
    vendor: Vendor
    total_mib: float
    clients: int
    points: tuple[Point, ...]

    @property
    def duration_s(self) -> float:
        """How long it plays."""
        return self.points[-1].t

    @property
    def total_bytes(self) -> int:
        """The device's memory."""
        return round(self.total_mib) * MIB

    def at(self, t: float) -> Moment:
        """What holds at `t` seconds; before the first point what it says, after the last what that says."""
        index = max(0, bisect_right(self.points, t, key=lambda point: point.t) - 1)
        point = self.points[index]
        others = point.others_mib
        if point.ramp_s > 0 and t < point.t + point.ramp_s:
            before = self.points[index - 1].others_mib if index else point.others_mib
            others = before + (point.others_mib - before) * max(0.0, t - point.t) / point.ramp_s
        return Moment(
            others_bytes=round(others * MIB),
            gtt_bytes=round(point.gtt_mib * MIB),
            spill_bytes=round(point.spill_mib * MIB),
            hanging=any(earlier.t <= t < earlier.t + earlier.hang_s for earlier in self.points[: index + 1]),
            gone=point.gone,
        )

    def gone_spells(self) -> list[tuple[float, float]]:
        """From when to when the driver is gone."""
        return _joined(
            (point.t, after.t) for point, after in pairwise(self.points) if point.gone
        )

    def blind_spells(self) -> list[tuple[float, float]]:
        """From when to when the driver hangs or is gone; spells that touch are one."""
        hangs = [(point.t, point.t + point.hang_s) for point in self.points if point.hang_s > 0]
        return _joined([*hangs, *self.gone_spells()])


def _joined(found: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    spells: list[tuple[float, float]] = []
    for start, end in sorted(found):
        if spells and start <= spells[-1][1]:
            spells[-1] = (spells[-1][0], max(spells[-1][1], end))
        else:
            spells.append((start, end))
    return spells


def load_trace(path: Path) -> Trace:
    """The trace in a file. Raises TraceError saying what is wrong where."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{path.name}: cannot be read: {error}") from None
    return parse_trace(text, path.stem, path.name)


def parse_trace(text: str, name: str, file: str) -> Trace:
    """The trace that `text` is; `name` is what it is called unless it says so itself."""
    try:
        document = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{file}: not JSON: {error}") from None
    fields = _Fields(file, "", document, FIELDS)
    vendor = fields.text("vendor", None)
    if vendor not in VENDORS:
        raise fields.wrong("vendor", f"expected one of {', '.join(VENDORS)}, not {vendor!r}")
    total_mib = fields.number("total_mib", None, least=64.0, most=MOST_MIB)
    clients = fields.number("clients", float(DEFAULT_CLIENTS), least=0.0, most=float(MOST_CLIENTS))
    if clients != int(clients):
        raise fields.wrong("clients", f"expected a whole number, not {clients}")
    return Trace(
        name=fields.text("name", name),
        about=fields.text("about", ""),
        vendor=vendor,
        total_mib=total_mib,
        clients=int(clients),
        points=tuple(_points(fields, vendor, total_mib)),
    )


def _points(fields: "_Fields", vendor: Vendor, total_mib: float) -> Iterator[Point]:
    listed = fields.take("points")
    if not isinstance(listed, list) or len(listed) < 2:
        raise fields.wrong("points", "expected a list of at least two points: where it begins and where it ends")
    held = Point(t=0.0)
    for index, item in enumerate(listed):
        point = _point(_Fields(fields.file, f"points[{index}]", item, Point.__slots__), held, vendor, total_mib)
        place = f"{fields.file}: points[{index}].t"
        if index == 0 and point.t != 0:
            raise TraceError(f"{place}: the first point is at 0, not {point.t:g}")
        if index and point.t <= held.t:
            raise TraceError(f"{place}: {point.t:g} is not after {held.t:g}, the point before it")
        if index and held.t + held.ramp_s > point.t:
            raise TraceError(f"{place}: {point.t:g} is within the ramp that began at {held.t:g}")
        held = point
        yield point


def _point(fields: "_Fields", held: Point, vendor: Vendor, total_mib: float) -> Point:
    point = Point(
        t=fields.number("t", None, most=LONGEST_S),
        others_mib=fields.number("others_mib", held.others_mib, most=MOST_MIB),
        gtt_mib=fields.number("gtt_mib", held.gtt_mib, most=MOST_MIB),
        spill_mib=fields.number("spill_mib", held.spill_mib, most=total_mib),
        gone=fields.flag("gone", held.gone),
        ramp_s=fields.number("ramp_s", 0.0, most=LONGEST_S),
        hang_s=fields.number("hang_s", 0.0, most=LONGEST_S),
    )
    if vendor == "nvidia" and point.spill_mib:
        raise fields.wrong("spill_mib", "NVIDIA's driver on Linux neither spills nor says so")
    if vendor not in ("amd", "amd-apu") and point.gtt_mib:
        raise fields.wrong("gtt_mib", f"there is no GTT on {vendor}")
    if vendor == "cpu" and (point.hang_s or point.gone):
        raise fields.wrong("hang_s" if point.hang_s else "gone", "main memory has no driver that could fail")
    return point


class _Fields:
    """One JSON object of a trace, read field by field."""

    def __init__(self, file: str, place: str, value: object, known: tuple[str, ...]) -> None:
        self.file, self._place = file, place
        if not isinstance(value, dict):
            raise TraceError(f"{file}: {place or 'the document'}: expected an object, not {_shown(value)}")
        for field in value:
            if field not in known:
                raise self.wrong(field, f"unknown; there are {', '.join(known)}")
        self._values: Mapping[str, Any] = value

    def wrong(self, field: str, what: str) -> TraceError:
        return TraceError(f"{self.file}: {f'{self._place}.' if self._place else ''}{field}: {what}")

    def take(self, field: str) -> object:
        if field not in self._values:
            raise self.wrong(field, "missing")
        return self._values[field]

    def number(self, field: str, default: float | None, *, least: float = 0.0, most: float) -> float:
        if default is not None and field not in self._values:
            return default
        value = self.take(field)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(field, f"expected a number, not {_shown(value)}")
        if not least <= value <= most:
            raise self.wrong(field, f"expected a number from {least:g} to {most:,.0f}, not {_shown(value)}")
        return float(value)

    def flag(self, field: str, default: bool) -> bool:
        value = self._values.get(field, default)
        if not isinstance(value, bool):
            raise self.wrong(field, f"expected true or false, not {_shown(value)}")
        return value

    def text(self, field: str, default: str | None) -> str:
        value = self.take(field) if default is None else self._values.get(field, default)
        if not isinstance(value, str) or len(value) > 1000:
            raise self.wrong(field, f"expected a text, not {_shown(value)}")
        return value


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}…"


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = next(name for name, _ in pairs if sum(other == name for other, _ in pairs) > 1)
        raise ValueError(f"{twice!r} is there twice in one object")
    return fields


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not a number")
