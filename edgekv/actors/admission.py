"""Which requests are let in. Runs in: trio; owns: the claims of the open sequences and the measured rate.

Whether a sequence's blocks are there now is the engine's scheduler's to say; here is said what can never fit, and how
many sequences may wait.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import trio

from edgekv.actors.service import ModelCard
from edgekv.core.step import EngineStats
from edgekv.errors import QueueFull

RETRY_BOUNDS_S = (1.0, 600.0)
RATE_WINDOW_S = 30.0
RATE_SAMPLE_S = 0.25


@dataclass(frozen=True, slots=True)
class Claim:
    """What one sequence may come to need, in tokens of KV cache."""

    sequence_id: int
    prompt_tokens: int
    max_tokens: int

    @property
    def tokens(self) -> int:
        """Prompt and output together."""
        return self.prompt_tokens + self.max_tokens


class Rate:
    """Tokens per second over the last `RATE_WINDOW_S` in which there was work."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque()  # (time, tokens so far), oldest first
        self._before: float | None = None

    def observe(self, now: float, total_tokens: int) -> None:
        """The counter stood at `total_tokens`; one that has gone back is a new engine's."""
        samples = self._samples
        if samples and total_tokens < samples[-1][1]:
            self.pause()
        # The newest sample is replaced until it is far enough from the one before it.
        if len(samples) >= 2 and now - samples[-2][0] < RATE_SAMPLE_S:
            samples.pop()
        samples.append((now, total_tokens))
        while now - samples[0][0] > RATE_WINDOW_S and len(samples) > 2:
            samples.popleft()

    def pause(self) -> None:
        """There is no work: the time until the next sample does not count."""
        self._before = self.per_second(self._samples[-1][0]) if self._samples else self._before
        self._samples.clear()

    def per_second(self, now: float) -> float | None:
        """The rate up to `now`, or that before the latest pause while this one is too young; None if never measured."""
        if self._samples:
            (since, then), (_, latest) = self._samples[0], self._samples[-1]
            if now - since >= RATE_SAMPLE_S:
                return (latest - then) / (now - since)
        return self._before


class Admission:
    """Lets sequences in while no more than `max_queue` wait for their first step; each counts until it is released.

    Invariant: `_waiting` holds the ids of `_claims` that have not started.
    """

    def __init__(self, max_queue: int, clock: Callable[[], float] = trio.current_time) -> None:
        self._max_queue = max_queue
        self._clock = clock
        self._claims: dict[int, Claim] = {}
        self._waiting: set[int] = set()
        self._rate = Rate()

    @property
    def num_open(self) -> int:
        """Sequences admitted and not released."""
        return len(self._claims)

    @property
    def num_waiting(self) -> int:
        """Those of them that have not started."""
        return len(self._waiting)

    def admit(self, claims: Sequence[Claim], card: ModelCard, stats: EngineStats | None) -> None:
        """Let all in or none.

        Raises `ContextLengthExceeded` for what can never fit, `QueueFull` for what cannot wait here now. Whoever finds
        nobody waiting is let in, however many sequences it brings: otherwise it would be refused for ever.
        """
        for claim in claims:
            if claim.tokens > card.limit_tokens:
                raise card.exceeded(claim.prompt_tokens, claim.max_tokens)
        if self._waiting and len(self._waiting) + len(claims) > self._max_queue:
            pool = None if stats is None else stats.pool
            raise QueueFull(
                needed_tokens=sum(claim.tokens for claim in claims),
                free_tokens=0 if pool is None else (pool.free_blocks + pool.cached_blocks) * pool.block_size,
                retry_after_s=self._retry_after_s(),
            )
        for claim in claims:
            self._claims[claim.sequence_id] = claim
            self._waiting.add(claim.sequence_id)

    def started(self, sequence_id: int) -> None:
        """The sequence waits no longer. Unknown ids are ignored."""
        self._waiting.discard(sequence_id)

    def release(self, sequence_id: int) -> None:
        """The sequence has ended. Unknown ids are ignored."""
        self._waiting.discard(sequence_id)
        self._claims.pop(sequence_id, None)
        if not self._claims:
            self._rate.pause()

    def release_all(self, sequence_ids: Iterable[int]) -> None:
        """Undo an `admit` that came to nothing."""
        for sequence_id in sequence_ids:
            self.release(sequence_id)

    def observe(self, stats: EngineStats) -> None:
        """A step was done."""
        if self._claims:
            self._rate.observe(self._clock(), stats.computed_prompt_tokens + stats.generated_tokens)

    def _retry_after_s(self) -> float:
        """How long the queue as it is takes at the measured rate, if each of its sequences uses all it asked for."""
        least, most = RETRY_BOUNDS_S
        rate = self._rate.per_second(self._clock())
        if rate is None:
            return least
        queued_tokens = sum(self._claims[sequence_id].tokens for sequence_id in self._waiting)
        return most if rate * most <= queued_tokens else max(least, queued_tokens / rate)
