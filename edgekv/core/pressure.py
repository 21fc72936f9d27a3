"""When the KV pool gives memory back and when it takes some again: the policy, fed with readings only.

Runs in: anywhere; owns: the spill detector and what it remembers of others' use.

    budget = total - headroom - the most that others used in the last `patience`       (never more than what is allowed)

Others' room is never grown into: a pool grows only while the state is OK and only up to the budget. Whoever takes and
leaves memory in turns finds the pool more patient each time: `patience` starts at PATIENCE_S, doubles whenever a
growth was regretted, up to PATIENCE_MOST_S, and starts again after as long without pressure.
"""

from collections import deque
from dataclasses import dataclass

from edgekv.core.reading import Reading
from edgekv.core.spill import MIB, THRASH_WINDOW_S, Condition, Headroom, SpillDetector, State

PATIENCE_S = 10.0
PATIENCE_MOST_S = 600.0
SETTLE_S = 1.5  # freed memory takes 0.5 to 1.5 s to show in the counters
SETTLE_UNTOLD_S = 0.5  # as long as is believed in it where our own share is not told
FULL_BYTES = 32 * MIB
HASTE_S = 2.0  # longer than memory takes to show: another lack this soon is still the same one
FROZEN_S = 2.0  # a reading older than this allows no growth, and holds nothing up either
GIVE_UP_S = 30.0
THRASH_SHARE_GIVEN_BACK = 0.1
WATCHFUL_S = 0.1
CALM_S = 1.0


@dataclass(frozen=True, slots=True)
class PoolFacts:
    """What can be given back, as the engine last reported it. All are bytes but `num_resizes`.

    `kv` is the KV pool, and what a draft model has. `leased` is the sum of all leases, these among them. `segment` is
    the least that it grows by next. `ceiling` is the most that it may have, `floor` the least that it can be shrunk to
    (pinned prefixes stay). `given_back` and `taken` are totals since the engine started;
    `num_resizes` counts the resizes it has carried out.
    """

    kv_bytes: int
    leased_bytes: int
    segment_bytes: int
    ceiling_bytes: int
    floor_bytes: int
    given_back_bytes: int
    taken_bytes: int
    num_resizes: int


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do now. At most one of `shrink_bytes` and `grow_bytes` is above zero.

    `hold`: run no step until a later decision says otherwise. `unreturned_bytes` were given back longer than SETTLE_S
    ago and still show as ours in the reading. `patience_s` is how long others' use is remembered at present.
    """

    condition: Condition
    budget_bytes: int
    others_bytes: int
    others_peak_bytes: int
    hold: bool
    shrink_bytes: int = 0
    grow_bytes: int = 0
    unreturned_bytes: int = 0
    patience_s: float = PATIENCE_S
    next_poll_s: float = CALM_S


@dataclass(slots=True)
class _Return:
    """Memory given back: how much, when that was heard of, and what was ours and everybody's before it was ordered."""

    num_bytes: int
    at: float
    own_before: int
    used_before: int


