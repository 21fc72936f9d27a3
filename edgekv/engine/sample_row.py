"""What the sampler must know of one row of logits. Runs in: engine thread; owns: nothing (frozen data)."""

from collections.abc import Sequence
from dataclasses import dataclass

from edgekv.core.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class SampleRow:
    """The settings and the tokens so far of the sequence that a row of logits continues.

    `tokens` are the prompt, of which there are `num_prompt`, and the output after it; this is the sequence's own list,
    which grows once the row has been sampled. `num_unknown` tokens of the output, 0 or 1, come after these, sampled by
    a step that nobody has read yet: they count here, and only the device can look at them.
    """

    params: SamplingParams
    tokens: Sequence[int]
    num_prompt: int
    num_unknown: int = 0

    @property
    def num_output(self) -> int:
        """Tokens generated so far: the counter of the row's next random number."""
        return len(self.tokens) + self.num_unknown - self.num_prompt
