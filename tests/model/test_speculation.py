"""Whatever is proposed, sequences say what they say without: token for token, in every way to sample and to be run."""

import random
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Listing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from edgekv.core.sampling import SamplingParams
from edgekv.core.scheduler import Limits
from edgekv.core.sequence import FinishReason, Sequence
from edgekv.core.speculation import Controller
from edgekv.core.step import Sampled
from edgekv.engine.ngram import NGramProposer
from edgekv.engine.proposer import Proposer
from edgekv.model.causal_lm import CausalLM
from edgekv.model.native_lm import NativeLM
from tests.model.engine_harness import EngineHarness, load, load_on_kernels
from tests.model.tiny_models import make_tiny

VOCAB = 199
Model = CausalLM | NativeLM
Ask = tuple[list[int], SamplingParams]
Answer = tuple[list[Sampled], FinishReason]


@dataclass
class Guesser(Proposer):
    """Knows what each prompt is answered with, and proposes up to `k` tokens that are each right with a chance."""

    k: int
    right: float
    answers: Mapping[tuple[tuple[int, ...], SamplingParams], list[int]]
    chance: random.Random = field(default_factory=lambda: random.Random(5))
    proposed: int = 0
    accepted: int = 0

    def propose(self, sequences: Listing[Sequence], most: Mapping[int, int]) -> Mapping[int, tuple[int, ...]]:
        found: dict[int, tuple[int, ...]] = {}
        for sequence in sequences:
            spec, said = sequence.spec, sequence.num_output
            answer = self.answers[spec.prompt, spec.sampling][said : said + min(self.k, most[sequence.id])]
            found[sequence.id] = tuple(
                token if self.chance.random() < self.right else (token + self.chance.randrange(1, VOCAB)) % VOCAB
                for token in answer
            )
        return found

    def observe(self, sequence_id: int, proposed: int, accepted: int) -> None:
        self.proposed += proposed
        self.accepted += accepted

    def forget(self, sequence_id: int) -> None:
        """It knows nothing of sequences."""


def prompts(count: int, seed: int) -> list[list[int]]:
    """Random ones, of which some repeat themselves and some begin alike."""
    chance = random.Random(seed)
    common = [chance.randrange(VOCAB) for _ in range(40)]
    found = []
    for number in range(count):
        own = [chance.randrange(VOCAB) for _ in range(chance.randrange(1, 24))]
        found.append([own * 3, common[: chance.randrange(1, 40)] + own, own][number % 3])
    return found


