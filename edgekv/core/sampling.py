"""How one sequence's next token is chosen. Runs in: anywhere; owns: nothing (frozen data)."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling settings of one sequence, already validated and with every default resolved.

    The defaults are neutral: each leaves the model's distribution as it is. `temperature` 0 means greedy. `top_k`
    None means all tokens. `logprobs` None means none are reported; N means the chosen token's log-probability and
    the N likeliest alternatives (N may be 0). `seed` is always set, so that a preempted sequence continues exactly.
    """

    max_tokens: int
    seed: int = 0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = field(default_factory=frozenset)

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0.0
