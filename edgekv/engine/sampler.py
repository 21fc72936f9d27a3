"""From a step's logits to the next tokens. Runs in: engine thread; owns: nothing.

Only tensors of the whole batch are touched, whatever mixture of settings its rows have. A row's token depends on the
row alone: its logits, its settings and its tokens so far; its neighbours, the batch's order and the device add nothing.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from edgekv.core.rng import uniform
from edgekv.core.sampling import SamplingParams
from edgekv.core.step import Sampled
from edgekv.engine.draw_row import draw_row
from edgekv.engine.penalties import edit, edits
from edgekv.engine.ranking import likeliest
from edgekv.engine.sample_row import SampleRow
from edgekv.errors import EdgeKVError

__all__ = ["NonFiniteLogits", "SampleRow", "Sampler", "check_params"]

# Candidates looked at first for a top-p row, and how the number grows. Nine tenths of a language model's mass lie
# nearly always in fewer than 256 tokens, and topk of 256 costs hardly more than of 40; from 1/32 of the vocabulary
# upwards one sort is cheaper than another attempt (measured on CPU at 128,256 tokens). For a top-k row they are a power
# of two, so that rows can be drawn together, and fewer than 64 would save nothing.
_FIRST_CANDIDATES = 256
_FEWEST_CANDIDATES = 64
_CANDIDATE_GROWTH = 8
_SORT_FROM = 1 / 32

# Rows that are drawn at once hold at most this many float64 entries per temporary, of which there are up to three.
# CPU: 4 MiB, which stays in the cache (twice as fast as 32 MiB at 16 x 128,256); elsewhere 32 MiB, for fewer launches.
_SCRATCH_ENTRIES_CPU = 1 << 19
_SCRATCH_ENTRIES_DEVICE = 1 << 22

# Up to so many tokens in the vocabulary, what torch takes for calling a dozen operations is more than the draw itself.
# Then each row is drawn by numpy: 13 us instead of 44 for one row of 2,048, and no more for sixteen.
_SMALL_VOCABULARY = 4096


class NonFiniteLogits(EdgeKVError):
    """Rows of logits from which no token can be chosen; `rows` are their indexes in the batch. No row was sampled."""

    def __init__(self, rows: tuple[int, ...], num_rows: int) -> None:
        listed = ", ".join(str(row) for row in rows[:8]) + (", …" if len(rows) > 8 else "")
        super().__init__(
            f"No token can be chosen in {len(rows)} of {num_rows} rows of logits (rows {listed}): "
            f"they hold NaN or +inf, or nothing but -inf."
        )
        self.rows, self.num_rows = rows, num_rows


def check_params(params: SamplingParams, vocab_size: int) -> None:
    """Raise a ValueError that names the first field which `Sampler.sample` could not honour.

    Meant for the moment a sequence is submitted: a fault found there costs one request, one found in a step the batch.
    """
    faults = (
        ("temperature", params.temperature, 0.0 <= params.temperature < math.inf, "a finite number ≥ 0"),
        ("top_k", params.top_k, params.top_k is None or params.top_k >= 1, "an integer ≥ 1"),
        ("top_p", params.top_p, 0.0 < params.top_p <= 1.0, "in (0, 1]"),
        ("min_p", params.min_p, 0.0 <= params.min_p <= 1.0, "in [0, 1]"),
        (
            "repetition_penalty",
            params.repetition_penalty,
            0.0 < params.repetition_penalty < math.inf,
            "a finite number > 0",
        ),
        ("presence_penalty", params.presence_penalty, math.isfinite(params.presence_penalty), "a finite number"),
        ("frequency_penalty", params.frequency_penalty, math.isfinite(params.frequency_penalty), "a finite number"),
        ("logprobs", params.logprobs, params.logprobs is None or params.logprobs >= 0, "an integer ≥ 0"),
    )
    for field, value, fine, wanted in faults:
        if not fine:
            raise ValueError(f"{field} must be {wanted}, not {value}")
    for token_id, bias in params.logit_bias:
        if not 0 <= token_id < vocab_size:
            raise ValueError(f"logit_bias: token id {token_id} is outside the vocabulary of {vocab_size:,}")
        if not bias < math.inf:
            raise ValueError(f"logit_bias: the bias of token id {token_id} must be below +inf, not {bias}")


class Sampler:
    """Chooses one token per row.

    Per row: the edits of `edgekv.engine.penalties` (bias, minimum length, penalties), then temperature, min-p, top-k
    and top-p in vLLM's order, then one draw with the number that `edgekv.core.rng.uniform` gives for the seed and the
    count of output tokens.

    - temperature T: p ∝ exp(x / T); T = 0 takes the likeliest token, of equals the lowest id.
    - min-p m: keeps p ≥ m · max p (Nguyen et al. 2024, "Min-p sampling").
    - top-k: keeps the k likeliest, exactly k, ties by lower id.
    - top-p: keeps the shortest beginning of the list of what is left, likeliest first, ties by lower id, whose share
      of what is left is at least top_p; never nothing (Holtzman et al. 2019, "The curious case of neural text
      degeneration").
    - the draw inverts the cumulative distribution in float64: over the candidates from the likeliest on where top-k
      or top-p made such a list, else over the vocabulary by id, which needs no sort.
    """

    def __init__(self, vocab_size: int, device: torch.device | str) -> None:
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        scratch_entries = _SCRATCH_ENTRIES_CPU if self.device.type == "cpu" else _SCRATCH_ENTRIES_DEVICE
        self._rows_at_once = max(1, scratch_entries // vocab_size)

    @torch.inference_mode()
    def sample(self, logits: Tensor, rows: Sequence[SampleRow]) -> list[Sampled]:
        """Choose the next token of every row; `logits` is float32 [rows, vocab] and is left as it is.

        Log-probabilities are those of the unedited logits at temperature 1. `top_logprobs` is descending, ties by
        lower id, and leaves impossible tokens (-inf) out.

        Raises NonFiniteLogits, with nothing sampled, if rows hold NaN, +inf or (after their edits) only -inf: the
        caller may try again without these rows. Raises ValueError for logits of another shape or dtype, and for
        biased ids or penalised tokens outside the vocabulary.
        """
        if logits.shape != (len(rows), self.vocab_size) or logits.dtype != torch.float32:
            raise ValueError(
                f"logits must be float32 [{len(rows)}, {self.vocab_size}], not {logits.dtype} {list(logits.shape)}"
            )
        if not rows:
            return []
        peaks, chosen = _largest(logits)
        _check_peaks(peaks)

        scores = logits
        edited = [index for index, row in enumerate(rows) if edits(row)]
        if edited:
            scores = logits.clone(memory_format=torch.contiguous_format)
            edit(scores, [(index, rows[index]) for index in edited])
            picked = torch.tensor(edited, device=self.device)
            peaks[picked], chosen[picked] = _largest(_take(scores, edited))
            _check_peaks(peaks)

        plain: list[int] = []
        ranked: list[int] = []
        for index, row in enumerate(rows):
            if not row.params.is_greedy:
                (ranked if self._ranks(row.params) else plain).append(index)
        if self.device.type == "cpu" and self.vocab_size <= _SMALL_VOCABULARY:
            for index in plain:
                params, number = rows[index].params, uniform(rows[index].params.seed, rows[index].num_output)
                chosen[index] = draw_row(scores[index].numpy(), float(peaks[index]), params, number)
            plain = []
        for part in self._parts(plain):
            chosen[torch.tensor(part, device=self.device)] = self._draw_by_id(scores, peaks, rows, part)
        by_size: dict[int, list[int]] = {}
        for index in ranked:
            by_size.setdefault(self._first_size(rows[index].params), []).append(index)
        for size, alike in by_size.items():
            for part in self._parts(alike):
                self._draw_by_rank(scores, peaks, rows, part, size, chosen)

        token_ids: list[int] = chosen.tolist()
        sampled = [Sampled(token_id) for token_id in token_ids]
        for part in self._parts([index for index, row in enumerate(rows) if row.params.logprobs is not None]):
            for index, entry in zip(part, self._with_logprobs(logits, rows, part, chosen), strict=True):
                sampled[index] = entry
        return sampled

    def _ranks(self, params: SamplingParams) -> bool:
        return params.top_p < 1.0 or (params.top_k is not None and params.top_k < self.vocab_size)

    def _first_size(self, params: SamplingParams) -> int:
        """How many of a row's candidates are looked at first: its top-k, up to the next of a few sizes.

        The row alone decides: one that wants thousands must not have its neighbours wait while theirs are found, too.
        """
        limited = params.top_k is not None and params.top_k < self.vocab_size
        wanted = max(params.top_k or 0, _FEWEST_CANDIDATES) if limited else _FIRST_CANDIDATES
        return min(1 << (wanted - 1).bit_length(), self.vocab_size)

    def _parts(self, indexes: list[int]) -> list[list[int]]:
        step = self._rows_at_once
        return [indexes[start : start + step] for start in range(0, len(indexes), step)]

    def _column(self, values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self.device).unsqueeze(1)

    def _uniforms(self, rows: Sequence[SampleRow], part: list[int]) -> Tensor:
        return self._column([uniform(rows[index].params.seed, rows[index].num_output) for index in part])

    def _weights(self, scores: Tensor, peaks: Tensor, rows: Sequence[SampleRow], part: list[int]) -> Tensor:
        """exp((x - max x) / T) in float64, 0 where min-p removes the token; the likeliest token has exactly 1."""
        weights = scores.double().sub_(peaks[torch.tensor(part, device=self.device)].unsqueeze(1))
        weights.div_(self._column([rows[index].params.temperature for index in part])).exp_()
        if any(rows[index].params.min_p > 0.0 for index in part):
            weights.masked_fill_(weights < self._column([rows[index].params.min_p for index in part]), 0.0)
        return weights

    def _draw_by_id(self, scores: Tensor, peaks: Tensor, rows: Sequence[SampleRow], part: list[int]) -> Tensor:
        weights = self._weights(_take(scores, part), peaks, rows, part)  # [part, vocab]
        cumulative = weights.cumsum(dim=-1)
        drawn = _invert(cumulative, cumulative[:, -1:] * self._uniforms(rows, part))
        # On a GPU a cumulative sum is computed in pieces and may step back by a rounding error, so that an impossible
        # token could be found: it is never returned.
        possible = weights.gather(1, drawn) > 0.0
        return torch.where(possible, drawn, weights.argmax(dim=-1, keepdim=True)).squeeze(1)

    def _draw_by_rank(
        self, scores: Tensor, peaks: Tensor, rows: Sequence[SampleRow], part: list[int], size: int, chosen: Tensor
    ) -> None:
        """Draw from the likeliest `size`, and from more of them where these do not hold top_p of the mass yet."""
        vocab_size = self.vocab_size
        unlimited = [index for index in part if (rows[index].params.top_k or vocab_size) >= vocab_size]
        masses = torch.zeros(len(rows), dtype=torch.float64, device=self.device)
        if unlimited:
            weights = self._weights(_take(scores, unlimited), peaks, rows, unlimited)
            masses[torch.tensor(unlimited, device=self.device)] = weights.sum(dim=-1)
            del weights

        pending = part
        while pending:
            picked = torch.tensor(pending, device=self.device)
            limit = self._column([rows[index].params.top_k or vocab_size for index in pending])
            values, ids = likeliest(_take(scores, pending), size)  # [pending, size]
            weights = self._weights(values, peaks, rows, pending)
            weights.masked_fill_(torch.arange(size, device=self.device) >= limit, 0.0)
            cumulative = weights.cumsum(dim=-1)
            mass = torch.where(limit < vocab_size, cumulative[:, -1:], masses[picked].unsqueeze(1))
            wanted = mass * self._column([rows[index].params.top_p for index in pending])
            reached = torch.searchsorted(cumulative, wanted)  # the first candidate with which top_p is reached
            # Neither rounding nor a number next to 1 may lead past the last candidate that is left.
            last = torch.minimum(reached, (weights > 0.0).sum(dim=-1, keepdim=True) - 1)
            drawn = _invert(cumulative, cumulative.gather(1, last) * self._uniforms(rows, pending))
            drawn = torch.minimum(drawn, last)
            chosen[picked] = ids.gather(1, drawn).squeeze(1)
            if size == vocab_size:
                return
            pending = [index for index, rank in zip(pending, reached.squeeze(1).tolist(), strict=True) if rank == size]
            size = size * _CANDIDATE_GROWTH if size * _CANDIDATE_GROWTH <= vocab_size * _SORT_FROM else vocab_size

    def _with_logprobs(
        self, logits: Tensor, rows: Sequence[SampleRow], part: list[int], chosen: Tensor
    ) -> list[Sampled]:
        raw = _take(logits, part)
        logprobs = raw.log_softmax(dim=-1, dtype=torch.float64)  # [part, vocab]
        token_ids = chosen[torch.tensor(part, device=self.device)]
        chosen_logprobs: list[float] = logprobs.gather(1, token_ids.unsqueeze(1)).squeeze(1).tolist()
        numbers = [rows[index].params.logprobs or 0 for index in part]
        top_ids: list[list[int]] = [[] for _ in part]
        top_logprobs: list[list[float]] = [[] for _ in part]
        if any(numbers):
            _, ids = likeliest(raw, max(numbers))
            top_ids, top_logprobs = ids.tolist(), logprobs.gather(1, ids).tolist()
        return [
            Sampled(
                token_id,
                logprob,
                tuple(
                    (other, value)
                    for other, value in zip(ids_of_row[:number], values_of_row[:number], strict=True)
                    if value > -math.inf
                ),
            )
            for token_id, logprob, number, ids_of_row, values_of_row in zip(
                token_ids.tolist(), chosen_logprobs, numbers, top_ids, top_logprobs, strict=True
            )
        ]


def _largest(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of every row and its id, of equals the lowest; NaN and its id where a row holds one."""
    if scores.device.type != "cpu":
        peaks, ids = scores.max(dim=-1)
        return peaks, ids
    # numpy's is three to ten times as fast as torch's: at 16 x 128,256 a millisecond less.
    array = scores.numpy()
    first = array.argmax(axis=1)
    return torch.from_numpy(array[np.arange(len(array)), first]), torch.from_numpy(first)


def _check_peaks(peaks: Tensor) -> None:
    # A row's maximum is NaN if it holds a NaN, +inf if it holds one, and -inf if there is nothing else.
    values: list[float] = peaks.tolist()
    bad = tuple(index for index, value in enumerate(values) if not math.isfinite(value))
    if bad:
        raise NonFiniteLogits(bad, len(values))


def _take(tensor: Tensor, indexes: list[int]) -> Tensor:
    """The listed rows, which are in ascending order; no copy is made where they are all."""
    if len(indexes) == tensor.shape[0]:
        return tensor
    return tensor.index_select(0, torch.tensor(indexes, device=tensor.device))


def _invert(cumulative: Tensor, target: Tensor) -> Tensor:
    """The first place where the cumulative weight is above `target`: [rows, 1]."""
    return torch.searchsorted(cumulative, target, right=True).clamp_(max=cumulative.shape[1] - 1)
