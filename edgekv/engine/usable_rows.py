"""What is left of a step in which some rows have no usable distribution. Runs in: engine thread; owns: nothing."""

from collections.abc import Collection
from dataclasses import dataclass, replace

from edgekv.core.step import Chunk, StepPlan


@dataclass(frozen=True, slots=True)
class UsableRows:
    """The step without what cannot be used.

    `plan` has the chunks of which something is left. `rows`: which of the step's sampled rows are its rows, in order.
    `lost`: the ids of the sequences of which not even the next token can be chosen.
    """

    plan: StepPlan
    rows: tuple[int, ...]
    lost: tuple[int, ...]


def usable_rows(plan: StepPlan, bad: Collection[int]) -> UsableRows:
    """Leave out the sampled rows of `plan` that are `bad`, and in each chunk those after the first of them.

    Of proposals, those before a bad row still count: if they are right, they lead the next step to that row, which is
    then the sequence's only one, and the judge.
    """
    chunks: list[Chunk] = []
    rows: list[int] = []
    lost: list[int] = []
    first = 0
    for chunk in plan.chunks:
        usable = next((place for place in range(chunk.sampled) if first + place in bad), chunk.sampled)
        if chunk.samples and usable == 0:
            lost.append(chunk.sequence.id)
        else:
            chunks.append(chunk.with_sampled(usable))
            rows += range(first, first + usable)
        first += chunk.sampled
    return UsableRows(replace(plan, chunks=tuple(chunks)), tuple(rows), tuple(lost))
