"""What an engine is made of, as far as its core must know. Runs in: engine thread; owns: nothing."""

from collections.abc import Callable, Collection
from typing import Protocol

from torch import Tensor

from edgekv.core.scheduler import Scheduler
from edgekv.core.step import MemoryStats, Sampled, StepPlan
from edgekv.engine.sample_row import SampleRow


class Forward(Protocol):
    """Runs a planned step through the model."""

    def forward(self, plan: StepPlan) -> Tensor:  # [rows sampled, vocab] float32
        """Logits of each sampling chunk's sampled rows, in the plan's order."""
        ...


class Chooser(Protocol):
    """Chooses the next tokens."""

    def sample(self, logits: Tensor, rows: list[SampleRow]) -> list[Sampled]:
        """One token for each row. Raises NonFiniteLogits naming the rows that have no usable distribution."""
        ...


class Pending(Protocol):
    """A step that the device was given."""

    def result(self, without: Collection[int] = ()) -> list[Sampled]:
        """Wait for the step; a token for each of its sampled rows, in the plan's order, that is not in `without`.

        May be called again. Raises NonFiniteLogits naming those of the rows not in `without` that have no usable
        distribution, numbered as the step's sampled rows; MemoryError or torch's like where the step found too little
        memory, and then nothing that it computed is used; the device's own errors.
        """
        ...


class Pipeline(Protocol):
    """Runs planned steps on a device that works by itself, one after another in the order in which they were begun."""

    def begin(self, plan: StepPlan, rows: list[SampleRow], after: Pending | None) -> Pending:
        """Hand a step with its sampling to the device, and return without waiting for it.

        Args:
            plan: the step. A token that is UNKNOWN, which may be the first of a chunk, is what `after` samples for the
                same sequence; where that has no usable distribution, any token of the vocabulary will do.
            rows: of each sampled row, in order. They hold only during the call: the lists of tokens grow. What the
                device keeps of a sequence's tokens for its penalties has to agree with `num_output`, for a step
                that it did may have been thrown away since.
            after: the step begun before this one and not read yet; None where all steps have been read.

        Raises MemoryError or torch's like, having done nothing.
        """
        ...


class ElasticPool(Protocol):
    """A pool that can give memory back and take some; `Segments` is one, and says more of each."""

    @property
    def num_bytes(self) -> int:
        """Bytes that it has."""
        ...

    @property
    def version(self) -> int:
        """Another one whenever bytes came or went, or may; until then `memory` answers the same."""
        ...

    def shrink(self, scheduler: Scheduler, num_bytes: int, *, keep_promises: bool, slow_first: bool = False) -> int:
        """Give back at least `num_bytes`, or what can be; the bytes given back."""
        ...

    def spare(self) -> int:
        """Give back something that no sequence needs, if there is any; the bytes given back."""
        ...

    def grow(self, num_bytes: int) -> object:
        """Take at most `num_bytes`."""
        ...

    def stay_small(self) -> None:
        """Never grow beyond what it has now."""
        ...

    def set_budget(self, num_bytes: int) -> None:
        """The most that may be leased in all from now on."""
        ...

    def memory(self, scheduler: Scheduler, *, num_resizes: int, held: bool) -> MemoryStats:
        """Where the device's memory is."""
        ...


class Pins(Protocol):
    """What is kept in the prefix cache by name; `PinnedPrefixes` is one."""

    def observe(self, now_s: float, spare_blocks: Callable[[], int]) -> None:
        """The present: some pins may end with it, others come back into as many blocks as `spare_blocks` says."""
        ...
