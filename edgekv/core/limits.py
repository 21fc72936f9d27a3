"""How much one step may do. Runs in: anywhere; owns: nothing (frozen data)."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Limits:
    """How much one step may do.

    `max_step_tokens` bounds every step; `mixed_step_tokens` one with decodes in it, so that a long prompt never holds
    up running streams for longer than that many tokens take. Where decodes are more than half of that, prompts get as
    many tokens again, or many streams would keep out all others. `weights` are the shares in which priorities are let
    in where several wait (see `WaitingLines`). `context_tokens` bounds prompt and output of a sequence; None: only the
    pool's size does. `max_proposed` bounds the proposals that a step verifies, each with logits of its own; None: only
    the step's tokens do.
    """

    max_sequences: int = 16
    max_step_tokens: int = 512
    mixed_step_tokens: int = 128
    weights: Mapping[int, int] = field(default_factory=lambda: {0: 10, 10: 1})
    context_tokens: int | None = None
    max_proposed: int | None = None

    def step_tokens(self, num_decodes: int) -> int:
        """The most tokens of a step with so many decodes."""
        if num_decodes == 0:
            return self.max_step_tokens
        return min(max(self.mixed_step_tokens, 2 * num_decodes), self.max_step_tokens)
