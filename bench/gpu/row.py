"""What one measurement found. Runs in: anywhere; owns: nothing."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of one call, a sample of each round."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """What it takes."""
        return statistics.median(self.samples)

    @property
    def p10(self) -> float:
        """The tenth percentile: what it takes when nothing disturbs it."""
        return sorted(self.samples)[len(self.samples) // 10]


@dataclass(frozen=True, slots=True)
class Target:
    """What a share has to be to be shipped, and what is aimed at; `is_most`: seconds, which may not be more."""

    ship: float
    aim: float
    is_most: bool = False

    def met(self, figure: float) -> str:
        """In a word."""
        if self.is_most:
            return "aim" if figure <= self.aim else "ship" if figure <= self.ship else "MISSED"
        return "aim" if figure >= self.aim else "ship" if figure >= self.ship else "MISSED"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    `share` is the figure that most targets speak of, and `of` says of what it is a share. `rate` says how much went by
    in a second. Where it could not be measured, `reason` says why, and there is no figure at all.
    """

    name: str
    times: Times | None = None
    rate: str = ""
    share: float | None = None
    of: str = ""
    target: Target | None = None
    note: str = ""
    reason: str = ""

    @property
    def met(self) -> str:
        """Whether the target was; empty where there is none, or nothing to hold against it."""
        if self.target is None or self.times is None:
            return ""
        figure = self.times.median if self.target.is_most else self.share
        return "" if figure is None else self.target.met(figure)

    def document(self, *, has_times: bool) -> dict[str, Any]:
        """For a JSON file; where times mean nothing, without any figure."""
        if self.reason or not has_times:
            return {"name": self.name} | ({"reason": self.reason} if self.reason else {})
        found: dict[str, Any] = {"name": self.name}
        if self.times is not None:
            found |= {"median_s": self.times.median, "p10_s": self.times.p10, "samples": len(self.times.samples)}
        for name in ("rate", "share", "of", "note", "met"):
            if getattr(self, name) not in ("", None):
                found[name] = getattr(self, name)
        if self.target is not None:
            found |= {"ship": self.target.ship, "aim": self.target.aim}
        return found


@dataclass(slots=True)
class Section:
    """Rows under one heading."""

    title: str
    rows: list[Row] = field(default_factory=list)


def of_bytes(num_bytes: float, seconds: float) -> str:
    """A rate of bytes."""
    return f"{num_bytes / seconds / 1e9:,.0f} GB/s"


def of_flops(flops: float, seconds: float) -> str:
    """A rate of arithmetic."""
    return f"{flops / seconds / 1e12:,.1f} TFLOP/s"


def ratio(slower: Times, faster: Times) -> float:
    """How many times as long the first takes."""
    return slower.median / faster.median


def best(times: Sequence[Times]) -> Times:
    """The one with the least median."""
    return min(times, key=lambda each: each.median)
