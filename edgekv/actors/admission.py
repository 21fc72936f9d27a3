"""Which requests are let in. Runs in: trio; owns: the claims of the open sequences and the measured pace.

Whether a sequence's blocks are there now is the engine's scheduler's to say. Here is said what can never fit, what does
not fit a pool that was shrunk for other programs, and who would wait longer than is worth waiting.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import trio

from edgekv.actors.pace import Pace, Work, starts
from edgekv.actors.service import MemoryView, ModelCard
from edgekv.actors.stream import Failed
from edgekv.config.units import format_size
from edgekv.core.pressure import PATIENCE_S
from edgekv.core.step import EngineStats, StepReport
from edgekv.errors import QueueFull

RETRY_BOUNDS_S = (1.0, 600.0)
USED_WEIGHT = 0.1


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """How many sequences may wait for their first step, and how long, in seconds by priority.

    A priority that is not named has the limit of the nearest one that is; without any there is none.
    """

    max_queue: int
    max_wait_s: Mapping[int, float] = field(default_factory=dict)

    def wait_s(self, priority: int) -> float:
        """How long a sequence of this priority may wait."""
        if not self.max_wait_s:
            return float("inf")
        return self.max_wait_s[min(self.max_wait_s, key=lambda named: (abs(named - priority), named))]


@dataclass(frozen=True, slots=True)
class Claim:
    """What one sequence may come to need, in tokens of KV cache. `priority`: lower goes first."""

    sequence_id: int
    prompt_tokens: int
    max_tokens: int
    priority: int = 0

    @property
    def tokens(self) -> int:
        """Prompt and output together."""
        return self.prompt_tokens + self.max_tokens


@dataclass(slots=True)
class _Open:
    """A claim that was let in: until when it may wait, and how far it has come."""

    claim: Claim
    deadline: float
    prompt_left: int
    generated: int = 0


class Admission:
    """Lets sequences in while they can be expected to start in time; each counts until it is released.

    Invariant: `_waiting` holds the ids of `_open` that have not started, `_timed` those of them that may yet start.
    """

    def __init__(self, limits: AdmissionLimits, clock: Callable[[], float] = trio.current_time) -> None:
        self._limits = limits
        self._clock = clock
        self._open: dict[int, _Open] = {}
        self._waiting: set[int] = set()
        self._timed: set[int] = set()
        self._pace = Pace()
        self._slots = float("inf")  # how many run at a time; until some had to wait, any number may
        self._used = 1.0  # the part of its max_tokens that a sequence has generated of late
        self._num_ended = 0

    @property
    def num_open(self) -> int:
        """Sequences admitted and not released."""
        return len(self._open)

    @property
    def num_waiting(self) -> int:
        """Those of them that have not started."""
        return len(self._waiting)

    def admit(
        self,
        claims: Sequence[Claim],
        card: ModelCard,
        stats: EngineStats | None,
        view: MemoryView | None = None,
    ) -> None:
        """Let all in or none.

        Raises `ContextLengthExceeded` for what can never fit, `QueueFull` for what cannot start here soon enough.
        Whoever finds nobody waiting in its way is let in, however many sequences it brings: otherwise it would be
        refused for ever.
        """
        for claim in claims:
            if claim.tokens > card.limit_tokens:
                raise card.exceeded(claim.prompt_tokens, claim.max_tokens)
        for claim in claims:
            if claim.tokens > card.present_tokens:
                raise _shrunk(claims, card, stats, view)
        self._check_line(claims, stats)
        now = self._clock()
        if not self._open:
            self._pace.begin(now)
        for claim in claims:
            deadline = now + self._limits.wait_s(claim.priority)
            self._open[claim.sequence_id] = _Open(claim, deadline, claim.prompt_tokens)
            self._waiting.add(claim.sequence_id)
            self._timed.add(claim.sequence_id)

    def started(self, sequence_id: int) -> None:
        """The sequence waits no longer. Unknown ids are ignored."""
        self._waiting.discard(sequence_id)
        self._timed.discard(sequence_id)

    def release(self, sequence_id: int) -> None:
        """The sequence has ended. Unknown ids are ignored."""
        gone = self._open.pop(sequence_id, None)
        if gone is not None and sequence_id not in self._waiting:
            used = gone.generated / gone.claim.max_tokens if gone.claim.max_tokens else 1.0
            self._num_ended += 1
            self._used += max(USED_WEIGHT, 1 / (1 + self._num_ended)) * (used - self._used)
        self.started(sequence_id)
        if not self._open:
            self._pace.pause()

    def release_all(self, sequence_ids: Iterable[int]) -> None:
        """Undo an `admit` that came to nothing."""
        for sequence_id in sequence_ids:
            self.release(sequence_id)

    def observe(self, report: StepReport) -> None:
        """A step was done."""
        stats = report.stats
        ran = stats.running + len(report.finished)
        # Who waits in the engine while others run waits for one of them to end.
        self._slots = ran if stats.waiting else max(self._slots, ran)
        for started in report.started:
            if (entry := self._open.get(started.sequence_id)) is not None:
                entry.prompt_left -= started.cached_tokens
        for out in report.tokens:
            if (entry := self._open.get(out.sequence_id)) is not None:
                entry.prompt_left = 0
                entry.generated += 1
        if self._open:
            self._pace.observe(self._clock(), stats.computed_prompt_tokens, stats.generated_tokens)

    # ---- those who have waited too long

    @property
    def next_deadline(self) -> float:
        """When the next of those who wait will have waited too long."""
        return min((self._open[sequence_id].deadline for sequence_id in self._timed), default=float("inf"))

    def take_overdue(self) -> list[tuple[int, Failed]]:
        """Who has waited too long by now, each named once, with what it is to be told."""
        now = self._clock()
        overdue = [self._open[sequence_id] for sequence_id in self._timed if self._open[sequence_id].deadline <= now]
        overdue.sort(key=lambda entry: entry.claim.sequence_id)
        self._timed.difference_update(entry.claim.sequence_id for entry in overdue)
        return [(entry.claim.sequence_id, self._too_late(entry.claim)) for entry in overdue]

    def _too_late(self, claim: Claim) -> Failed:
        waited_s = self._limits.wait_s(claim.priority)
        # It was in this queue itself, so the next of its kind stands where the last of the others does.
        _, retry_s = self._forecast([claim], waited_s, beside=claim.sequence_id)
        retry_s = _bounded(retry_s or PATIENCE_S)
        return Failed(
            "kv_cache_full",
            f"This request has waited {waited_s:,.0f} s for {claim.tokens:,} tokens of KV cache and could not start. "
            f"Try again in {math.ceil(retry_s)} s.",
            retry_s,
        )

    # ---- the queue

    def _check_line(self, claims: Sequence[Claim], stats: EngineStats | None) -> None:
        wait_s = min(self._limits.wait_s(claim.priority) for claim in claims)
        start_s, late_s = self._forecast(claims, wait_s)
        too_many = len(self._waiting) + len(claims) - self._limits.max_queue
        if self._waiting and too_many > 0:
            times = list(self._starts(self._line()))
            shorter_s = times[min(too_many, len(times)) - 1] if times else 0.0
            raise _full(claims, stats, max(shorter_s, late_s))
        if start_s > wait_s:
            reason = f"It would be about {start_s:,.0f} s until this request starts, and it may wait {wait_s:,.0f} s"
            raise _full(claims, stats, late_s, reason)

    def _forecast(self, claims: Sequence[Claim], wait_s: float, *, beside: int | None = None) -> tuple[float, float]:
        """When the last of `claims` starts, and when they could be let in; 0 where nobody is in their way."""
        priority = max(claim.priority for claim in claims)
        ahead = [
            entry for entry in self._line() if entry.claim.priority <= priority and entry.claim.sequence_id != beside
        ]
        times = list(self._starts(ahead, claims)) if ahead else []
        if not times:
            return 0.0, 0.0
        # Once all of those have started, nobody is in the way.
        return times[-1], min(times[len(ahead) - 1], max(0.0, times[-1] - wait_s))

    def _line(self) -> list[_Open]:
        """Who waits, in the order in which they will start."""
        return sorted((self._open[i] for i in self._waiting), key=lambda e: (e.claim.priority, e.claim.sequence_id))

    def _starts(self, line: Iterable[_Open], claims: Iterable[Claim] = ()) -> Iterator[float]:
        """Seconds until each of the line starts, then each of `claims`; nothing where the pace is not known."""
        now = self._clock()
        cost = self._pace.cost(now)
        if cost is None:
            return iter(())
        running = [self._left(entry) for number, entry in self._open.items() if number not in self._waiting]
        behind = (Work(claim.prompt_tokens, self._used * claim.max_tokens) for claim in claims)
        # Where nothing runs although somebody waits, it will take as long again as it has.
        after_s = 0.0 if running else self._pace.standing_s(now)
        return starts(running, chain(map(self._left, line), behind), cost, self._slots, after_s)

    def _left(self, entry: _Open) -> Work:
        most = entry.claim.max_tokens
        # One that has gone on for longer than most do may well go on for longer still.
        tokens = max(self._used * most - entry.generated, self._used * (most - entry.generated) / 2)
        return Work(max(0, entry.prompt_left), tokens)


def _full(
    claims: Sequence[Claim], stats: EngineStats | None, retry_s: float, reason: str = "The queue is full"
) -> QueueFull:
    pool = None if stats is None else stats.pool
    free_tokens = 0 if pool is None else (pool.free_blocks + pool.cached_blocks) * pool.block_size
    return QueueFull(sum(claim.tokens for claim in claims), free_tokens, _bounded(retry_s), reason)


def _shrunk(claims: Sequence[Claim], card: ModelCard, stats: EngineStats | None, view: MemoryView | None) -> QueueFull:
    """The refusal of what fits the pool, but not while others have the memory of a part of it."""
    decision = None if view is None else view.decision
    whose = "" if decision is None else f" while other programs hold {format_size(decision.others_bytes)} of the device"
    reason = f"The KV cache is down to {card.pool_tokens:,} of {card.largest_pool_tokens:,} tokens{whose}"
    return _full(claims, stats, PATIENCE_S if decision is None else decision.patience_s, reason)


def _bounded(retry_s: float) -> float:
    least, most = RETRY_BOUNDS_S
    return min(most, max(least, retry_s))
