"""What the sampler must know of one row of logits. Runs in: engine thread; owns: nothing (frozen data)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import overload

from edgekv.core.sampling import SamplingParams
from edgekv.core.step import Chunk, StepPlan


@dataclass(frozen=True, slots=True)
class SampleRow:
    """The settings and the tokens so far of the sequence that a row of logits continues.

    `tokens` are the prompt, of which there are `num_prompt`, and the output after it; this is the sequence's own list,
    which grows once the row has been sampled. Where the row verifies proposals, those before it count as output: it is
    only used if they were right. `num_unknown` tokens of the output come after these, sampled by steps that nobody
    has read yet: they count here, and only the device can look at them.
    """

    params: SamplingParams
    tokens: Sequence[int]
    num_prompt: int
    num_unknown: int = 0

    @property
    def num_output(self) -> int:
        """Tokens generated so far: the counter of the row's next random number."""
        return len(self.tokens) + self.num_unknown - self.num_prompt


def sample_rows(plan: StepPlan) -> list[SampleRow]:
    """The rows of a step's logits, in order."""
    return [_row(chunk, place) for chunk in plan.sampling for place in range(chunk.sampled)]


def _row(chunk: Chunk, place: int) -> SampleRow:
    sequence, proposed = chunk.sequence, chunk.proposed
    return SampleRow(
        sequence.spec.sampling,
        Followed(sequence.tokens, proposed[:place]) if place else sequence.tokens,
        sequence.num_prompt,
        num_unknown=chunk.end - len(proposed) - len(sequence.tokens),
    )


class Followed(Sequence[int]):
    """A list of tokens with some more behind it, without a copy: it may be long."""

    def __init__(self, tokens: list[int], more: tuple[int, ...]) -> None:
        self._tokens, self._more = tokens, more

    def __len__(self) -> int:
        return len(self._tokens) + len(self._more)

    def __iter__(self) -> Iterator[int]:
        return chain(self._tokens, self._more)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...
    def __getitem__(self, index: int | slice) -> int | Sequence[int]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        known = len(self._tokens)
        return self._tokens[place] if place < known else self._more[place - known]
