"""What the memory guard did and saw, in a person's words. Runs in: trio; owns: the latest events."""

import logging
from collections import deque
from collections.abc import Callable
from typing import Literal

from edgekv.actors.service import MemoryEvent
from edgekv.config.units import format_size
from edgekv.core.pressure import Decision, PoolFacts
from edgekv.core.spill import Condition, State

log = logging.getLogger(__name__)

MOST_EVENTS = 100
GROWN_S = 1.0
"""Segments taken within so many seconds of each other are one event."""

_HARMFUL = (State.SPILLED, State.THRASH)
_NO_CAUSE = "a step found no memory"


class MemoryLog:
    """Tells of what has changed since it last looked, once, to the log and to whoever asks for `events`.

    `clock` gives unix seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._events: deque[MemoryEvent] = deque(maxlen=MOST_EVENTS)
        self._facts: PoolFacts | None = None
        self._pool_tokens = 0
        self._state = State.OK
        self._others_bytes: int | None = None
        self._cause = _NO_CAUSE
        self._grown_bytes = 0
        self._grown_at = 0.0
        self._is_stale = False

    @property
    def events(self) -> tuple[MemoryEvent, ...]:
        """The latest last."""
        return tuple(self._events)

    def decided(self, decision: Decision, facts: PoolFacts | None, pool_tokens: int, now: float) -> None:
        """A fresh reading led to `decision`; what earlier ones led to shows in `facts`."""
        if facts is not None:
            self._tell_resizes(facts, pool_tokens, now)
        else:
            self._end_growth()
        self._facts = facts
        self._tell_state(decision.condition)
        if decision.unreturned_bytes:
            text = f"{format_size(decision.unreturned_bytes)} were given back and still show as ours"
            self._tell("unreturned", decision.unreturned_bytes, text, bad=True)
        if decision.shrink_bytes:
            self._cause = self._why(decision)
        if decision.shrink_bytes or decision.condition.state is State.OK or self._others_bytes is None:
            self._others_bytes = decision.others_bytes

    def aged(self, age_s: float, problem: str | None) -> None:
        """No reading has come for `age_s`, long enough to matter."""
        if not self._is_stale:
            self._is_stale = True
            why = f" ({problem})" if problem else ""
            text = f"last read {age_s:.1f} s ago{why}; the pool does not grow until it is read again"
            self._tell("stale", 0, text, bad=True)

    def freshened(self, source: str) -> None:
        """A reading has come."""
        if self._is_stale:
            self._is_stale = False
            self._tell("fresh", 0, f"read again, by {source}")

    def _tell_resizes(self, facts: PoolFacts, pool_tokens: int, now: float) -> None:
        before = self._facts
        if before is None or facts.num_resizes < before.num_resizes:
            self._pool_tokens = pool_tokens
            return
        given_back = facts.given_back_bytes - before.given_back_bytes
        taken = facts.taken_bytes - before.taken_bytes
        if given_back > 0:
            self._end_growth()
        self._pool_tokens = pool_tokens
        if given_back > 0:
            text = f"gave {format_size(given_back)} back: {self._cause}; {self._pool()}"
            self._tell("shrunk", given_back, text)
            self._cause = _NO_CAUSE
        if taken > 0:
            self._grown_bytes += taken
            self._grown_at = now
        elif self._grown_bytes and now - self._grown_at >= GROWN_S:
            self._end_growth()

    def _end_growth(self) -> None:
        if self._grown_bytes:
            size = format_size(self._grown_bytes)
            self._tell("grown", self._grown_bytes, f"took {size} that others left; {self._pool()}")
            self._grown_bytes = 0

    def _pool(self) -> str:
        return f"the pool has {self._pool_tokens:,} tokens now"

    def _why(self, decision: Decision) -> str:
        condition = decision.condition
        taken = decision.others_bytes - (self._others_bytes or 0)
        if condition.state in _HARMFUL or self._others_bytes is None or taken <= 0:
            return condition.reason
        return f"others took {format_size(taken)}"

    def _tell_state(self, condition: Condition) -> None:
        before, self._state = self._state, condition.state
        if condition.state is not before:
            bad = condition.state in _HARMFUL
            self._tell("state", condition.spilled_bytes, f"{condition.state.value}: {condition.reason}", bad=bad)

    def _tell(
        self,
        kind: Literal["shrunk", "grown", "state", "stale", "fresh", "unreturned"],
        num_bytes: int,
        detail: str,
        *,
        bad: bool = False,
    ) -> None:
        self._events.append(MemoryEvent(self._clock(), kind, num_bytes, detail))
        log.log(logging.WARNING if bad else logging.INFO, "memory: %s", detail)
