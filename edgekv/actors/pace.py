"""What a token costs and when a waiting sequence will start, from what the engine has done so far.

Runs in: anywhere; owns: the sums of the latest work.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from heapq import heappop, heappush

FORGET_S = 15.0
"""Work counts by a factor of e less for each so many seconds of later work."""
SAMPLE_S = 0.05
_PULL = 1e-3


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds that the server takes for a token of a prompt and for a generated one, all sequences together."""

    prompt_s: float
    generated_s: float


@dataclass(frozen=True, slots=True)
class Work:
    """Tokens that a sequence still has to compute and to generate."""

    prompt_tokens: float
    generated_tokens: float


class Pace:
    """Learns the cost of tokens from the engine's counters.

    Least squares over the steps, the latest counting most:

        seconds of a step = prompt_s * its prompt tokens + generated_s * its generated tokens

    drawn slightly to one cost for both, which decides what the steps do not tell apart. Then both are scaled to make up
    the time that really passed, so that an engine that stands still becomes dearer by the second.
    """

    def __init__(self) -> None:
        self._since: float | None = None  # the last sample, or the beginning of the work; None while there is none
        self._totals: tuple[int, int] | None = None  # the counters then: of prompt tokens, of generated ones
        self._standing_s = 0.0
        self._seconds = self._prompt = self._generated = 0.0
        self._prompt_prompt = self._prompt_generated = self._generated_generated = 0.0
        self._prompt_seconds = self._generated_seconds = 0.0

    def begin(self, now: float) -> None:
        """There is work, after there was none."""
        self._since = now

    def observe(self, now: float, prompt_tokens: int, generated_tokens: int) -> None:
        """The counters stand so after a step; any that has gone back is a new engine's."""
        if self._totals is None or prompt_tokens < self._totals[0] or generated_tokens < self._totals[1]:
            self._since = None
        if self._since is None or self._totals is None:
            self._since, self._totals = now, (prompt_tokens, generated_tokens)
        elif now - self._since >= SAMPLE_S:
            self._add(now - self._since, prompt_tokens - self._totals[0], generated_tokens - self._totals[1])
            self._since, self._totals = now, (prompt_tokens, generated_tokens)

    def pause(self) -> None:
        """There is no work: the time until it begins again does not count."""
        self._since = None
        self._standing_s = 0.0

    def cost(self, now: float) -> Cost | None:
        """As of now; None while no token has been seen to cost anything."""
        tokens = self._prompt + self._generated
        if not tokens:
            return None
        common = self._seconds / tokens
        # The normal equations, for how far each cost is from the common one.
        a = self._prompt_prompt * (1 + _PULL) or 1.0
        b = self._prompt_generated
        c = self._generated_generated * (1 + _PULL) or 1.0
        d = self._prompt_seconds - common * (self._prompt_prompt + b)
        e = self._generated_seconds - common * (b + self._generated_generated)
        determinant = a * c - b * b
        prompt_s = max(0.0, common + (d * c - e * b) / determinant)
        generated_s = max(0.0, common + (e * a - d * b) / determinant)
        explained = prompt_s * self._prompt + generated_s * self._generated
        if explained <= 0:
            return Cost(common, common)
        scale = (self._seconds + self._unseen_s(now)) / explained
        return Cost(prompt_s * scale, generated_s * scale)

    def standing_s(self, now: float) -> float:
        """For how long there has been work, and no token."""
        return self._standing_s + self._unseen_s(now)

    def _unseen_s(self, now: float) -> float:
        return max(0.0, now - self._since) if self._since is not None else 0.0

    def _add(self, seconds: float, prompt: int, generated: int) -> None:
        self._standing_s = 0.0 if prompt or generated else self._standing_s + seconds
        # However long it stood still, it is soon forgotten once it works again.
        seconds = min(seconds, FORGET_S)
        kept = math.exp(-seconds / FORGET_S)
        self._seconds = kept * self._seconds + seconds
        self._prompt = kept * self._prompt + prompt
        self._generated = kept * self._generated + generated
        self._prompt_prompt = kept * self._prompt_prompt + prompt * prompt
        self._prompt_generated = kept * self._prompt_generated + prompt * generated
        self._generated_generated = kept * self._generated_generated + generated * generated
        self._prompt_seconds = kept * self._prompt_seconds + prompt * seconds
        self._generated_seconds = kept * self._generated_seconds + generated * seconds


def starts(
    running: Iterable[Work], waiting: Iterable[Work], cost: Cost, slots: float, after_s: float = 0.0
) -> Iterator[float]:
    """Seconds until each of `waiting` starts, in order, where `slots` run at a time and each in turn gets a token.

    Nothing goes on before `after_s`.
    """
    elapsed_s = after_s
    round_number = 0.0
    last_rounds: list[float] = []  # a heap: the round in which each running one generates its last token
    for work in running:
        elapsed_s += work.prompt_tokens * cost.prompt_s
        heappush(last_rounds, work.generated_tokens)
    for work in waiting:
        while len(last_rounds) >= max(1, slots):
            num_running = len(last_rounds)
            last_round = heappop(last_rounds)
            elapsed_s += (last_round - round_number) * num_running * cost.generated_s
            round_number = last_round
        yield elapsed_s
        elapsed_s += work.prompt_tokens * cost.prompt_s
        heappush(last_rounds, round_number + work.generated_tokens)
