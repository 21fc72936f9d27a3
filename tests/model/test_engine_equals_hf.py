"""Greedy tokens of every architecture equal transformers', whatever the cache, the batch and the pool do meanwhile."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from edgekv.core.scheduler import Limits
from edgekv.model.causal_lm import CausalLM
from edgekv.model.native_lm import NativeLM
from tests.model.engine_harness import EngineHarness, load, load_on_kernels
from tests.model.tiny_models import ARCHITECTURES, make_tiny

VOCAB = 199
NEW_TOKENS = 64


def random_prompt(length: int, seed: int) -> list[int]:
    ids: list[int] = torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return ids


LONG = random_prompt(300, 1)
# Mixed lengths; the last three share a beginning with LONG, to a block's edge, within a block, and but for one token.
PROMPTS = [
    LONG,
    random_prompt(1, 2),
    random_prompt(16, 3),
    random_prompt(77, 4),
    random_prompt(129, 5),
    LONG[:160] + random_prompt(30, 6),
    LONG[:171] + random_prompt(9, 7),
    [*LONG[:299], (LONG[299] + 1) % VOCAB],
]


@dataclass(frozen=True)
class Case:
    model: CausalLM | NativeLM
    expected: list[list[int]]  # transformers' greedy continuation of each prompt


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=[*ARCHITECTURES, *(f"{name}-on-kernels" for name in ARCHITECTURES)])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    name, _, native = request.param.partition("-")
    folder = tmp_path_factory.mktemp(request.param)
    model: CausalLM | NativeLM
    if native:
        # The kernels take heads of a multiple of 16.
        shape = {"hidden_size": 96} if name == "qwen2" else {"head_dim": 32 if name == "gemma3" else 16}
        model = load_on_kernels(make_tiny(name, folder, vocab_size=VOCAB, **shape), threads=2)
    else:
        model = load(make_tiny(name, folder, vocab_size=VOCAB))
    expected = greedy_as_transformers(folder, model)
    assert len({token for output in expected for token in output}) > 10, "a model that repeats itself proves nothing"
    return Case(model, expected)


def greedy_as_transformers(folder: Path, model: CausalLM | NativeLM) -> list[list[int]]:
    """Our continuation of each prompt alone, once every logit of it is within 1e-4 of transformers'.

    transformers reads prompt and continuation in one pass. Where its likeliest token at each place is the one that
    follows, its own greedy continuation is this very one.
    """
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    outputs = []
    for prompt in PROMPTS:
        engine = EngineHarness(model, prefix=False)
        output = engine.generate(prompt, NEW_TOKENS)
        with torch.inference_mode():
            read = theirs(torch.tensor([prompt + output]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        assert (torch.stack(engine.logits) - read).abs().max() <= 1e-4
        assert read.argmax(-1).tolist() == output
        outputs.append(output)
    return outputs


def test_alone_and_in_chunks(case: Case) -> None:
    for most in (512, 50, 7):
        engine = EngineHarness(case.model, limits=Limits(max_step_tokens=most), prefix=False)
        assert engine.generate(LONG) == case.expected[0]


def test_eight_mixed_lengths_at_once(case: Case) -> None:
    engine = EngineHarness(case.model, limits=Limits(max_step_tokens=100, mixed_step_tokens=40), prefix=False)
    numbers = [engine.submit(prompt) for prompt in PROMPTS]
    outputs = engine.run()
    assert [outputs[n] for n in numbers] == case.expected


def test_with_prefix_hits(case: Case) -> None:
    engine = EngineHarness(case.model)
    assert [engine.generate(prompt) for prompt in PROMPTS] == case.expected
    assert [engine.generate(prompt) for prompt in PROMPTS] == case.expected
    cached = list(engine.cached.values())
    assert cached[:8] == [0, 0, 0, 0, 0, 160, 171, 299]
    assert cached[8:] == [len(prompt) - 1 for prompt in PROMPTS]


def test_with_preemption_in_a_tiny_pool_across_segments(case: Case) -> None:
    # 23 blocks hold one of the longest sequences (300 + 64 tokens); eight of them compete for four small segments.
    engine = EngineHarness(case.model, blocks=24, segment_blocks=8, limits=Limits(max_step_tokens=64))
    numbers = [engine.submit(prompt) for prompt in PROMPTS]
    outputs = engine.run()
    assert [outputs[n] for n in numbers] == case.expected
    assert engine.core.stats().preemptions > 0
    assert engine.core.stats().evictions > 0


def test_while_the_pool_shrinks_under_it(case: Case) -> None:
    engine = EngineHarness(case.model, blocks=88, segment_blocks=8, limits=Limits(max_step_tokens=64))
    numbers = [engine.submit(prompt) for prompt in PROMPTS]
    moved = 0
    for step in range(1, 41):
        engine.step()
        if step % 5 == 0:
            tables = {s.id: list(s.block_table) for s in engine.scheduler.running}
            engine.shrink(1)
            moved += sum(s.block_table != tables[s.id] for s in engine.scheduler.running)
    assert moved > 0, "no live block was moved"
    assert engine.memory.num_blocks == 88 - 8 * 8
    assert engine.ledger.leased_bytes == engine.memory.num_bytes
    outputs = engine.run()
    assert [outputs[n] for n in numbers] == case.expected


def test_while_the_pool_shrinks_below_its_promises_and_grows_again_at_any_time(case: Case) -> None:
    engine = EngineHarness(case.model, blocks=64, segment_blocks=8, limits=Limits(max_step_tokens=64))
    segment_bytes, chance = 8 * engine.memory.block_bytes, random.Random(1)
    numbers = [engine.submit(prompt) for prompt in PROMPTS]
    sizes = set()
    for _ in range(60):
        for _ in range(chance.randrange(1, 6)):
            engine.step()
        segments = chance.randrange(1, 9)
        if chance.random() < 0.5:
            engine.resize(shrink_bytes=segments * segment_bytes)
        else:
            engine.resize(grow_bytes=segments * segment_bytes)
        sizes.add(engine.memory.num_blocks)
    assert {0, 64} <= sizes, "from nothing to everything"
    engine.resize(grow_bytes=64 * segment_bytes)
    outputs = engine.run()
    assert [outputs[n] for n in numbers] == case.expected
    assert engine.core.stats().preemptions > 0


def test_two_salts_share_nothing(case: Case) -> None:
    engine = EngineHarness(case.model)
    first = engine.submit(LONG, 2, salt=b"a")
    engine.run()
    second, third = engine.submit(LONG, 2, salt=b"b"), engine.submit(LONG, 2, salt=b"a")
    engine.run()
    assert (engine.cached[first], engine.cached[second], engine.cached[third]) == (0, 0, 299)


def test_seeded_sampling_does_not_depend_on_company_chunks_or_preemption(case: Case) -> None:
    alone = [EngineHarness(case.model).generate(prompt, 24, seed=i) for i, prompt in enumerate(PROMPTS)]
    engine = EngineHarness(case.model, blocks=24, segment_blocks=8, limits=Limits(max_step_tokens=33))
    numbers = [engine.submit(prompt, 24, seed=i) for i, prompt in enumerate(PROMPTS)]
    outputs = engine.run()
    assert [outputs[n] for n in numbers] == alone
