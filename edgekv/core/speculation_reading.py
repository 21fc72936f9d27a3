"""When it is worth reading a sequence for a draft model. Runs in: engine thread; owns: what reading took.

A draft model has to read what it has not seen of a sequence before it can propose for it. That pays if the sequence
goes on for long enough, which nobody knows. So it is read once the sequence has said so much that the same again would
save what reading takes: then no more is lost on one that ends there than was there to be gained.
"""

from collections.abc import Callable, Iterable, Mapping
from math import inf

from edgekv.core.speculation_accounts import ReadingAccount
from edgekv.core.step_costs import MOST_TIMES_MEAN, running_mean


class Reading:
    """Who is read."""

    def __init__(self) -> None:
        self.account = ReadingAccount()
        self.worth_in_steps = inf
        """Until the first of those last asked about will have said enough; inf where that is not to be expected."""
        self.token_s: float | None = None
        """Seconds of reading one; None before any."""
        self._begun: set[int] = set()

    def seconds(self, tokens: int) -> float:
        """What it takes to read so many, as far as it is known."""
        return tokens * (self.token_s or 0.0)

    def worth(
        self,
        limits: Mapping[int, int],
        unread: Mapping[int, int],
        said: Mapping[int, int],
        step_s: float,
        saved_share: Callable[[], float],
    ) -> dict[int, int]:
        """The `limits` of those that are read, and of those of which it is worth it.

        `unread`, `said`: tokens by sequence. `step_s`: of a step, for each of its sequences; `saved_share`: what
        proposals save of that.
        """
        worth, share_known = dict(limits), None
        self.worth_in_steps = inf
        self._begun &= unread.keys()
        for number, tokens in unread.items():
            # To stop halfway would have been for nothing.
            if number not in worth or number in self._begun:
                continue
            # At most it saves all that the sequence took: for most there is no need to know more.
            took_s, takes_s = said.get(number, 0) * step_s, self.seconds(tokens)
            if took_s >= takes_s and share_known is None:
                share_known = saved_share()
            share = 1.0 if share_known is None else share_known
            if self.account.left < 0 or share * took_s < takes_s:
                del worth[number]
                if self.account.left >= 0 and share > 0:
                    self.worth_in_steps = min(self.worth_in_steps, (takes_s / share - took_s) / step_s)
        return worth

    def begin(self, numbers: Iterable[int]) -> None:
        """These are read from now on."""
        self._begun.update(numbers)

    def observe(self, tokens: int, seconds: float, plain_s: float | None) -> None:
        """So many tokens were read; `plain_s`: of a step without proposals, None where none was measured."""
        if self.token_s is not None:
            seconds = min(seconds, MOST_TIMES_MEAN * self.seconds(tokens))
        elif plain_s:
            # The first time finds cold caches.
            seconds = min(seconds, plain_s * max(1, tokens))
        self.token_s = running_mean(self.token_s, seconds / max(1, tokens))
        if plain_s:
            self.account.pay(seconds / plain_s)
