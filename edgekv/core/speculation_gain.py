"""What proposals come to: tokens a second, by what was measured of them and of steps.

Runs in: engine thread; owns: what was measured. The formula stands in `core/speculation`.
"""

from collections.abc import Mapping

from edgekv.core.acceptance import Acceptances, Offer
from edgekv.core.step_costs import MOST_TIMES_MEAN, ProposingCosts, StepCosts

# A gain below this is not told from noise, nor from what it takes to look for it.
_MARGIN = 0.05


class Gain:
    """Which tokens are worth proposing.

    Args:
        most: the most tokens proposed for a sequence.
        most_in_all: and for all sequences of a step together; None for no such limit.
    """

    def __init__(self, most: int, most_in_all: int | None) -> None:
        self._most, self._most_in_all = most, most_in_all
        self.costs = StepCosts()
        self.proposing = ProposingCosts()
        self.seen = Acceptances(most)
        self._rate_s = 0.0  # tokens a second that the latest choice comes to
        self._marginal_s = 0.0, 0.0  # seconds of a row more, and of a row with the draft's step for it

    def best(self, limits: Mapping[int, int], decodes: int, plain_s: float, *, nudge: int = 0) -> dict[int, int]:
        """How many tokens for each sequence make the most tokens a second, and `nudge` rows beside that.

        `limits`: the most for each; `plain_s`: of a step of so many sequences without any.
        """
        offers, self._rate_s = self._rate(limits, decodes, plain_s)
        rows = min(self._most, self.most_rows(decodes))
        row_s = max(0.0, self.costs.of(decodes, decodes + rows) - plain_s) / max(1, rows)
        self._marginal_s = row_s, row_s + self.proposing.more(decodes) / decodes
        if offers and nudge:
            rows = max(1, len(offers) + nudge)
            offers = self.seen.offers(limits)[: min(rows, self.most_rows(decodes))]
        chosen: dict[int, int] = {}
        for _, place, number, _ in offers:
            chosen[number] = max(place, chosen.get(number, 0))
        return chosen

    def saved_share(self, limits: Mapping[int, int], decodes: int, plain_s: float) -> float:
        """Of the time without proposals, what they save at best."""
        return 1 - decodes / plain_s / self._rate(limits, decodes, plain_s)[1]

    def least_chances(self) -> tuple[float, float]:
        """How likely a token must be, with all before it, to be worth its row, and for another to be guessed after it.

        What costs no more than this makes the rate of the latest choice no lower: chance / seconds >= tokens / seconds.
        """
        row_s, more_s = self._marginal_s
        return min(1.0, self._rate_s * row_s), min(1.0, self._rate_s * more_s)

    def extra_s(self, decodes: int, rows: int, tokens: int) -> float:
        """What a step takes longer that verifies so many rows, with so many tokens guessed for one sequence at most."""
        more_s = self.costs.of(decodes, decodes + rows) - self.costs.of(decodes, decodes)
        return more_s + self.proposing.of(decodes, tokens)

    def observe_proposing(self, decodes: int, tokens: int, seconds: float) -> float:
        """To propose took so long, with at most so many tokens for a sequence; answers what of that is believed."""
        known_s, plain_s = self.proposing.of(decodes, tokens), self.costs.plain(decodes)
        if known_s:
            seconds = min(seconds, MOST_TIMES_MEAN * known_s)
        elif plain_s:
            # The first guess finds cold caches: until more is known, none is slower than the step that it is for.
            seconds = min(seconds, tokens * plain_s)
        self.proposing.observe(decodes, tokens, seconds)
        return seconds

    def most_rows(self, decodes: int) -> int:
        """How many rows more than that may be tried: a step is at most twice as large as any that was measured."""
        rows = 2 * self.costs.most_rows(decodes) - decodes
        return rows if self._most_in_all is None else min(rows, self._most_in_all)

    def _rate(self, limits: Mapping[int, int], decodes: int, plain_s: float) -> tuple[list[Offer], float]:
        """The offers that make the most tokens a second, and how many that is."""
        offers = self.seen.offers(limits)[: self.most_rows(decodes)]
        best_rate, best_rows = decodes / plain_s * (1 + _MARGIN), 0
        tokens, expected, longest = float(decodes), 0.0, 0.0
        guessed = dict.fromkeys(limits, 1.0)  # tokens guessed for each, on average; the first is in any case
        for rows, (minus_chance, _, number, reached) in enumerate(offers, 1):
            tokens -= minus_chance
            expected += reached
            longest = max(longest, guessed[number])
            guessed[number] += reached
            more_s = (self.costs.of(decodes, decodes + rows) - plain_s) * expected / rows
            rate = tokens / (plain_s + more_s + self.proposing.of(decodes, longest))
            if rate > best_rate:
                best_rate, best_rows = rate, rows
        return offers[:best_rows], best_rate if best_rows else decodes / plain_s
