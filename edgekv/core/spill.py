"""How the device's memory fares, told from readings alone, so that a recorded trace replays exactly.

Runs in: anywhere; owns: what it remembers of earlier readings.

    free memory   0 ......... R - w ........ R ........ R + w .........
                    CRITICAL       PRESSURE     PRESSURE    OK             R: headroom, w: half of the usual headroom
                                                (OK if it was OK)

SPILLED and THRASH come before these: they say that memory of ours is not where it should be, whatever is free.
"""

from collections import deque
from dataclasses import dataclass
from enum import StrEnum

from edgekv.core.capacity import headroom_bytes
from edgekv.core.reading import Reading

MIB = 1 << 20

SPILL_BYTES = 32 * MIB
SPILL_POLLS = 3
SPILL_S = 0.5  # three polls 250 ms apart: longer than one restore cycle of amdgpu
THRASH_WINDOW_S = 2.0
THRASH_SHARE = 0.05
MAJOR_FAULTS_PER_S = 200.0


class State(StrEnum):
    """How the device's memory fares, from good to bad."""

    OK = "ok"
    PRESSURE = "pressure"
    CRITICAL = "critical"
    THRASH = "thrash"
    SPILLED = "spilled"


@dataclass(frozen=True, slots=True)
class Headroom:
    """What is left to others and to surprises: `num_bytes` (R above), and how far from it the state changes (w)."""

    num_bytes: int
    width_bytes: int

    @classmethod
    def of(cls, total_bytes: int, reserve_bytes: int | None = None) -> "Headroom":
        """That of a device of `total_bytes`; `reserve_bytes` is what a person wants left free instead of the usual."""
        usual = headroom_bytes(total_bytes)
        wanted = usual if reserve_bytes is None else reserve_bytes
        return cls(wanted, min(wanted, usual) // 2)

    @property
    def critical_bytes(self) -> int:
        """With less free than this, memory has to be given back."""
        return self.num_bytes - self.width_bytes

    @property
    def calm_bytes(self) -> int:
        """With this much free, all is well again."""
        return self.num_bytes + self.width_bytes


@dataclass(frozen=True, slots=True)
class Condition:
    """The state, and why in words with numbers.

    `spilled_bytes` is what is spilled beyond doubt; `suspected_bytes` what this reading alone would call so.
    """

    state: State
    reason: str
    spilled_bytes: int = 0
    suspected_bytes: int = 0


class SpillDetector:
    """Turns readings, in the order of their times, into conditions. A stale reading changes nothing.

    `unseen_bytes` of `observe` is memory that has been given back and does not show in the reading yet.
    """

    def __init__(self, headroom: Headroom) -> None:
        self.headroom = headroom
        self._state = State.OK
        self._condition = Condition(State.OK, "nothing has been read yet")
        self._forgiven_bytes = 0
        self._over_since: float | None = None
        self._polls_over = 0
        self._past: deque[Reading] = deque()

    @property
    def condition(self) -> Condition:
        """The latest."""
        return self._condition

    def observe(self, reading: Reading, unseen_bytes: int = 0) -> Condition:
        """The condition after one more reading."""
        if reading.stale:
            return self._condition
        free = reading.free_bytes + unseen_bytes
        self._state = self._room(free)
        spilled = self._spill(reading)
        confirmed = (
            spilled > SPILL_BYTES
            and self._polls_over >= SPILL_POLLS
            and self._over_since is not None
            and reading.at - self._over_since >= SPILL_S
        )
        suspected = spilled if spilled > SPILL_BYTES else 0
        thrash = self._thrash(reading)
        where = "swap" if reading.unified else "system memory"
        if confirmed:
            reason = f"{_mib(spilled)} of ours are in {where}"
            self._condition = Condition(State.SPILLED, reason, spilled, suspected)
        elif thrash is not None:
            self._condition = Condition(State.THRASH, thrash, 0, suspected)
        else:
            reason = f"{_mib(free)} free, headroom {_mib(self.headroom.num_bytes)}"
            self._condition = Condition(self._state, reason, 0, suspected)
        return self._condition

    def forgive(self) -> None:
        """What is spilled now is not the KV pool's: only what comes on top of it counts from now on."""
        self._forgiven_bytes += self._condition.spilled_bytes
        self._over_since, self._polls_over = None, 0

    def _room(self, free_bytes: int) -> State:
        if free_bytes < self.headroom.critical_bytes:
            return State.CRITICAL
        if free_bytes >= self.headroom.calm_bytes:
            return State.OK
        if free_bytes < self.headroom.num_bytes:
            return State.PRESSURE
        return State.OK if self._state is State.OK else State.PRESSURE

    def _spill(self, reading: Reading) -> int:
        told = max(0, reading.spilled_own_bytes)
        if reading.unified and not self._past:
            # Pages that were swapped out long ago and are not missed do no harm: what counts is what comes on top.
            self._forgiven_bytes = told
        if reading.unified and reading.free_bytes >= self.headroom.calm_bytes:
            # With room for everything the kernel swaps out what nobody misses; what is missed shows as major faults.
            self._forgiven_bytes = told
        self._forgiven_bytes = min(self._forgiven_bytes, told)
        spilled = told - self._forgiven_bytes
        if spilled > SPILL_BYTES:
            self._polls_over += 1
            if self._over_since is None:
                self._over_since = reading.at
        else:
            self._over_since, self._polls_over = None, 0
        return spilled

    def _thrash(self, reading: Reading) -> str | None:
        past = self._past
        if past and reading.at <= past[-1].at:
            return None
        past.append(reading)
        while len(past) > 2 and reading.at - past[1].at >= THRASH_WINDOW_S:
            past.popleft()
        first = past[0]
        elapsed_s = reading.at - first.at
        if elapsed_s < THRASH_WINDOW_S:
            return None
        if reading.evicted_ms is not None and first.evicted_ms is not None:
            stopped_ms = reading.evicted_ms - first.evicted_ms
            if stopped_ms > THRASH_SHARE * 1000 * elapsed_s:
                return f"our queues were stopped for {stopped_ms} ms of the last {elapsed_s:.1f} s"
        if reading.major_faults is not None and first.major_faults is not None:
            per_s = (reading.major_faults - first.major_faults) / elapsed_s
            if per_s > MAJOR_FAULTS_PER_S:
                return f"{per_s:.0f} pages a second had to be read back from disk"
        return None


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / MIB:,.0f} MiB"
