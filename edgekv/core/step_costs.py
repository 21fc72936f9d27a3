"""Seconds of a step by how many sequences and rows it has, as far as they were measured.

Runs in: engine thread; owns: what was measured.
"""

from bisect import bisect_left
from dataclasses import dataclass
from math import inf

# A measurement's share in the running mean of seconds: what others do to a machine makes steps longer, never shorter,
# so a short one says more. And how far above the mean one counts at all (a stall is not the step).
_SHARE_ABOVE, _SHARE_BELOW = 0.1, 0.5
MOST_TIMES_MEAN = 4.0
LEAST_S = 1e-7  # a clock may stand still, and everything is divided by this
_MOST_TIMES_GUESS = 2.0  # the first one against what was to be expected: should that be wrong, more will say so
# What a row more is taken to cost, as a share of a step, until it was measured.
_ASSUMED_ROW_SHARE = 0.05

# Steps without proposals before any with them, and again after so many with them, the first time after fewer: what they
# take may have changed. The last of a few in a row are measured, for the first finds the caches full of other things.
_PLAIN_IN_A_ROW = 3
_REFRESHED_AFTER = 128
_REFRESHED_FIRST = 4
# A machine that has become slower makes steps with proposals look bad beside what others took before: after some of
# them that took so much longer than usual the others are measured again, until these take what they usually take.
_SLOWER = 1.25
_SLOWER_IN_A_ROW = 3
_MOST_IN_DOUBT = 40


def running_mean(mean: float | None, seconds: float) -> float:
    """The mean with one measurement more."""
    if mean is None:
        return seconds
    share = _SHARE_BELOW if seconds < mean else _SHARE_ABOVE
    return mean + share * (min(seconds, MOST_TIMES_MEAN * mean) - mean)


class StepCosts:
    """Running means by number of sequences, and for each of those by rows; straight lines between them.

    Eight sequences of a row each and one with eight rows are different steps: what they share of the cache differs.
    """

    def __init__(self) -> None:
        self._by_size: dict[int, _Line] = {}

    def observe(self, sequences: int, rows: int, seconds: float) -> None:
        """A step of so many sequences and rows took so long."""
        seconds = max(seconds, LEAST_S)
        line = self._by_size.setdefault(sequences, _Line())
        if line.rows and rows not in line.seconds:
            seconds = min(seconds, _MOST_TIMES_GUESS * self.of(sequences, rows))
        line.observe(rows, seconds)

    def plain(self, sequences: int) -> float | None:
        """What a step of a row for each of so many sequences takes; None where there was none."""
        line = self._by_size.get(sequences)
        return None if line is None else line.seconds.get(sequences)

    def most_rows(self, sequences: int) -> int:
        """Of the largest step of so many sequences that was measured; 0 before any was."""
        line = self._by_size.get(sequences)
        return 0 if line is None else line.rows[-1]

    def of(self, sequences: int, rows: int) -> float:
        """What such a step takes, as far as can be told. Raises LookupError before any of so many sequences was seen.

        Where only one number of rows was seen, rows more cost what they do with the nearest number of sequences. No row
        costs more than one of a step without others: they share what is read.
        """
        line = self._by_size.get(sequences)
        if line is None:
            raise LookupError(f"no step of {sequences} sequences was measured")
        seconds, least = line.seconds[line.rows[0]], line.rows[0]
        if len(line.rows) > 1 or rows <= least:
            return min(line.of(rows), seconds * max(1.0, rows / least))
        known = [size for size, other in self._by_size.items() if len(other.rows) > 1]
        if not known:
            return seconds * (1 + _ASSUMED_ROW_SHARE * (rows - least))
        nearest = self._by_size[min(known, key=lambda size: (abs(size - sequences), size))]
        return seconds + nearest.slope * (rows - least)


