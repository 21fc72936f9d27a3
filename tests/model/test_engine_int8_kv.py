"""Keys and values in int8 through the whole engine: the same tokens whatever the cache, the batch and the pool do."""

from collections.abc import Iterator

import pytest
import torch

from edgekv.core.scheduler import Limits
from edgekv.model.native_lm import NativeLM
from tests.model.engine_harness import EngineHarness, load_on_kernels
from tests.model.test_engine_equals_hf import LONG, PROMPTS, VOCAB
from tests.model.tiny_models import make_tiny

NEW_TOKENS = 32


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> NativeLM:
    return load_on_kernels(make_tiny("llama", tmp_path_factory.mktemp("tiny"), vocab_size=VOCAB, head_dim=16))


@pytest.fixture(scope="module")
def expected(model: NativeLM) -> list[list[int]]:
    """Of each prompt alone, in one chunk."""
    alone = [EngineHarness(model, prefix=False, kv_format="int8").generate(prompt, NEW_TOKENS) for prompt in PROMPTS]
    assert len({token for output in alone for token in output}) > 10, "a model that repeats itself proves nothing"
    return alone


def test_logits_are_near_those_of_a_cache_in_float32(model: NativeLM) -> None:
    rows = []
    for kv_format in ("float32", "int8"):
        engine = EngineHarness(model, prefix=False, kv_format=kv_format)  # type: ignore[arg-type]
        engine.generate(LONG, 1)
        rows.append(engine.logits[0])
    difference = float((rows[0] - rows[1]).abs().max() / rows[0].abs().max())
    assert 0 < difference < 0.02


def test_in_chunks_and_all_at_once(model: NativeLM, expected: list[list[int]]) -> None:
    engine = EngineHarness(
        model, limits=Limits(max_step_tokens=50, mixed_step_tokens=40), prefix=False, kv_format="int8"
    )
    numbers = [engine.submit(prompt, NEW_TOKENS) for prompt in PROMPTS]
    outputs = engine.run()
    assert [outputs[number] for number in numbers] == expected


def test_with_prefix_hits_that_end_within_a_block(model: NativeLM, expected: list[list[int]]) -> None:
    """Blocks that are copied in part keep the scales of what they keep."""
    engine = EngineHarness(model, kv_format="int8")
    assert [engine.generate(prompt, NEW_TOKENS) for prompt in PROMPTS] == expected
    assert [engine.generate(prompt, NEW_TOKENS) for prompt in PROMPTS] == expected
    assert list(engine.cached.values())[:8] == [0, 0, 0, 0, 0, 160, 171, 299]


def test_with_preemption_and_while_the_pool_shrinks(model: NativeLM, expected: list[list[int]]) -> None:
    engine = EngineHarness(
        model, blocks=32, segment_blocks=8, limits=Limits(max_step_tokens=64), kv_format="int8"
    )
    numbers = [engine.submit(prompt, NEW_TOKENS) for prompt in PROMPTS]
    for _ in range(4):
        engine.step()
    assert engine.shrink(8 * engine.memory.block_bytes) > 0
    outputs = engine.run()
    assert [outputs[number] for number in numbers] == expected
    assert engine.core.stats().preemptions > 0