class PressurePolicy:
    """Decides from each reading. One resize is under way at a time: none is asked for until the last was carried out.

    Args:
        headroom: what is left to others.
        most_bytes: the most that may be leased in all, whatever is free; None for no such limit.
    """

    def __init__(self, headroom: Headroom, most_bytes: int | None = None) -> None:
        self.headroom = headroom
        self.detector = SpillDetector(headroom)
        self.patience_s = PATIENCE_S
        self._most_bytes = most_bytes
        self._others: deque[tuple[float, int]] = deque()  # a falling maximum: (at, bytes), oldest and largest first
        self._facts: PoolFacts | None = None
        self._asked_after: int | None = None
        self._before: tuple[int, int] | None = None  # what was ours and everybody's when the last resize was ordered
        self._returns: list[_Return] = []
        self._own_bytes = self._used_bytes = 0
        self._unified = False
        self._haste = 1
        self._grown_at: float | None = None
        self._taken_at: float | None = None
        self._pressed_at: float | None = None
        self._refused_at: float | None = None
        self._asked_to_grow = False
        self._harmed_at: float | None = None
        self._thrashed_at: float | None = None
        self._stuck_since: float | None = None

    def observe(
        self, reading: Reading, facts: PoolFacts | None, *, busy: bool, now: float, starved: bool = False
    ) -> Decision:
        """What to do after `reading`. `facts`: None while no engine runs; `busy`: whether requests are open.

        `now` is the present on the reading's clock; a stale reading is older than that. `starved`: sequences wait and
        none runs; for them the pool grows also where it otherwise would not yet, though never into others' room.
        """
        if facts is not None:
            self._hear(facts, now)
        else:
            self._facts = None  # the next that is heard is of a new engine, which knows of no order
        leased = facts.leased_bytes if facts is not None else 0
        unseen = self._unseen(reading, now)
        condition = self.detector.observe(reading, unseen)
        fresh = not reading.stale
        others = reading.others_bytes(leased + (unseen if reading.own_bytes is None else 0))
        if fresh:
            self._remember(reading.at, others)
            ours = _ours(reading)
            self._own_bytes = leased if ours is None else ours
            self._used_bytes = reading.used_bytes
            self._unified = reading.unified
        peak = max((num_bytes for _, num_bytes in self._others), default=others)
        budget = max(0, reading.total_bytes - self.headroom.num_bytes - peak)
        if self._most_bytes is not None:
            budget = min(budget, self._most_bytes)
        shrink = grow = 0
        if facts is not None and fresh and not self._resizing(facts):
            shrink = self._shrink(reading, facts, condition, unseen, now)
            if not shrink:
                grow = self._grow(reading, facts, condition, budget, busy=busy, starved=starved)
        if shrink:
            self._note_pressure(condition, now)
        if shrink or grow:
            assert facts is not None
            self._asked_after = facts.num_resizes
            self._asked_to_grow = grow > 0
            self._before = (self._own_bytes, self._used_bytes)
        self._relax(now)
        calm = condition.state is State.OK and not condition.suspected_bytes and not (shrink or grow)
        quiet = calm and not busy and not self._returns and fresh
        return Decision(
            condition=condition,
            budget_bytes=budget,
            others_bytes=others,
            others_peak_bytes=peak,
            hold=self._holds(condition, facts, reading, now),
            shrink_bytes=shrink,
            grow_bytes=grow,
            unreturned_bytes=self._unreturned(reading, now) if fresh else 0,
            patience_s=self.patience_s,
            next_poll_s=CALM_S if quiet else WATCHFUL_S,
        )

    # ---- what has become of earlier decisions

    def _hear(self, facts: PoolFacts, now: float) -> None:
        before = self._facts
        self._facts = facts
        if before is None or facts.num_resizes < before.num_resizes:  # the first word of a new engine
            self._returns.clear()
            self._asked_after = self._grown_at = self._taken_at = self._refused_at = None
            self._before = None
            return
        given_back = facts.given_back_bytes - before.given_back_bytes
        if given_back > 0:
            # A reading may have shown it before the engine could say so.
            own_before, used_before = self._before or (self._own_bytes, self._used_bytes)
            self._returns.append(_Return(given_back, now, own_before, used_before))
            if self._before is None:
                self._refused_at = now  # nobody ordered it: a step found no memory where there was said to be some
            if self._unified and self.detector.condition.state is State.SPILLED:
                self.detector.forgive()  # room was made; what is swapped out comes back when it is touched, not before
        if facts.taken_bytes > before.taken_bytes:
            self._taken_at = now
            # Only what grows again after it had to shrink was grown too soon when it has to shrink once more.
            self._grown_at = now if self._pressed_at is not None else None
        elif self._asked_to_grow and facts.num_resizes > before.num_resizes:
            self._refused_at = now  # there was room on paper, but the device had it not
        if facts.num_resizes > before.num_resizes:
            self._before = None

    def _resizing(self, facts: PoolFacts) -> bool:
        return self._asked_after is not None and facts.num_resizes <= self._asked_after

    def _unseen(self, reading: Reading, now: float) -> int:
        """Bytes given back that `reading` cannot show yet."""
        ours = _ours(reading)
        settle_s = SETTLE_UNTOLD_S if ours is None else SETTLE_S
        recent = [back for back in self._returns if now - back.at < settle_s]
        if not recent:
            return 0
        given_back = sum(back.num_bytes for back in recent)
        if ours is None:
            missing = reading.used_bytes - (recent[0].used_before - given_back)
        else:
            missing = ours - (recent[0].own_before - given_back)
        return min(given_back, max(0, missing))

    def _unreturned(self, reading: Reading, now: float) -> int:
        """What of the bytes given back long enough ago still shows as ours; each return is looked at once."""
        old = [back for back in self._returns if now - back.at >= SETTLE_S]
        self._returns = [back for back in self._returns if now - back.at < SETTLE_S]
        ours = _ours(reading)
        if not old or ours is None or self._taken_since(old[0].at):
            return 0
        given_back = sum(back.num_bytes for back in (*old, *self._returns))
        return min(sum(b.num_bytes for b in old), max(0, ours - (old[0].own_before - given_back)))

    def _taken_since(self, at: float) -> bool:
        return self._taken_at is not None and self._taken_at >= at

    # ---- others

    def _remember(self, at: float, others_bytes: int) -> None:
        while self._others and self._others[-1][1] <= others_bytes:
            self._others.pop()
        self._others.append((at, others_bytes))
        while at - self._others[0][0] > self.patience_s:
            self._others.popleft()

    def _note_pressure(self, condition: Condition, now: float) -> None:
        if condition.state in (State.SPILLED, State.THRASH):
            self._harmed_at = now
        if self._grown_at is not None and now - self._grown_at < PATIENCE_MOST_S:
            self.patience_s = min(2 * self.patience_s, PATIENCE_MOST_S)
        self._grown_at = None
        self._pressed_at = now

    def _relax(self, now: float) -> None:
        if self._pressed_at is not None and now - self._pressed_at > PATIENCE_MOST_S:
            self.patience_s = PATIENCE_S
            self._pressed_at = None

    # ---- giving back and taking

    def _shrink(self, reading: Reading, facts: PoolFacts, condition: Condition, unseen: int, now: float) -> int:
        if facts.kv_bytes <= facts.floor_bytes:
            return 0
        free = reading.free_bytes + unseen
        # What does not fit shows as ours driven out of the card before it shows as anything else.
        missing = max(0, self.headroom.num_bytes - free + condition.suspected_bytes)
        wanted = missing * self._hasten(reading, now) if free < self.headroom.critical_bytes else 0
        if condition.state is State.SPILLED:
            # Until what was given back has settled, the spill that is still to be seen may have healed with it.
            wanted = max(wanted, condition.spilled_bytes - unseen, 0 if self._returns else 1)
        elif condition.state is State.THRASH and (
            self._thrashed_at is None or now - self._thrashed_at >= THRASH_WINDOW_S
        ):
            self._thrashed_at = now
            wanted = max(wanted, int(facts.kv_bytes * THRASH_SHARE_GIVEN_BACK), 1)
        return wanted

    def _hasten(self, reading: Reading, now: float) -> int:
        """Twice as much each time that it was not enough at once: a full card does not show how much more is wanted.

        Where there is something left, or what does not fit shows as spilled, the lack is known. Where our own share is
        not told, "not enough" may as well be "not visible yet".
        """
        hidden = reading.free_bytes < FULL_BYTES and not reading.spilled_own_bytes and reading.own_bytes is not None
        again = hidden and self._pressed_at is not None and now - self._pressed_at < HASTE_S
        self._haste = 2 * self._haste if again else 1
        return self._haste

    def _grow(
        self,
        reading: Reading,
        facts: PoolFacts,
        condition: Condition,
        budget_bytes: int,
        *,
        busy: bool,
        starved: bool,
    ) -> int:
        room_is_bad = condition.state is not State.OK and not (starved and condition.state is State.PRESSURE)
        if room_is_bad or condition.suspected_bytes or self._waits(reading.at):
            return 0
        # What is leased may not be allocated yet (workspace), and what is ours may be on no lease (a driver's context).
        own = max(facts.leased_bytes, reading.own_bytes or 0)
        room = min(budget_bytes - own, facts.ceiling_bytes - facts.kv_bytes)
        if room < facts.segment_bytes and facts.kv_bytes + room < facts.ceiling_bytes:
            return 0
        # One at a time beside running requests: clearing a new segment takes as long as several steps.
        return min(room, facts.segment_bytes * (1 if busy else 4)) if room > 0 else 0

    def _waits(self, at: float) -> bool:
        """Whether it is too soon to grow.

        The budget remembers by itself what others had. It does not remember that memory of ours went astray, or that a
        device had less than it said.
        """
        settle_s = SETTLE_S * self.patience_s / PATIENCE_S
        waits = ((self._pressed_at, settle_s), (self._harmed_at, self.patience_s), (self._refused_at, self.patience_s))
        return any(since is not None and at - since < wait_s for since, wait_s in waits)

    def _holds(self, condition: Condition, facts: PoolFacts | None, reading: Reading, now: float) -> bool:
        spilled = condition.state is State.SPILLED or condition.suspected_bytes > 0
        if not spilled or facts is None or now - reading.at > FROZEN_S:
            self._stuck_since = None
            return False
        if condition.state is not State.SPILLED or facts.kv_bytes > facts.floor_bytes:
            self._stuck_since = None
        elif self._stuck_since is None:
            self._stuck_since = now
        elif reading.unified or (now - self._stuck_since > GIVE_UP_S and reading.free_bytes >= self.headroom.num_bytes):
            # The pool has given all it can and there is room: what is spilled is something else, and stays so.
            self.detector.forgive()
            self._stuck_since = None
            return False
        return True


def _ours(reading: Reading) -> int | None:
    """Our own share, with what was driven out of a card: it is not on the card, and comes back unless it is freed."""
    if reading.own_bytes is None or reading.unified:
        return reading.own_bytes
    return reading.own_bytes + reading.spilled_own_bytes
