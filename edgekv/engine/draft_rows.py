"""What a draft's sampler is told of a guess. Runs in: engine thread; owns: nothing."""

from collections.abc import Sequence as Listing
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from edgekv.core.sampling import SamplingParams
from edgekv.core.sequence import Sequence
from edgekv.engine.sample_row import Followed, SampleRow

_GREEDY_TEMPERATURE = 0.5


def draft_row(
    sequence: Sequence, guess: Listing[int], *, num_unknown: int, penalised: bool, vocab_size: int
) -> SampleRow:
    """The row that chooses the token after a guess, as the target's would: same settings, same random number.

    `num_unknown` tokens of the guess are not known yet. Without `penalised` what was said before has no effect: a
    device that chooses by itself counts what it chose only where that is said in the end. `vocab_size`: tokens that the
    draft knows; a bias of another one has no effect.
    """
    tokens = Followed(sequence.tokens, tuple(guess)) if guess else sequence.tokens
    params = _params(sequence.spec.sampling, penalised, vocab_size)
    return SampleRow(params, tokens, sequence.num_prompt, num_unknown)


def chance(logits: npt.NDArray[np.float32], token: int, temperature: float) -> float:
    """How likely it is that the target chooses what a draft chose in `logits` [vocab], as far as the draft can tell.

    Its share at that temperature; greedy at a half, for two models agree on the likeliest more often than either holds
    it to be the next. Cuts, biases and penalties are left out: it is about whether to go on, not about what to say.
    """
    weights = logits - logits.max()
    with np.errstate(over="ignore"):
        weights /= np.float32(max(temperature or _GREEDY_TEMPERATURE, 1e-6))
    np.exp(weights, out=weights)
    return float(weights[token] / weights.sum())


def _params(params: SamplingParams, penalised: bool, vocab_size: int) -> SamplingParams:
    if params.logprobs is not None:
        params = replace(params, logprobs=None)
    if any(token >= vocab_size for token, _ in params.logit_bias):
        params = replace(params, logit_bias=tuple(each for each in params.logit_bias if each[0] < vocab_size))
    if penalised:
        return params
    return replace(params, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0)
