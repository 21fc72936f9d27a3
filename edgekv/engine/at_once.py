"""Steps of a model that are done when they are begun: what `Pipeline` is on a device that Python waits for.

Runs in: engine thread; owns: nothing.
"""

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor

from edgekv.core.step import Sampled, StepPlan
from edgekv.engine.protocols import Chooser, Forward, Pending
from edgekv.engine.sample_row import SampleRow
from edgekv.engine.sampler import NonFiniteLogits


@dataclass(frozen=True, slots=True)
class Done:
    """What a step chose; see `engine.protocols.Pending`. Rows with no usable distribution are in `faults`.

    `logits` [rows, vocab] are valid until the next step.
    """

    sampled: list[Sampled | None]
    faults: tuple[int, ...] = ()
    logits: Tensor | None = None

    def result(self, without: Collection[int] = ()) -> list[Sampled]:
        """See `engine.protocols.Pending`."""
        bad = tuple(row for row in self.faults if row not in without)
        if bad:
            raise NonFiniteLogits(bad, len(self.sampled))
        return [each for row, each in enumerate(self.sampled) if each is not None and row not in without]


class AtOnce:
    """A `Pipeline` over a runner and a sampler; every token is known when the next step is planned."""

    def __init__(self, runner: Forward, sampler: Chooser) -> None:
        self.runner, self.sampler = runner, sampler

    def begin(self, plan: StepPlan, rows: list[SampleRow], after: Pending | None) -> Done:
        """See `engine.protocols.Pipeline`; does the step."""
        logits = self.runner.forward(plan)
        if not rows:
            return Done([])
        try:
            return Done(list(self.sampler.sample(logits, rows)), logits=logits)
        except NonFiniteLogits as error:
            bad = set(error.rows)
        good = [row for row in range(len(rows)) if row not in bad]
        chosen: list[Sampled | None] = [None] * len(rows)
        if good:
            for row, each in zip(good, self.sampler.sample(logits[good], [rows[row] for row in good]), strict=True):
                chosen[row] = each
        return Done(chosen, tuple(sorted(bad)), logits)
