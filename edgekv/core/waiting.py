"""Who waits for blocks, and whose turn it is.

Runs in: engine thread; owns: the queues of waiting sequences.

Between priorities turns are shared by weight (stride scheduling, Waldspurger and Weihl 1995): every line has a `due`,
the least is served next and becomes later by 1 / weight. With weights 10 and 1, under a constant stream of both, every
eleventh that starts is one of the second line. Exact fractions and no clock: the same arrivals give the same order.

Within a line: priority, then preempted ones, then arrival.
"""

import heapq
from bisect import insort
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from edgekv.core.sequence import Sequence, Stage


@dataclass(slots=True)
class _Line:
    """The waiting sequences of one weight."""

    stride: Fraction
    due: Fraction = Fraction(0)
    sequences: list[Sequence] = field(default_factory=list)


class WaitingLines:
    """All waiting sequences.

    Args:
        weights: a line's weight by its priority; whoever has another priority joins the nearest line (of two equally
            near ones the more urgent). With none there is one line, in which priority alone decides.
    """

    def __init__(self, weights: Mapping[int, int]) -> None:
        if any(weight < 1 for weight in weights.values()):
            raise ValueError(f"weights must be at least 1: {dict(weights)}")
        self._lines = {level: _Line(Fraction(1, weight)) for level, weight in (weights or {0: 1}).items()}
        self._now = Fraction(0)

    def __len__(self) -> int:
        return sum(len(line.sequences) for line in self._lines.values())

    def __iter__(self) -> Iterator[Sequence]:
        for level in sorted(self._lines):
            yield from self._lines[level].sequences

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait, for the first time or again."""
        insort(self._line(sequence).sequences, sequence, key=rank)

    def remove(self, sequence: Sequence) -> None:
        """It waits no more, and was not served."""
        self._line(sequence).sequences.remove(sequence)

    def serve(self, sequence: Sequence) -> None:
        """It has its turn. That of a preempted sequence was paid for when it first started."""
        line = self._line(sequence)
        line.sequences.remove(sequence)
        # A line in which nobody waited, or nobody could be served, has one turn at once and not all that it missed.
        self._now = line.due = max(self._now, line.due)
        if sequence.stage is not Stage.PREEMPTED:
            line.due += line.stride

    def turns(self) -> Iterator[Sequence]:
        """Whose turn it is, again and again: one that was not served or removed meanwhile has been passed over."""
        heads = [(line.due, level, iter(tuple(line.sequences))) for level, line in self._lines.items()]
        heapq.heapify(heads)
        while heads:
            _, level, rest = heads[0]
            sequence = next(rest, None)
            if sequence is None:
                heapq.heappop(heads)
                continue
            yield sequence
            heapq.heapreplace(heads, (self._lines[level].due, level, rest))

    def check_integrity(self) -> None:
        """Raise AssertionError where the order is not kept."""
        for line in self._lines.values():
            ranks = [rank(sequence) for sequence in line.sequences]
            assert ranks == sorted(ranks), "a line is out of order"

    def _line(self, sequence: Sequence) -> _Line:
        priority = sequence.spec.priority
        return self._lines[min(self._lines, key=lambda level: (abs(level - priority), level))]


def rank(sequence: Sequence) -> tuple[int, bool, int]:
    """The order of service within a line: priority, then preempted ones, then arrival."""
    return sequence.spec.priority, sequence.stage is not Stage.PREEMPTED, sequence.arrival
