"""One draw from one row of logits, in numpy. Runs in: engine thread; owns: nothing."""

import numpy as np
import numpy.typing as npt

from edgekv.core.sampling import SamplingParams


def draw_row(scores: npt.NDArray[np.float32], peak: float, params: SamplingParams, number: float) -> int:
    """What `Sampler` draws by id from `scores` [vocab], whose largest is `peak`, at a temperature above 0.

    `number`: uniform in [0, 1).
    """
    weights = scores.astype(np.float64)
    weights -= peak
    with np.errstate(over="ignore"):  # a temperature next to 0: all but the likeliest are impossible
        weights /= params.temperature
    np.exp(weights, out=weights)
    if params.min_p > 0.0:
        weights[weights < params.min_p] = 0.0
    cumulative = weights.cumsum()
    drawn = cumulative.searchsorted(cumulative[-1] * number, side="right")
    # Rounding may lead past the last token that is possible.
    return int(drawn) if drawn < len(weights) and weights[drawn] > 0.0 else int(weights.argmax())
