"""How often proposals are right. Runs in: engine thread; owns: what was seen of that."""

from collections.abc import Mapping
from typing import TypeAlias

# What is known of a sequence's proposals fades by this with each verification, so that the last thirty count most.
_FADING = 0.97
_FADING_OF_ALL = 0.99
_FIRST_CHANCE = 0.6
# As many verifications as whatever is taken for likely before there are any counts for.
_PRIOR_WEIGHT = 4.0


# A token that may be proposed: - the chance that it is and that it is accepted, its place, whose it is, and the chance
# that it is proposed.
Offer: TypeAlias = tuple[float, int, int, float]


class Acceptance:
    """How often the i-th proposal was right where all before it were, the latest verifications counting most.

    Args:
        most: proposals at once.
        fading: what is known fades by this with each verification.
    """

    def __init__(self, most: int, fading: float) -> None:
        self._fading = fading
        self._tests = [0.0] * most
        self._hits = [0.0] * most
        self._proposed = self._accepted = 0.0
        self._asked = [0.0] * most
        self._found = [0.0] * most

    @property
    def share(self) -> float | None:
        """Of recent proposals those that were accepted; None before any."""
        return self._accepted / self._proposed if self._proposed else None

    @property
    def share_found(self) -> float | None:
        """How often there was anything to propose, of the recent times that somebody was asked; None before any."""
        return self._found[0] / self._asked[0] if self._asked[0] else None

    @property
    def weight(self) -> float:
        """Of how many recent verifications there is something to say."""
        return self._tests[0]

    def observe_asking(self, wanted: int, proposed: int) -> None:
        """Of so many tokens that were wanted, there were some or all to propose."""
        for place in range(min(proposed + 1, wanted, len(self._asked))):
            self._asked[place] = self._fading * self._asked[place] + 1
            self._found[place] = self._fading * self._found[place] + (place < proposed)

    def found(self, likely: list[float]) -> list[float]:
        """How often there is anything to propose for each place, given the one before; `likely` as for `each`."""
        return _shares(self._found, self._asked, likely)

    def observe(self, proposed: int, accepted: int) -> None:
        """The first `accepted` of `proposed` were right; those after the first wrong one were not tried."""
        self._proposed = self._fading * self._proposed + proposed
        self._accepted = self._fading * self._accepted + accepted
        for place in range(min(accepted + 1, proposed, len(self._tests))):
            self._tests[place] = self._fading * self._tests[place] + 1
            self._hits[place] = self._fading * self._hits[place] + (place < accepted)

    def each(self, likely: list[float]) -> list[float]:
        """The chance of each place, given all before it; `likely` before anything was seen.

        Where `likely` has no more places, a place is taken to be like the one before.
        """
        return _shares(self._hits, self._tests, likely)


def _shares(hits: list[float], tests: list[float], likely: list[float]) -> list[float]:
    shares: list[float] = []
    for place, (hit, tested) in enumerate(zip(hits, tests, strict=True)):
        prior = likely[place] if place < len(likely) else shares[-1]
        shares.append((hit + _PRIOR_WEIGHT * prior) / (tested + _PRIOR_WEIGHT))
    return shares


class Acceptances:
    """Of every sequence, and of all of them: one that is new is taken to be like the others."""

    def __init__(self, most: int) -> None:
        self.all = Acceptance(most, _FADING_OF_ALL)
        self._most = most
        self._by_sequence: dict[int, Acceptance] = {}

    def chances(self, sequence_id: int) -> list[float]:
        """For i = 1, 2, ... `most`: how likely the first i proposals for a sequence are all accepted."""
        likely = self.all.each([_FIRST_CHANCE])
        known = self._by_sequence.get(sequence_id)
        survival, chances = 1.0, list[float]()
        for chance in likely if known is None else known.each(likely):
            survival *= chance
            chances.append(survival)
        return chances

    def offers(self, limits: Mapping[int, int]) -> list[Offer]:
        """Every token that may be proposed, the likeliest first."""
        likely, reaching = self.all.each([_FIRST_CHANCE]), self.all.found([1.0])
        offers: list[Offer] = []
        for number, limit in limits.items():
            known = self._by_sequence.get(number)
            chances = likely if known is None else known.each(likely)
            reaches = reaching if known is None else known.found(reaching)
            survival = reached = 1.0
            for place in range(limit):
                reached *= reaches[place]
                survival *= reaches[place] * chances[place]
                offers.append((-survival, place + 1, number, reached))
        return sorted(offers)

    def observe(self, sequence_id: int, proposed: int, accepted: int) -> None:
        """Of so many tokens that were verified for a sequence, the first `accepted` were right."""
        for known in (self._of(sequence_id), self.all):
            known.observe(proposed, accepted)

    def observe_asking(self, sequence_id: int, wanted: int, proposed: int) -> None:
        """Of so many tokens that were wanted for a sequence, there were some or all to propose."""
        for known in (self._of(sequence_id), self.all):
            known.observe_asking(wanted, proposed)

    def forget(self, sequence_id: int) -> None:
        """The sequence has ended."""
        self._by_sequence.pop(sequence_id, None)

    def _of(self, sequence_id: int) -> Acceptance:
        if sequence_id not in self._by_sequence:
            self._by_sequence[sequence_id] = Acceptance(self._most, _FADING)
        return self._by_sequence[sequence_id]
