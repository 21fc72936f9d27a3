"""What the guard promises, measured on a history that was taken from outside the server.

Runs in: anywhere; owns: nothing.

    demand   what we may hold so that others' use leaves the critical headroom free; falls when others take memory
    lag      for each level that the demand falls to, how much later what we hold is there: the largest of all
    reversal growth that is given back within PATIENCE_S
    haste    growth within PATIENCE_S of giving back into room that others had meanwhile: not one that only takes back
             what was given back in excess
    reached  by how much a growth reached into the headroom, that is into others' room
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from bench.guard.truth import Truth
from edgekv.core.pressure import PATIENCE_S
from edgekv.core.spill import SPILL_BYTES, SPILL_S, Headroom

MIB = 1 << 20

PROMISED_LAG_S = 0.25
MOVE_BYTES = 8 * MIB  # less than half of any segment: what moves less is not the pool


@dataclass(frozen=True, slots=True)
class Step:
    """A forward pass, from when to when in seconds of the trace."""

    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Move:
    """What we hold grew, or, negative, shrank."""

    at: float
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Answers:
    """What became of the clients' requests.

    `lost`: admitted and not finished. `changed`: finished with another text than undisturbed. `refused`: told to come
    again later, and came. `longest_silence_s`: the longest that a client waited between two pieces of an answer.
    """

    finished: int = 0
    lost: int = 0
    changed: int = 0
    refused: int = 0
    tokens: int = 0
    longest_silence_s: float = 0.0
    faults: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Figures:
    """One played trace in numbers. Bytes and seconds; `share_of_ideal` is between 0 and 1.

    `longest_pause_s` is the longest time between two steps.
    `missed_s` is the longest time for which the player itself did not look: no figure can be finer than that.
    """

    steps: int
    longest_step_s: float
    spilled_steps: int
    spilled_bytes: int
    lag_s: float
    reversals: int
    reversals_allowed: int
    hasty_growths: int
    longest_pause_s: float
    reached_bytes: int
    denied_s: float
    share_of_ideal: float
    lowest_own: int
    highest_own: int
    missed_s: float = 0.0

    @property
    def lag_allowed_s(self) -> float:
        """The promise: a watch period and what belongs to it, and one step."""
        return PROMISED_LAG_S + self.longest_step_s


def measure(
    history: Sequence[Truth],
    steps: Sequence[Step],
    headroom: Headroom,
    *,
    longest_step_s: float,
    ceiling_bytes: int,
    floor_bytes: int,
    blind: Sequence[tuple[float, float]] = (),
) -> Figures:
    """The figures of a history, which has a sample every few hundredths of a second.

    `ceiling_bytes` and `floor_bytes` bound what the server may hold in all; nothing below the floor can be demanded.
    `blind`: from when to when nobody could read the device; a demand that arises then counts from its end.
    """
    changes = moves(history)
    spilled_steps, spilled_bytes = spilled_at_steps(history, steps)
    return Figures(
        steps=len(steps),
        longest_step_s=longest_step_s,
        spilled_steps=spilled_steps,
        spilled_bytes=spilled_bytes,
        lag_s=lag(history, headroom, floor_bytes=floor_bytes, blind=blind),
        reversals=reversals(changes),
        reversals_allowed=reversals_allowed(history[-1].at - history[0].at),
        hasty_growths=hasty(history, changes, headroom),
        longest_pause_s=max((after.start - before.end for before, after in pairwise(steps)), default=0.0),
        reached_bytes=reached(history, changes, headroom, within_s=PROMISED_LAG_S + longest_step_s),
        denied_s=sum(after.at - sample.at for sample, after in pairwise(history) if sample.denied),
        share_of_ideal=_share_of_ideal(history, ideal(history, headroom, ceiling_bytes, floor_bytes)),
        lowest_own=min(sample.own for sample in history),
        highest_own=max(sample.own for sample in history),
    )


def demand(sample: Truth, headroom: Headroom, floor_bytes: int = 0) -> int:
    """What we may hold at most for the critical headroom to be free."""
    return max(floor_bytes, sample.total - headroom.critical_bytes - sample.others)


def lag(
    history: Sequence[Truth],
    headroom: Headroom,
    *,
    floor_bytes: int = 0,
    blind: Sequence[tuple[float, float]] = (),
) -> float:
    """The largest time between a demand and what we hold being down to it, in seconds.

    A demand that is withdrawn before it is met ends there. One that is still unmet when the history ends counts as
    long as it was seen.
    """
    longest = 0.0
    allowed = [demand(sample, headroom, floor_bytes) for sample in history]
    for index, sample in enumerate(history):
        level = allowed[index]
        if sample.own <= level:
            continue
        since = next((end for start, end in blind if start <= sample.at < end), sample.at)
        met = next(
            (j for j in range(index, len(history)) if history[j].own <= level or history[j].own <= allowed[j]),
            len(history) - 1,
        )
        longest = max(longest, history[met].at - since)
    return longest


def moves(history: Sequence[Truth]) -> list[Move]:
    """Every change of what we hold that the pool made; changes of neighbouring samples in one direction are one."""
    found: list[Move] = []
    last_at = -math.inf
    for before, after in pairwise(history):
        num_bytes = after.own - before.own
        if abs(num_bytes) < MOVE_BYTES:
            continue
        if found and before.at <= last_at and (found[-1].num_bytes > 0) == (num_bytes > 0):
            found[-1] = Move(found[-1].at, found[-1].num_bytes + num_bytes)
        else:
            found.append(Move(after.at, num_bytes))
        last_at = after.at
    return found


def reversals(changes: Sequence[Move]) -> int:
    """Growths that were given back within PATIENCE_S."""
    return sum(
        before.num_bytes > 0 > after.num_bytes and after.at - before.at < PATIENCE_S
        for before, after in pairwise(changes)
    )


def hasty(history: Sequence[Truth], changes: Sequence[Move], headroom: Headroom) -> int:
    """Growths within PATIENCE_S of giving back that went into room which others had had meanwhile."""
    times = [sample.at for sample in history]
    count = 0
    for before, after in pairwise(changes):
        if not (before.num_bytes < 0 < after.num_bytes and after.at - before.at < PATIENCE_S):
            continue
        index = bisect_left(times, after.at)
        since = bisect_left(times, after.at - PATIENCE_S)
        most = max(sample.others for sample in history[since : index + 1])
        count += history[index].own > history[index].total - headroom.num_bytes - most
    return count


def reversals_allowed(duration_s: float) -> int:
    """How many reversals the worst of traces can force on a guard that is twice as patient after each.

    Others must be away for a whole patience before there is a growth to regret: the k-th needs PATIENCE_S · 2^(k-1)
    of calm before it, and all k of them PATIENCE_S · (2^k - 1) of the trace.
    """
    return int(math.log2(1 + duration_s / PATIENCE_S))


def reached(history: Sequence[Truth], changes: Sequence[Move], headroom: Headroom, *, within_s: float) -> int:
    """By how much the worst growth reached into the headroom.

    What others took in the `within_s` before is theirs to answer for: nobody could have known.
    """
    times = [sample.at for sample in history]
    worst = 0
    for change in changes:
        if change.num_bytes <= 0:
            continue
        index = bisect_left(times, change.at)
        before = history[max(0, bisect_right(times, change.at - within_s) - 1) : index + 1]
        surprise = history[index].others - min(sample.others for sample in before)
        worst = max(worst, headroom.num_bytes - history[index].free - surprise)
    return worst


def spilled_at_steps(history: Sequence[Truth], steps: Sequence[Step]) -> tuple[int, int]:
    """(steps that began while memory of ours was spilled, the most bytes that were).

    Spilled: more than SPILL_BYTES for longer than SPILL_S; before that it may be amdgpu restoring our buffers.
    """
    lasting = _lasting(history, lambda sample: sample.spilled, SPILL_S)
    times = [sample.at for sample in history]
    count = worst = 0
    for step in steps:
        num_bytes = lasting[max(0, bisect_right(times, step.start) - 1)]
        if num_bytes > SPILL_BYTES:
            count, worst = count + 1, max(worst, num_bytes)
    return count, worst


def ideal(history: Sequence[Truth], headroom: Headroom, ceiling_bytes: int, floor_bytes: int) -> list[int]:
    """What a guard would hold at each moment that knows everything and moves memory in no time."""
    return [
        max(floor_bytes, min(ceiling_bytes, sample.total - headroom.num_bytes - sample.wanted)) for sample in history
    ]


def _share_of_ideal(history: Sequence[Truth], wanted: Sequence[int]) -> float:
    shares = [min(sample.own, most) / most for sample, most in zip(history, wanted, strict=True) if most > 0]
    return sum(shares) / len(shares) if shares else 1.0


def _lasting(history: Sequence[Truth], value: Callable[[Truth], int], seconds: float) -> list[int]:
    """For each sample the least value within the `seconds` before it; 0 where the history does not go back as far."""
    least: list[int] = []
    start = 0
    for index, sample in enumerate(history):
        while start < index and history[start + 1].at <= sample.at - seconds:
            start += 1
        whole = history[start].at <= sample.at - seconds
        least.append(min(value(each) for each in history[start : index + 1]) if whole else 0)
    return least
