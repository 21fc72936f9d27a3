"""What a step comes to for its sequences: the tokens that they say, and which of them end.

Runs in: anywhere; owns: nothing.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Listing
from dataclasses import dataclass
from itertools import zip_longest

from edgekv.core.sequence import FinishReason, Sequence
from edgekv.core.step import Chunk, Finished, Sampled, TokenOut, Verified


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a completed step changed, for the report."""

    tokens: tuple[TokenOut, ...] = ()
    finished: tuple[Finished, ...] = ()
    verified: tuple[Verified, ...] = ()

    def then(self, later: "Outcome") -> "Outcome":
        """One outcome of this and what came after it."""
        return Outcome.of((self, later))

    @staticmethod
    def of(parts: Iterable["Outcome"]) -> "Outcome":
        """One outcome of several, in their order."""
        kept = list(parts)
        return Outcome(
            tuple(out for part in kept for out in part.tokens),
            tuple(last for part in kept for last in part.finished),
            tuple(each for part in kept for each in part.verified),
        )

    def without(self, sequence_id: int) -> "Outcome":
        """What it was for all the others."""
        tokens = tuple(out for out in self.tokens if out.sequence_id != sequence_id)
        finished = tuple(last for last in self.finished if last.sequence_id != sequence_id)
        return Outcome(tokens, finished, tuple(each for each in self.verified if each.sequence_id != sequence_id))


def take_tokens(chunk: Chunk, choices: Listing[Sampled]) -> Outcome:
    """Append to the chunk's sequence what was chosen in its sampled rows, as far as that counts.

    The first choice is the next token. Each later one was chosen in the belief that the proposal before it is what the
    sequence says there; it counts if that was chosen, and nothing had ended the sequence.
    """
    sequence, said = chunk.sequence, list[TokenOut]()
    reason = None
    for choice, proposal in zip_longest(choices, chunk.proposed):
        sequence.tokens.append(choice.token_id)
        reason = _finish_reason(sequence)
        said.append(TokenOut(sequence.id, choice, is_stop=reason is FinishReason.STOP))
        if reason is not None or choice.token_id != proposal:
            break
    finished = () if reason is None else (Finished(sequence.id, reason),)
    if not chunk.proposed:
        return Outcome(tuple(said), finished)
    pairs = list(zip(said, chunk.proposed, strict=False))
    accepted = sum(out.sampled.token_id == proposal for out, proposal in pairs)
    tried = len(chunk.proposed) if reason is None else len(pairs)
    return Outcome(tuple(said), finished, (Verified(sequence.id, tried, accepted),))


def ends_by_length(sequence: Sequence, num_tokens: int) -> bool:
    """Whether the sequence has all that it may have once it has so many tokens, its prompt included."""
    return num_tokens - sequence.num_prompt >= sequence.spec.sampling.max_tokens


def _finish_reason(sequence: Sequence) -> FinishReason | None:
    sampling = sequence.spec.sampling
    if sequence.tokens[-1] in sampling.stop_token_ids and sequence.num_output > sampling.min_tokens:
        return FinishReason.STOP
    return FinishReason.LENGTH if ends_by_length(sequence, len(sequence.tokens)) else None
