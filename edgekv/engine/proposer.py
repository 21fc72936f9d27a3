"""Who proposes the next tokens of sequences, for the model to verify several in one step.

Runs in: engine thread; owns: nothing (a base class).

A proposer changes how soon a token is there, never which: the model chooses at every place as it would have without
proposals, and of these only those count that it chose itself. What has heads of its own on the target (MTP, EAGLE)
would be another one.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from collections.abc import Sequence as Listing
from dataclasses import dataclass

from edgekv.core.sequence import Sequence
from edgekv.core.step import PoolStats


@dataclass(frozen=True, slots=True)
class Reading:
    """Tokens that were read for proposals to come, and what that took."""

    tokens: int = 0
    seconds: float = 0.0


class Proposer(ABC):
    """Guesses how sequences go on; `DraftModel` and `NGramProposer` are two."""

    method = ""
    """What it is called in statistics."""
    name: str | None = None
    """What the model is called that drafts; None where none does."""
    yields = 0
    """How often it gave so much of its memory back that it could not go on."""
    returns = 0
    """How often it could again."""
    least_chances = 0.0, 0.0
    """Below the first a token, with all before it, is not worth a row; below the second none is guessed after it."""

    @abstractmethod
    def propose(self, sequences: Listing[Sequence], most: Mapping[int, int]) -> Mapping[int, tuple[int, ...]]:
        """What may come next, by the sequence's id, for any of the sequences.

        Args:
            sequences: all that decode. The tokens of a sequence only grow while it lives, also over a preemption; it
                may be missing here for some steps.
            most: how many tokens are wanted for each of them, by id; 0 for none.
        """

    def serves(self, sequence: Sequence) -> bool:
        """Whether there will ever be proposals for a sequence; where there were none once, there are none later."""
        return True

    def unread(self, sequence: Sequence) -> int:
        """How many tokens of a sequence are to be read before anything is proposed for it; 0 where that is nothing."""
        return 0

    def take_reading(self) -> Reading:
        """What `propose` spent on reading since this was asked last."""
        return Reading()

    def observe(self, sequence_id: int, proposed: int, accepted: int) -> None:  # noqa: B027 (most learn nothing)
        """Of so many tokens that were verified for a sequence, the first `accepted` were right."""

    def forget(self, sequence_id: int) -> None:  # noqa: B027 (most know nothing)
        """The sequence has ended; one that comes later may have the same id. It need not be known."""

    @property
    def away(self) -> str | None:
        """Why it cannot propose at present, for people; None where it can."""
        return None

    gone: str | None = None
    """Why it will never propose again; None where it may."""

    @property
    def pool(self) -> PoolStats | None:
        """Where its blocks are; None for one that has none."""
        return None
