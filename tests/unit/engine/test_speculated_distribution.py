"""Over many draws, what sequences say with proposals follows the exact distribution, for every way to sample.

That it does is no news where each token equals the one without proposals; this is the same promise from the other side,
and it would hold a proposer to it that is accepted by other means.
"""

import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Listing
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from edgekv.core.block_pool import BlockPool
from edgekv.core.kv_cache import KVCache
from edgekv.core.sampling import SamplingParams
from edgekv.core.scheduler import Limits, Outcome, Scheduler
from edgekv.core.sequence import Sequence, SequenceSpec
from edgekv.core.step import Chunk, Sampled, StepPlan
from edgekv.engine.core import EngineCore
from edgekv.engine.proposer import Proposer
from edgekv.engine.sample_row import SampleRow
from edgekv.engine.sampler import Sampler
from tests.unit.engine.test_sampler import reference_distribution, reference_scores

VOCAB, LENGTH = 6, 3
SEQUENCES, AT_ONCE = 17_000, 100  # of three tokens each: 51,000 draws
PROMPT = (0, 3)
LOGITS = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(1)) * 0.8  # of the next token, by the last


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Table:
    """A model that looks at the last token only."""

    def forward(self, plan: StepPlan) -> Tensor:
        rows = [token for chunk in plan.sampling for token in chunk.token_ids[-chunk.sampled :]]
        return LOGITS[torch.tensor(rows)]


class Likeliest(Proposer):
    """Proposes what the model thinks likeliest, or with some chance anything: a draft that is often right."""

    def __init__(self) -> None:
        self.chance = random.Random(3)
        self.accepted = 0

    def propose(self, sequences: Listing[Sequence], most: Mapping[int, int]) -> Mapping[int, tuple[int, ...]]:
        likeliest: list[int] = LOGITS.argmax(dim=1).tolist()
        found: dict[int, tuple[int, ...]] = {}
        for sequence in sequences:
            token, proposed = sequence.tokens[-1], list[int]()
            for _ in range(most[sequence.id]):
                token = likeliest[token] if self.chance.random() < 0.7 else self.chance.randrange(VOCAB)
                proposed.append(token)
            found[sequence.id] = tuple(proposed)
        return found

    def observe(self, sequence_id: int, proposed: int, accepted: int) -> None:
        self.accepted += accepted

    def forget(self, sequence_id: int) -> None:
        """It knows nothing of sequences."""


class BiasedScheduler(Scheduler):
    """Planted: a proposal is accepted with the chance 0.2 although another token was drawn."""

    chance = random.Random(8)

    def _take_tokens(self, chunk: Chunk, choices: list[Sampled]) -> Outcome:  # type: ignore[override]
        for place, proposal in enumerate(chunk.proposed):
            if choices[place].token_id != proposal and self.chance.random() < 0.2:
                choices[place] = Sampled(proposal)
        return super()._take_tokens(chunk, choices)


class AcceptsWithP(Scheduler):
    """Planted: a proposal is accepted with its chance p under the model, not with min(1, p / q) nor for being drawn.

    The others are said as they were drawn.
    """

    chance = random.Random(9)

    def _take_tokens(self, chunk: Chunk, choices: list[Sampled]) -> Outcome:  # type: ignore[override]
        last = chunk.sequence.tokens[-1]
        for place, proposal in enumerate(chunk.proposed):
            if self.chance.random() < float(LOGITS[last].softmax(0)[proposal]):
                choices[place] = Sampled(proposal)
            last = proposal
        return super()._take_tokens(chunk, choices)


def spoken(params: SamplingParams, scheduler_class: type[Scheduler]) -> Counter[tuple[int, ...]]:
    pool = BlockPool(block_size=16, segment_blocks=1 << 16)
    pool.add_segment(2 * AT_ONCE + 1)
    tokens = 4 * AT_ONCE
    scheduler = scheduler_class(KVCache(pool, None), Limits(AT_ONCE, tokens, tokens))
    proposer = Likeliest()
    core = EngineCore(scheduler, Table(), Sampler(VOCAB, "cpu"), VOCAB, proposer=proposer)
    outputs: dict[int, list[int]] = {number: [] for number in range(SEQUENCES)}
    for first in range(0, SEQUENCES, AT_ONCE):
        for number in range(first, first + AT_ONCE):
            core.submit(SequenceSpec(number, PROMPT, replace(params, max_tokens=LENGTH, seed=number)))
        while core.busy:
            for out in core.step().tokens:
                outputs[out.sequence_id].append(out.sampled.token_id)
    assert proposer.accepted > SEQUENCES / 10
    return Counter(map(tuple, outputs.values()))


def expected(params: SamplingParams) -> dict[tuple[int, ...], float]:
    """The chance of every output, by the definitions."""

    @cache
    def after(output: tuple[int, ...]) -> list[tuple[int, float]]:
        tokens = [*PROMPT, *output]
        scores = reference_scores(LOGITS[tokens[-1]].tolist(), SampleRow(params, tokens, len(PROMPT)))
        return reference_distribution(scores, params)

    chances: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(LENGTH):
        chances = {(*said, token): chance * share for said, chance in chances.items() for token, share in after(said)}
    return chances


def p_value(counts: Counter[tuple[int, ...]], chances: dict[tuple[int, ...], float]) -> float:
    """Of a chi-square test; outputs that are expected fewer than ten times count as one."""
    if not counts.keys() <= chances.keys():
        return 0.0
    often = [(counts[said], share * SEQUENCES) for said, share in chances.items() if share * SEQUENCES >= 10]
    rest = SEQUENCES - math.fsum(e for _, e in often)
    if rest >= 10:
        often.append((SEQUENCES - sum(n for n, _ in often), rest))
    chi_square = sum((n - e) ** 2 / e for n, e in often)
    half = torch.tensor([(len(often) - 1) / 2, chi_square / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def params(**changes: object) -> SamplingParams:
    return replace(SamplingParams(max_tokens=LENGTH), **changes)  # type: ignore[arg-type]


WAYS = {
    "temperature": params(temperature=1.5),
    "top-k": params(top_k=3),
    "top-p": params(top_p=0.8),
    "min-p": params(min_p=0.2),
    "repetition penalty": params(repetition_penalty=1.5),
    "presence and frequency": params(presence_penalty=0.8, frequency_penalty=0.4),
    "bias": params(logit_bias=((2, 1.5), (4, -1.0))),
    "all": params(temperature=1.3, top_k=5, top_p=0.95, min_p=0.02, repetition_penalty=1.2, logit_bias=((1, 1.0),)),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_said_follows_the_exact_distribution(way: str) -> None:
    assert p_value(spoken(WAYS[way], Scheduler), expected(WAYS[way])) > 1e-3


@pytest.mark.parametrize("biased", [BiasedScheduler, AcceptsWithP])
@pytest.mark.parametrize("way", ["temperature", "top-p"])
def test_a_bias_towards_what_is_proposed_is_found(way: str, biased: type[Scheduler]) -> None:
    assert p_value(spoken(WAYS[way], biased), expected(WAYS[way])) < 1e-9
