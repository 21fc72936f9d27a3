"""A proposer that knows what sequences will say, and is as often wrong as a test wants."""

import random
from collections.abc import Mapping
from collections.abc import Sequence as Listing

from edgekv.core.sequence import Sequence
from edgekv.engine.proposer import Proposer

VOCAB = 199


class Guesser(Proposer):
    """Proposes up to `k` tokens of `answers` (by prompt), each of which is right with a chance.

    `is_on`: whether it proposes at all. `planted`: what it always proposes at a place (0 is the first). It counts what
    it is told of its proposals.
    """

    method = "guesses"

    def __init__(self, answers: Mapping[tuple[int, ...], list[int]], k: int, right: float = 1.0) -> None:
        self._answers, self._k, self._right = answers, k, right
        self._chance = random.Random(5)
        self.is_on = True
        self.planted: dict[int, int] = {}
        self.proposed = self.accepted = 0

    def propose(self, sequences: Listing[Sequence], most: Mapping[int, int]) -> Mapping[int, tuple[int, ...]]:
        if not self.is_on:
            return {}
        found = {}
        for sequence in sequences:
            said = sequence.num_output
            right = self._answers[sequence.spec.prompt][said : said + min(self._k, most[sequence.id])]
            found[sequence.id] = tuple(self._guess(place, token) for place, token in enumerate(right))
        return found

    def observe(self, sequence_id: int, proposed: int, accepted: int) -> None:
        self.proposed += proposed
        self.accepted += accepted

    def _guess(self, place: int, token: int) -> int:
        if place in self.planted:
            return self.planted[place]
        if self._chance.random() < self._right:
            return token
        return (token + self._chance.randrange(1, VOCAB)) % VOCAB
