"""What sample.h chooses, in plain torch and float64: the whole vocabulary sorted, one row after the other.

Runs in: anywhere; owns: nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgekv.kernels.fused.sample import MOST_COUNTED
from edgekv.kernels.fused.sample_rows import RowSettings

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True)
class Choice:
    """A row's token.

    `slack` is how far the sums that decided lay from where they would have decided otherwise, as a share of the mass:
    where it is below what float32 can tell apart, a neighbouring token is as right.
    """

    token_id: int
    slack: float
    logprob: float
    top: tuple[tuple[int, float], ...]


def reference(logits: Tensor, rows: Sequence[RowSettings], counts: Tensor | None = None) -> list[Choice | None]:
    """Each row's choice, None where none can be made. `logits` [rows, vocab]; `counts` is the table before the step."""
    return [_choose(logits[index], row, counts) for index, row in enumerate(rows)]


def edited(logits: Tensor, row: RowSettings, counts: Tensor | None) -> Tensor:
    """One row's scores [vocab], float32 as in the kernel."""
    scores = logits.clone()
    for token_id, value in row.edits:
        scores[token_id] += value
    if row.counter < row.min_tokens:
        scores[list(row.banned)] = -math.inf
    if not row.is_penalised or counts is None or row.counts_row is None:
        return scores
    words = counts[row.counts_row].long() & 0xFFFF
    output = words & MOST_COUNTED
    repeated = torch.where(scores > 0, scores / row.repetition_penalty, scores * row.repetition_penalty)
    scores = torch.where(words > 0, repeated, scores)
    penalty = row.frequency_penalty * output.float() + row.presence_penalty
    return torch.where(output > 0, scores - penalty, scores)


def _choose(logits: Tensor, row: RowSettings, counts: Tensor | None) -> Choice | None:
    scores = edited(logits, row, counts)
    peak = scores.max()
    if not peak.isfinite():
        return None
    token_id, slack = int(scores.argmax()), 1.0
    if row.temperature > 0:
        weights = ((scores.double() - peak.double()) / row.temperature).exp()
        margin = float((weights[weights < 1] - row.min_p).abs().min()) if row.min_p and (weights < 1).any() else 1.0
        weights[weights < row.min_p] = 0
        ranks = row.top_p < 1 or (row.top_k is not None and row.top_k < len(scores))
        order = scores.sort(descending=True, stable=True).indices if ranks else torch.arange(len(scores))
        place, slack = _draw(weights[order], row, ranks)
        token_id, slack = int(order[place]), min(slack, margin)
    logprobs = logits.double().log_softmax(-1)
    likeliest: list[int] = logits.sort(descending=True, stable=True).indices[: row.logprobs or 0].tolist()
    top = tuple((other, float(logprobs[other])) for other in likeliest if logits[other] > -math.inf)
    return Choice(token_id, slack, float(logprobs[token_id]), top)


def _draw(weights: Tensor, row: RowSettings, ranks: bool) -> tuple[int, float]:
    """The place drawn from weights in their order, and the slack."""
    if ranks and row.top_k is not None:
        weights = weights[: row.top_k]
    cumulative = weights.cumsum(0)
    all_mass = float(cumulative[-1])
    last, slack = int((weights > 0).nonzero()[-1]), 1.0
    if row.top_p < 1:
        wanted = all_mass * row.top_p
        reached = min(int((cumulative < wanted).sum()), last)
        slack = float((cumulative - wanted).abs().min()) / all_mass
        last = reached
    target = float(cumulative[last]) * uniform(row.seed, row.counter)
    place = min(int((cumulative <= target).sum()), last)
    inner = cumulative[:last]
    if len(inner):
        slack = min(slack, float((inner - target).abs().min()) / all_mass)
    return place, slack


def uniform(seed: int, counter: int) -> float:
    """Of `ek_uniform`, and of the CPU's sampler: in [0, 1), a multiple of 2^-53."""
    start = _mix((seed + _GOLDEN) & _MASK)
    return (_mix((start + (counter + 1) * _GOLDEN) & _MASK) >> 11) * 2.0**-53


def _mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
