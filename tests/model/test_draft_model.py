"""With a draft model, sequences say what they say without: however good it is, and whatever becomes of its memory."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from edgekv.core.sampling import SamplingParams
from edgekv.core.scheduler import Limits
from edgekv.core.sequence import FinishReason
from edgekv.model.causal_lm import CausalLM
from edgekv.model.native_lm import NativeLM
from tests.model.draft_harness import DraftedHarness, Pool
from tests.model.engine_harness import EngineHarness, load, load_on_kernels
from tests.model.test_speculation import VOCAB, Answer, Ask, prompts, settings
from tests.model.tiny_models import make_tiny

Model = CausalLM | NativeLM


@dataclass(frozen=True)
class Models:
    """`itself`: the target a second time. `other`: one that has nothing in common with it."""

    target: Model
    itself: Model
    other: Model

    @property
    def is_exact(self) -> bool:
        """Whether a row's logits are the same bits in every batch."""
        return isinstance(self.target, NativeLM)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["torch", "kernels"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Models:
    def make(arch: str, seed: int, **shape: Any) -> Model:
        folder: Path = make_tiny(arch, tmp_path_factory.mktemp(arch), seed=seed, vocab_size=VOCAB, **shape)
        return load(folder) if request.param == "torch" else load_on_kernels(folder)

    shape = {"head_dim": 16, "hidden_size": 48, "num_hidden_layers": 2}
    # The other's keys and values are of another size.
    return Models(make("llama", 0, **shape), make("llama", 0, **shape), make("qwen3", 5, num_hidden_layers=1))


def run(engine: EngineHarness, asked: list[Ask]) -> list[Answer]:
    numbers = [engine.ask(prompt, sampling) for prompt, sampling in asked]
    engine.run()
    return said(engine, numbers)


def said(engine: EngineHarness, numbers: list[int]) -> list[Answer]:
    return [([out.sampled for out in engine.said[n]], engine.reasons[n]) for n in numbers]


def same(found: list[Answer], plain: list[Answer], models: Models) -> None:
    for (one, reason), (other, expected) in zip(found, plain, strict=True):
        assert [each.token_id for each in one] == [each.token_id for each in other]
        assert reason == expected
        if models.is_exact:
            assert one == other
        for each, its in zip(one, other, strict=True):
            assert each.logprob == pytest.approx(its.logprob, abs=1e-4)


def asks(count: int, seed: int, **changes: Any) -> list[Ask]:
    chance = random.Random(seed)
    return [
        (prompt, replace(settings(number, chance), **changes)) for number, prompt in enumerate(prompts(count, seed + 1))
    ]


def plain_answers(models: Models, asked: list[Ask]) -> list[Answer]:
    return run(EngineHarness(models.target, limits=Limits(max_sequences=8)), asked)


def test_a_draft_that_is_the_target_is_right_whatever_the_way_to_sample(models: Models) -> None:
    asked = asks(44, 1)
    plain = plain_answers(models, asked)
    assert {reason for _, reason in plain} == {FinishReason.STOP, FinishReason.LENGTH}
    for batch, k in ((1, 4), (4, 8), (8, 1)):
        engine = DraftedHarness(models.target, models.itself, k, Pool(), limits=Limits(max_sequences=batch))
        same(run(engine, asked), plain, models)
        stats = engine.core.stats()
        assert stats.proposed_tokens > 150
        assert stats.accepted_tokens >= stats.proposed_tokens * (1.0 if models.is_exact else 0.98)


def test_a_draft_that_has_nothing_in_common_with_the_target_changes_nothing(models: Models) -> None:
    asked = asks(33, 3)
    plain = plain_answers(models, asked)
    for batch, k in ((1, 3), (4, 8)):
        engine = DraftedHarness(models.target, models.other, k, Pool(), limits=Limits(max_sequences=batch))
        same(run(engine, asked), plain, models)
        stats = engine.core.stats()
        assert stats.proposed_tokens > 300
        # Two distributions of 199 tokens that are drawn from with the same number agree now and then.
        assert stats.accepted_tokens < stats.proposed_tokens * 0.2


@pytest.mark.parametrize("k", range(1, 9))
def test_every_number_of_tokens(models: Models, k: int) -> None:
    asked = asks(11, 10 + k)
    plain = plain_answers(models, asked)
    for draft in (models.itself, models.other):
        engine = DraftedHarness(models.target, draft, k, Pool(), limits=Limits(max_sequences=(1, 4, 8)[k % 3]))
        same(run(engine, asked), plain, models)
        assert engine.core.stats().proposed_tokens > 20


@pytest.mark.parametrize("name", ["itself", "other"])
@pytest.mark.parametrize("prefix", [True, False])
def test_in_chunks_with_prefix_hits_and_preemption_in_two_small_pools(models: Models, name: str, prefix: bool) -> None:
    asked = asks(14, 30, max_tokens=40, stop_token_ids=frozenset())
    plain = plain_answers(models, asked)
    limits = Limits(max_sequences=6, max_step_tokens=30, mixed_step_tokens=24)
    # Seven blocks hold the longest of them (69 + 40 tokens).
    pool = Pool(blocks=9, segment_blocks=4, prefix=prefix, max_step_tokens=20)
    engine = DraftedHarness(models.target, getattr(models, name), 4, pool, limits=limits, blocks=9, segment_blocks=4)
    for _ in range(2):
        same(run(engine, asked), plain, models)
    stats = engine.core.stats()
    assert stats.preemptions > 0
    assert stats.cached_prompt_tokens > 0
    assert stats.proposed_tokens > 50
    assert stats.speculation is not None
    assert stats.speculation.read_tokens > 0
    assert not engine.guesser.views._views


def test_stop_tokens_and_max_tokens_in_the_middle_of_what_is_accepted(models: Models) -> None:
    long = SamplingParams(max_tokens=40, temperature=0.9, seed=3)
    asked: list[Ask] = [(prompt, long) for prompt in prompts(16, 8)]
    endless = plain_answers(models, asked)
    ends: list[Ask] = []
    for number, (prompt, _) in enumerate(asked):
        last = 2 + number % 20
        token = endless[number][0][last].token_id
        changes = {"max_tokens": last + 1} if number % 2 else {"stop_token_ids": frozenset({token})}
        ends.append((prompt, replace(long, **changes)))
    plain = plain_answers(models, ends)
    engine = DraftedHarness(models.target, models.itself, 8, Pool(), limits=Limits(max_sequences=4))
    same(run(engine, ends), plain, models)
    # The draft sees each end and proposes nothing beyond it.
    stats = engine.core.stats()
    assert stats.accepted_tokens > sum(len(answer) for answer, _ in plain) * 0.6
    assert stats.steps < sum(len(answer) for answer, _ in plain) / 2


@pytest.mark.parametrize("whole", [False, True], ids=["keys and values", "all of it"])
def test_memory_given_back_in_mid_answer_changes_nothing_and_guesses_go_on_when_it_is_back(
    models: Models, whole: bool
) -> None:
    sampling = SamplingParams(max_tokens=90, temperature=0.9, seed=5)
    asked: list[Ask] = [(prompt, replace(sampling, seed=n)) for n, prompt in enumerate(prompts(3, 40))]
    plain = plain_answers(models, asked)
    engine = DraftedHarness(models.target, models.itself, 3, Pool())
    target_bytes = engine.segments.num_bytes
    numbers = [engine.ask(prompt, sampling) for prompt, sampling in asked]

    def verified(steps: int) -> int:
        before = engine.core.stats().proposed_tokens
        for _ in range(steps):
            engine.step()
        return engine.core.stats().proposed_tokens - before

    assert verified(8) > 0
    kv_bytes = engine.pool_of_draft.num_bytes
    engine.resize(shrink_bytes=kv_bytes + whole)
    assert engine.draft_memory.num_bytes == (0 if whole else engine.shared.num_bytes - target_bytes)
    assert engine.segments.num_bytes == target_bytes
    engine.step()
    assert verified(6) == 0
    stats = engine.core.stats().speculation
    assert stats is not None
    assert (stats.state, stats.yields, stats.returns) == ("yielded", 1, 0)
    engine.resize(grow_bytes=1 << 30)
    engine.step()  # reports the order
    assert verified(2) > 0, "what was said meanwhile is read and guessed from at once"
    assert engine.loads == 1 + whole
    stats = engine.core.stats().speculation
    assert stats is not None
    assert (stats.state, stats.yields, stats.returns) == ("on", 1, 1)
    engine.run()
    same(said(engine, numbers), plain, models)
    assert engine.guesser.pool.total_blocks == 64


def test_while_both_pools_shrink_and_grow_by_any_amount(models: Models) -> None:
    chance = random.Random(6)
    asked = asks(20, 50, max_tokens=30)
    plain = plain_answers(models, asked)
    engine = DraftedHarness(
        models.target, models.itself, 4, Pool(blocks=24, segment_blocks=4), blocks=24, segment_blocks=4
    )
    all_bytes = engine.shared.num_bytes
    numbers = [engine.ask(prompt, sampling) for prompt, sampling in asked]
    while engine.core.busy and any(n not in engine.reasons for n in numbers):
        engine.step()
        if chance.random() < 0.25:
            engine.resize(shrink_bytes=int(chance.random() ** 2 * all_bytes))
        elif chance.random() < 0.6:
            engine.resize(grow_bytes=int(chance.random() * all_bytes))
    same(said(engine, numbers), plain, models)
    stats = engine.core.stats()
    assert stats.preemptions > 0
    assert stats.accepted_tokens > 20
    assert engine.guesser.yields > 1
    assert engine.guesser.returns > 1


def test_a_draft_that_knows_fewer_tokens_and_a_shorter_context(models: Models, tmp_path: Path) -> None:
    shape = {"max_position_embeddings": 48, "num_hidden_layers": 1, "head_dim": 16}
    folder = make_tiny("llama", tmp_path, seed=9, vocab_size=120, **shape)
    small = load_on_kernels(folder) if models.is_exact else load(folder)
    bias = tuple((token, 1.0) for token in range(100, 140))
    asked = asks(22, 60, max_tokens=40, logit_bias=bias)
    plain = plain_answers(models, asked)
    engine = DraftedHarness(models.target, small, 4, Pool(), limits=Limits(max_sequences=4))
    same(run(engine, asked), plain, models)
    assert engine.core.stats().proposed_tokens > 5


def test_a_draft_that_computes_nothing_but_nan(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = asks(8, 70)
    plain = plain_answers(models, asked)
    engine = DraftedHarness(models.target, models.itself, 4, Pool())
    pipeline = engine.guesser.pipeline
    forward, steps = pipeline.runner.forward, 0  # type: ignore[union-attr]

    def spoilt(plan: Any) -> torch.Tensor:
        nonlocal steps
        steps += 1
        logits: torch.Tensor = forward(plan)
        return torch.full_like(logits, torch.nan) if steps > 3 else logits

    monkeypatch.setattr(pipeline.runner, "forward", spoilt)  # type: ignore[union-attr]
    same(run(engine, asked), plain, models)
    assert steps <= 3 + len(asked), "each sequence is given up at once"
