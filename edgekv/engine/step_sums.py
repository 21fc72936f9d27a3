"""What came of steps, added up by what they were for. Runs in: the thread that measures; owns: nothing (sums).

a step = proposing (the steps of a draft model, or a look-up) · the model's forward pass · sampling · the rest
"""

from collections.abc import Sequence as Listing
from dataclasses import dataclass, field, fields
from enum import StrEnum

import numpy as np
import numpy.typing as npt


class StepKind(StrEnum):
    """What a step was for. The draft model's own steps lie within `propose_s` of the model's."""

    PROMPT = "prompt"
    """It read a prompt; sequences may have decoded beside it."""
    PLAIN = "plain"
    """A token of each sequence, and nothing was proposed."""
    VERIFY = "verify"
    DRAFT = "draft"
    """The draft model chose a token for each sequence that wanted one."""
    READ = "read"
    """The draft model read what it had not seen."""


DECODING = (StepKind.PLAIN, StepKind.VERIFY)
OF_DRAFT = (StepKind.DRAFT, StepKind.READ)


@dataclass(slots=True)
class StepSums:
    """Steps of one kind added up. `rows` were computed, `proposed` of them to verify; times are in seconds.

    Of `total_s` a step proposes for `propose_s`, then runs the model for `forward_s`, of which `model_s` is the
    kernels' (or torch's), and samples for `sample_s`. A detailed meter knows of the rest how long the controller took
    to decide, the scheduler to plan, and both to report.
    """

    steps: int = 0
    sequences: int = 0
    rows: int = 0
    proposed: int = 0
    tokens: int = 0
    total_s: float = 0.0
    propose_s: float = 0.0
    forward_s: float = 0.0
    model_s: float = 0.0
    sample_s: float = 0.0
    decide_s: float = 0.0
    plan_s: float = 0.0
    report_s: float = 0.0
    operation_ns: npt.NDArray[np.int64] | None = None
    """Nanoseconds by operation of the lowered model; of a detailed meter and native kernels."""

    @property
    def rest_s(self) -> float:
        """What no part accounts for."""
        parts_s = self.propose_s + self.forward_s + self.sample_s + self.decide_s + self.plan_s + self.report_s
        return self.total_s - parts_s

    def add(self, other: "StepSums") -> None:
        """Count these too."""
        for each in fields(self):
            ours, theirs = getattr(self, each.name), getattr(other, each.name)
            if theirs is not None:
                setattr(self, each.name, theirs if ours is None else ours + theirs)


@dataclass(slots=True)
class Turn:
    """Some answers: what they say by sequence, and what came of their steps.

    `verifications`: how often anything was proposed for a sequence; in `first_right` of them the first token was right.
    """

    said: dict[int, list[int]] = field(default_factory=dict)
    kinds: dict[StepKind, StepSums] = field(default_factory=dict)
    verifications: int = 0
    proposed: int = 0
    accepted: int = 0
    first_right: int = 0

    def of(self, kind: StepKind) -> StepSums:
        """The steps of a kind, to add to."""
        return self.kinds.setdefault(kind, StepSums())

    @property
    def steps(self) -> StepSums:
        """All steps of the model that answers."""
        return self._sum([kind for kind in self.kinds if kind not in OF_DRAFT])

    @property
    def decoding(self) -> StepSums:
        """Those without a prompt in them."""
        return self._sum([kind for kind in DECODING if kind in self.kinds])

    @property
    def tok_s(self) -> float:
        """Tokens a second, prompts and all."""
        steps = self.steps
        return steps.tokens / steps.total_s

    def add(self, other: "Turn") -> None:
        """Count another's steps too; what that said is not kept."""
        for kind, sums in other.kinds.items():
            self.of(kind).add(sums)
        for name in ("verifications", "proposed", "accepted", "first_right"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def _sum(self, kinds: Listing[StepKind]) -> StepSums:
        found = StepSums()
        for kind in kinds:
            found.add(self.kinds[kind])
        return found
