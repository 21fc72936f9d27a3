"""What is said to the engine's actor. Runs in: trio; owns: nothing (frozen data)."""

from dataclasses import dataclass

from edgekv.actors.stream import Failed, TokenStream
from edgekv.core.sequence import FinishReason, SequenceSpec


@dataclass(frozen=True, slots=True)
class Submit:
    """Start these sequences; each one's events go to its stream. All were admitted together."""

    pairs: tuple[tuple[SequenceSpec, TokenStream], ...]


@dataclass(frozen=True, slots=True)
class Abort:
    """Nobody reads this sequence any more."""

    sequence_id: int
    reason: FinishReason = FinishReason.ABORT


@dataclass(frozen=True, slots=True)
class Expire:
    """Refuse this sequence after all, with these words, unless it has started."""

    sequence_id: int
    told: Failed


@dataclass(frozen=True, slots=True)
class Drain:
    """Let the open streams finish for at most `grace_s` seconds, end the rest, and end."""

    grace_s: float