def settings(number: int, chance: random.Random) -> SamplingParams:
    """Every option by turns, alone and together; stops are tokens that come up."""
    params = SamplingParams(max_tokens=chance.randrange(1, 28), seed=number, temperature=0.0)
    options: list[dict[str, Any]] = [
        {},
        {"temperature": 0.9},
        {"temperature": 1.4, "top_k": 20},
        {"temperature": 1.2, "top_p": 0.8},
        {"temperature": 1.5, "min_p": 0.1},
        {"repetition_penalty": 1.6},
        {"temperature": 0.8, "presence_penalty": 0.9, "frequency_penalty": 0.7},
        {"frequency_penalty": 1.5},
        {"temperature": 1.0, "logit_bias": tuple((token, 4.0) for token in range(3, 9))},
        {"logprobs": 3},
        {"temperature": 0.9, "top_p": 0.9, "repetition_penalty": 1.2, "logprobs": 0},
    ]
    params = replace(params, **options[number % len(options)])
    if number % 3 == 0:
        params = replace(params, stop_token_ids=frozenset(range(number % 7, VOCAB, 9)), min_tokens=number % 5)
    return params


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["torch", "kernels"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder: Path = make_tiny(
        "llama", tmp_path_factory.mktemp("tiny"), vocab_size=VOCAB, head_dim=16, hidden_size=48, num_hidden_layers=2
    )
    return load(folder) if request.param == "torch" else load_on_kernels(folder)


def answers(model: Model, asked: list[Ask], batch: int, proposer: Proposer | None = None, **options: Any) -> "Answers":
    engine = EngineHarness(model, proposer=proposer, **{"limits": Limits(max_sequences=batch), **options})
    numbers = [engine.ask(prompt, sampling) for prompt, sampling in asked]
    engine.run()
    return Answers(engine, [([out.sampled for out in engine.said[n]], engine.reasons[n]) for n in numbers])


@dataclass
class Answers:
    engine: EngineHarness
    each: list[Answer]

    @property
    def tokens(self) -> list[list[int]]:
        return [[sampled.token_id for sampled in said] for said, _ in self.each]

    def known(self, asked: list[Ask]) -> dict[tuple[tuple[int, ...], SamplingParams], list[int]]:
        return {(tuple(p), sampling): said for (p, sampling), said in zip(asked, self.tokens, strict=True)}


def same(speculated: Answers, plain: Answers) -> None:
    """Tokens, ends, and what is said of them, to the last bit on the kernels."""
    for (said, reason), (expected, expected_reason) in zip(speculated.each, plain.each, strict=True):
        assert [s.token_id for s in said] == [s.token_id for s in expected]
        assert reason == expected_reason
        if isinstance(speculated.engine.model, NativeLM):
            assert said == expected
        for one, other in zip(said, expected, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert [token for token, _ in one.top_logprobs] == [token for token, _ in other.top_logprobs]


def test_greedy_answers_of_200_prompts_for_every_number_of_proposals_and_batch(model: Model) -> None:
    greedy = SamplingParams(max_tokens=12, temperature=0.0)
    asked: list[Ask] = [(prompt, greedy) for prompt in prompts(200, 1)]
    plain = answers(model, asked, 8)
    assert len({token for said in plain.tokens for token in said}) > 50, "a model that repeats itself proves nothing"
    # The kernels are quick enough for all; torch has every number and every batch, not each with each.
    every = [(k, batch) for k in range(1, 9) for batch in (1, 4, 8)]
    few = [(k, (4, 8)[k % 2]) for k in range(1, 9)] + [(5, 1)]
    for k, batch in every if isinstance(model, NativeLM) else few:
        guesser = Guesser(k, 0.7, plain.known(asked))
        assert answers(model, asked, batch, guesser).tokens == plain.tokens, f"{k} proposals, {batch} at once"
        assert 0 < guesser.accepted < guesser.proposed


PROPOSERS: dict[str, Callable[[Mapping[Any, list[int]]], Proposer]] = {
    "always right": lambda known: Guesser(8, 1.0, known),
    "always wrong": lambda known: Guesser(5, 0.0, known),
    "half right": lambda known: Guesser(4, 0.5, known),
    "n-gram": lambda known: NGramProposer(longest=3, shortest=1),
}


@pytest.mark.parametrize("name", PROPOSERS)
def test_every_way_to_sample(model: Model, name: str) -> None:
    chance = random.Random(2)
    asked = [(prompt, settings(number, chance)) for number, prompt in enumerate(prompts(66, 3))]
    plain = answers(model, asked, 8)
    assert {reason for _, reason in plain.each} == {FinishReason.STOP, FinishReason.LENGTH}
    for batch in (1, 4):
        speculated = answers(model, asked, batch, PROPOSERS[name](plain.known(asked)))
        same(speculated, plain)
        stats = speculated.engine.core.stats()
        assert stats.proposed_tokens > 100
        assert (stats.accepted_tokens > 0) == (name != "always wrong")
        assert stats.accepted_tokens < stats.proposed_tokens or name == "always right"


@pytest.mark.parametrize("name", PROPOSERS)
def test_in_chunks_with_prefix_hits_and_preemption_in_a_small_pool(model: Model, name: str) -> None:
    chance = random.Random(4)
    lengthened = (replace(settings(number, chance), max_tokens=60) for number in range(18))
    asked = list(zip(prompts(18, 5), lengthened, strict=True))
    plain = answers(model, asked, 1, prefix=False)
    limits = Limits(max_sequences=6, max_step_tokens=30, mixed_step_tokens=24)
    # Nine blocks hold the longest of them (69 + 60 tokens).
    proposer = PROPOSERS[name](plain.known(asked))
    engine = EngineHarness(model, proposer=proposer, limits=limits, blocks=9, segment_blocks=4)
    for _ in range(2):
        numbers = [engine.ask(prompt, sampling) for prompt, sampling in asked]
        engine.run()
        again = Answers(engine, [([out.sampled for out in engine.said[n]], engine.reasons[n]) for n in numbers])
        same(again, plain)
    stats = engine.core.stats()
    assert stats.preemptions > 0
    assert stats.evictions > 0
    assert stats.cached_prompt_tokens > 0
    assert stats.proposed_tokens > 50


def test_while_the_pool_shrinks_below_its_promises_and_grows_again(model: Model) -> None:
    chance = random.Random(6)
    asked = [(prompt, settings(number, chance)) for number, prompt in enumerate(prompts(24, 7))]
    plain = answers(model, asked, 8)
    guesser = Guesser(6, 0.7, plain.known(asked))
    engine = EngineHarness(model, proposer=guesser, blocks=24, segment_blocks=4)
    numbers = [engine.ask(prompt, sampling) for prompt, sampling in asked]
    segment_bytes = 4 * engine.memory.block_bytes
    while engine.core.busy and any(n not in engine.reasons for n in numbers):
        engine.step()
        if chance.random() < 0.3:
            engine.resize(shrink_bytes=chance.randrange(1, 7) * segment_bytes)
        elif chance.random() < 0.6:
            engine.resize(grow_bytes=chance.randrange(1, 7) * segment_bytes)
    same(Answers(engine, [([out.sampled for out in engine.said[n]], engine.reasons[n]) for n in numbers]), plain)
    assert engine.core.stats().preemptions > 0
    assert 0 < guesser.accepted < guesser.proposed


def test_stop_tokens_and_max_tokens_in_the_middle_of_what_is_accepted(model: Model) -> None:
    long = SamplingParams(max_tokens=40, temperature=0.9, seed=3)
    asked = [(prompt, long) for prompt in prompts(30, 8)]
    endless = answers(model, asked, 8)
    ends: list[Ask] = []
    expected: list[list[int]] = []
    known: dict[Any, list[int]] = {}
    for number, (prompt, _) in enumerate(asked):
        said = endless.tokens[number]
        last = 2 + number % 20
        stops = {"max_tokens": last + 1} if number % 2 else {"stop_token_ids": frozenset({said[last]})}
        ends.append((prompt, replace(long, **stops)))
        expected.append(said[: last + 1 if number % 2 else said.index(said[last]) + 1])
        known[tuple(prompt), ends[-1][1]] = said  # the proposer goes on behind every end
    guesser = Guesser(8, 1.0, known)
    engine = EngineHarness(model, proposer=guesser, limits=Limits(max_sequences=4))
    numbers = [engine.ask(prompt, sampling) for prompt, sampling in ends]
    cut = 0
    while engine.core.busy:
        before = len(engine.reasons)
        proposed = engine.core.stats().proposed_tokens
        engine.step()
        cut += len(engine.reasons) > before and engine.core.stats().proposed_tokens > proposed
    assert [engine.outputs[n] for n in numbers] == expected
    assert [engine.reasons[n] for n in numbers] == [FinishReason.STOP, FinishReason.LENGTH] * 15
    for number in numbers:
        assert [out.is_stop for out in engine.said[number]][:-1].count(True) == 0
        assert engine.said[number][-1].is_stop == (engine.reasons[number] is FinishReason.STOP)
    assert cut > 10
    steps = engine.core.stats().steps
    assert steps * 4 < endless.engine.core.stats().steps * 8, "most tokens came several at once"


def test_with_a_controller_that_changes_its_mind(model: Model) -> None:
    chance = random.Random(9)
    asked = [(prompt, settings(number, chance)) for number, prompt in enumerate(prompts(40, 10))]
    plain = answers(model, asked, 8)
    controller = Controller(6)
    speculated = answers(model, asked, 4, Guesser(8, 0.8, plain.known(asked)), controller=controller)
    same(speculated, plain)
    assert speculated.engine.core.stats().accepted_tokens > 0
    assert not controller.seen._by_sequence, "whoever ended is forgotten"