class ProposingCosts:
    """Running means by number of sequences, and for each of those by tokens guessed for the one with the most.

    A guess has a price of its own, whatever its length; so two lengths say more than one.
    """

    def __init__(self) -> None:
        self._by_size: dict[int, _Line] = {}

    def observe(self, sequences: int, tokens: int, seconds: float) -> None:
        """To guess so many tokens for so many sequences took so long."""
        self._by_size.setdefault(sequences, _Line()).observe(tokens, seconds)

    def of(self, sequences: int, tokens: float) -> float:
        """What that takes, with so many sequences or the nearest number of them; 0 before anything was measured."""
        line = self._nearest(sequences)
        if line is None:
            return 0.0
        if len(line.rows) == 1:
            return line.seconds[line.rows[0]] * tokens / line.rows[0]
        return max(0.0, line.of(tokens))

    def more(self, sequences: int) -> float:
        """What one token more takes."""
        line = self._nearest(sequences)
        if line is None:
            return 0.0
        return line.slope if len(line.rows) > 1 else line.seconds[line.rows[0]] / line.rows[0]

    def _nearest(self, sequences: int) -> "_Line | None":
        if not self._by_size:
            return None
        return self._by_size[min(self._by_size, key=lambda size: (abs(size - sequences), size))]


@dataclass(slots=True)
class PlainSteps:
    """Steps without proposals: how many there were in a row, others since they were measured, and when that is due."""

    in_a_row: int = 0
    since: int = 0
    due_after: int = 0
    latest_s: float = inf
    """Of those in a row."""
    slower_in_a_row: int = 0
    """Steps with proposals that took longer than expected."""
    is_in_doubt: bool = False
    """Whether what was measured of them is no longer true."""

    @property
    def is_due(self) -> bool:
        """Whether the next steps are to be without proposals."""
        return self.is_in_doubt or self.since >= self.due_after

    def observe(self, seconds: float, mean_s: float | None) -> float | None:
        """There was one more, which took so long, where `mean_s` is usual.

        Answers what is to be measured, if anything is: the shorter of the last two.
        """
        self.in_a_row += 1
        # Everything is compared with it: were it a stall, whatever comes next would seem to gain.
        shorter_s, self.latest_s = min(seconds, self.latest_s), seconds
        if self.in_a_row < _PLAIN_IN_A_ROW:
            return None
        if self.since >= self.due_after:
            self.due_after = min(2 * self.due_after or _REFRESHED_FIRST, _REFRESHED_AFTER)
        self.since = 0
        is_usual = mean_s is None or shorter_s <= _SLOWER * mean_s
        self.is_in_doubt = self.is_in_doubt and not is_usual and self.in_a_row < _MOST_IN_DOUBT
        return shorter_s

    def interrupt(self, seconds: float, expected_s: float | None) -> None:
        """There was one with proposals, which took so long."""
        self.in_a_row, self.latest_s = 0, inf
        self.since += 1
        is_slower = expected_s is not None and seconds > _SLOWER * expected_s
        self.slower_in_a_row = self.slower_in_a_row + 1 if is_slower else 0
        if self.slower_in_a_row >= _SLOWER_IN_A_ROW:
            self.is_in_doubt, self.slower_in_a_row = True, 0


class _Line:
    """Running means of seconds by rows."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.seconds: dict[int, float] = {}

    def observe(self, rows: int, seconds: float) -> None:
        if rows not in self.seconds:
            self.rows.insert(bisect_left(self.rows, rows), rows)
        self.seconds[rows] = running_mean(self.seconds.get(rows), seconds)

    @property
    def slope(self) -> float:
        """Seconds of a row more, from the smallest step to the largest; never less than none."""
        first, last = self.rows[0], self.rows[-1]
        return max(0.0, (self.seconds[last] - self.seconds[first]) / (last - first))

    def of(self, rows: float) -> float:
        above = bisect_left(self.rows, rows)
        if above < len(self.rows):
            # No step takes longer than a larger one: what is longer was disturbed.
            least = min(self.seconds[known] for known in self.rows[above:])
            if above == 0 or rows == self.rows[above]:
                return least
            return min(least, self._between(self.rows[above - 1], self.rows[above], rows))
        last = self.rows[-1]
        return self.seconds[last] + self.slope * (rows - last)

    def _between(self, one: int, other: int, rows: float) -> float:
        share = (rows - one) / (other - one)
        return self.seconds[one] + share * (self.seconds[other] - self.seconds[one])
