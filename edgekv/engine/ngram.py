"""Prompt lookup: what followed the last time that the sequence said what it just said.

Runs in: engine thread; owns: an index of each sequence's own tokens.

    ... the cat sat on the mat . the dog sat on the | mat . the dog
                ----------                ---------   -------------
                found, most recent        suffix      proposed

Source: Saxena 2023, "Prompt lookup decoding"; useful where an answer repeats its prompt (edits of code, quotes).
"""

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Listing

import numpy as np
import numpy.typing as npt

from edgekv.core.sequence import Sequence
from edgekv.engine.proposer import Proposer

_FACTOR = 0x9E3779B97F4A7C15  # odd, near 2**64 / golden ratio: its multiples are far apart
_MASK = (1 << 64) - 1
_FEW = 24  # up to so many n-grams, Python is quicker than calling numpy


class NGramProposer(Proposer):
    """Proposes the continuation of the longest suffix that occurred before, the most recent one of several.

    The index costs O(1) per new token and `4 << slot_bits` bytes per sequence and size; where two n-grams share a slot,
    the later one has it, so a very long text forgets its beginning first.

    Args:
        longest: tokens of the longest suffix that is looked for.
        shortest: and of the shortest; shorter ones are rarely right.
        slot_bits: the logarithm of the number of n-grams that are known of each size.
    """

    method = "ngram"

    def __init__(self, *, longest: int = 4, shortest: int = 2, slot_bits: int = 14) -> None:
        if not 1 <= shortest <= longest:
            raise ValueError(f"sizes from {shortest} to {longest}: the shortest is 1 or more, the longest no less")
        if not 1 <= slot_bits <= 30:
            raise ValueError(f"slot_bits is {slot_bits}, must be from 1 to 30")
        self._sizes = range(longest, shortest - 1, -1)
        self._slot_bits = slot_bits
        self._indexes: dict[int, _Index] = {}

    def propose(self, sequences: Listing[Sequence], most: Mapping[int, int]) -> Mapping[int, tuple[int, ...]]:
        """See `Proposer`."""
        found: dict[int, tuple[int, ...]] = {}
        for sequence in sequences:
            wanted = most[sequence.id]
            if wanted < 1:
                continue
            index = self._indexes.get(sequence.id)
            if index is None:
                index = self._indexes[sequence.id] = _Index(self._sizes, self._slot_bits)
            index.extend(sequence.tokens)
            start = index.find(sequence.tokens)
            if start is not None:
                found[sequence.id] = _continued(sequence.tokens, start, wanted)
        return found

    def forget(self, sequence_id: int) -> None:
        """See `Proposer`."""
        self._indexes.pop(sequence_id, None)

    @property
    def num_bytes(self) -> int:
        """Main memory held by the indexes."""
        return sum(index.num_bytes for index in self._indexes.values())


class _Index:
    """Where the token after each n-gram of a text is, by the n-gram's hash: the latest of those that share a slot.

    Invariant: of each size, the n-grams that end before the last of `num_indexed` tokens are in. So the suffix of
    the text itself is not found, and whatever is found has a token after it.
    """

    def __init__(self, sizes: Iterable[int], slot_bits: int) -> None:
        self._shift = 64 - slot_bits
        # The system gives zeros at first use, page by page; 0 is no place of a token that has others before it.
        self._after = {size: np.zeros(1 << slot_bits, np.int32) for size in sizes}
        self._num_indexed = 0

    @property
    def num_bytes(self) -> int:
        return sum(after.nbytes for after in self._after.values())

    def extend(self, tokens: list[int]) -> None:
        """Take in what has come to the text."""
        begin, end = self._num_indexed, len(tokens)
        self._num_indexed = end
        for size, after in self._after.items():
            places = range(max(begin, size), end)  # of the tokens after n-grams
            if len(places) > _FEW:
                # Of several values for one slot numpy keeps the last.
                text = np.fromiter(tokens[places.start - size : end], np.int64).astype(np.uint64)
                after[self._slots(text, size, len(places))] = np.arange(places.start, end, dtype=np.int32)
            else:
                for place in places:
                    after[self._slot(tokens[place - size : place])] = place

    def find(self, tokens: list[int]) -> int | None:
        """The place after the latest occurrence of the longest suffix of the text that has one before its end."""
        for size, after in self._after.items():
            suffix = tokens[-size:]
            if len(tokens) <= size:
                continue
            place = int(after[self._slot(suffix)])
            if place >= size and tokens[place - size : place] == suffix:
                return place
        return None

    def _slot(self, ngram: list[int]) -> int:
        mixed = 0
        for token in ngram:
            mixed = (mixed ^ token) * _FACTOR & _MASK
            mixed ^= mixed >> 32
        return (mixed * _FACTOR & _MASK) >> self._shift

    def _slots(self, text: npt.NDArray[np.uint64], size: int, count: int) -> npt.NDArray[np.int64]:
        """`_slot` of the first `count` n-grams of a text."""
        factor = np.uint64(_FACTOR)
        mixed = np.zeros(count, np.uint64)
        for offset in range(size):
            mixed = (mixed ^ text[offset : offset + count]) * factor
            mixed ^= mixed >> np.uint64(32)
        return (mixed * factor >> np.uint64(self._shift)).astype(np.int64)


def _continued(tokens: list[int], start: int, count: int) -> tuple[int, ...]:
    """`count` tokens from place `start` on; where the text ends before, it goes on as it did from `start` to there."""
    period = tokens[start : start + count]
    repeats = -(-count // len(period))
    return tuple((period * repeats)[:count])
