"""The meter over a real engine: what it times, what it counts, and what is in the cache of the sequences it times."""

import time
from itertools import pairwise

import pytest
import torch

from edgekv.core.step import StepPlan
from edgekv.demo import target_path
from edgekv.engine.assemble import assemble
from edgekv.engine.core import EngineCore
from edgekv.engine.measure import EngineMeter, StepTime, added, kv_bytes, prefill_flops, weight_bytes
from edgekv.engine.runner import Runner
from edgekv.engine.settings import EngineSettings
from edgekv.model.spec import ModelSpec, RopeSpec
from edgekv.smi.device import Place

CPU = Place("cpu", "cpu", "CPU", free_bytes=4 << 30)


@pytest.fixture(scope="module")
def core() -> EngineCore:
    settings = EngineSettings(target_path(), CPU, kv_budget=4 << 20, max_step_tokens=64, native=False)
    return assemble(settings, progress=lambda done, total, stage: None)[0]


def spec(**changes: object) -> ModelSpec:
    shape: dict[str, object] = {
        "architecture": "llama", "vocab_size": 50, "hidden_size": 8, "intermediate_size": 16, "num_layers": 2,
        "num_heads": 2, "num_kv_heads": 1, "head_dim": 4, "max_position_embeddings": 64, "windows": (None, 4),
        "ropes": (RopeSpec(1e4),) * 2, "rms_norm_eps": 1e-5, "attention_scale": 0.5, "tie_word_embeddings": True,
        "dtype": "float32",
    }  # fmt: skip
    return ModelSpec(**(shape | changes))  # type: ignore[arg-type]


def test_a_prompt_takes_as_many_steps_as_chunks_and_leaves_nothing_running(core: EngineCore) -> None:
    meter = EngineMeter(core, seed=1)
    before = core.stats().steps
    found = meter.prefill(100)
    assert core.stats().steps - before == 2
    assert not core.busy
    assert 0 < found.model_s < found.total_s


def test_every_part_of_a_step_is_timed_and_none_twice(core: EngineCore) -> None:
    for step in EngineMeter(core, seed=2).decode(20, 3, 5):
        parts = (step.plan_s, step.prepare_s, step.model_s, step.sample_s, step.report_s)
        assert all(part > 0 for part in parts)
        assert sum(parts) <= step.total_s
        assert step.overhead == pytest.approx(1 - step.model_s / step.total_s)


def test_decoding_goes_on_from_the_context_that_was_asked_for(core: EngineCore) -> None:
    ready: list[int] = []
    meter = EngineMeter(core, seed=3)
    found = meter.decode(40, 3, 4, on_ready=lambda: ready.append(core.scheduler.num_running))
    contexts = [step.context for step in found]
    assert ready == [3]
    assert len(found) == 4
    assert 3 * 40 < contexts[0] <= 3 * 40 + 12
    assert [later - sooner for sooner, later in pairwise(contexts)] == [3, 3, 3]
    assert not core.busy


def test_sequences_that_were_not_computed_have_keys_and_values_in_blocks_of_their_own(core: EngineCore) -> None:
    assert isinstance(core.runner, Runner)
    pool, seen = core.runner._pool, []

    def look() -> None:
        planes = []
        for sequence in core.scheduler.running:
            blocks = sequence.block_table[:2]
            seen.append(set(blocks))
            data = [pool._locate(block) for block in blocks]
            planes.append(torch.cat([segment.data[:, :, :, block] for segment, block in data], dim=-2))
        first, second, third = planes
        assert first.isfinite().all()
        assert first.abs().sum() > 0
        assert torch.equal(first, second)
        assert torch.equal(first, third)

    EngineMeter(core, seed=4).decode(40, 3, 1, on_ready=look)
    assert len(seen) == 3
    assert not set.intersection(*seen)


def test_the_core_is_as_it_was_when_the_others_are_filled(core: EngineCore) -> None:
    limits, runner = core.scheduler.limits, core.runner
    EngineMeter(core, seed=5).decode(40, 2, 1)
    assert core.scheduler.limits is limits
    assert core.runner is runner


def test_prompts_are_never_found_in_the_cache(core: EngineCore) -> None:
    before = core.stats()
    for seed in (6, 7):
        EngineMeter(core, seed).prefill(60)
    assert core.stats().cached_prompt_tokens == before.cached_prompt_tokens


def test_a_pool_that_is_too_small_is_told(core: EngineCore) -> None:
    tokens = core.stats().pool.total_blocks * 16
    with pytest.raises(ValueError, match="room for"):
        EngineMeter(core, seed=8).decode(tokens // 2, 3, 1)
    for sequence in core.scheduler.running:
        core.abort(sequence.id)


def test_other_runners_are_refused(core: EngineCore) -> None:
    class Other:
        def forward(self, plan: StepPlan) -> torch.Tensor:
            raise NotImplementedError

    runner, core.runner = core.runner, Other()
    try:
        with pytest.raises(TypeError, match="Other"):
            EngineMeter(core, seed=9)
    finally:
        core.runner = runner


def test_a_model_whose_work_goes_on_is_waited_for_and_the_waiting_is_the_models(core: EngineCore) -> None:
    [step] = EngineMeter(core, seed=10, settle=lambda: time.sleep(0.05)).decode(20, 1, 1)
    assert step.model_s >= 0.05
    assert step.prepare_s < 0.05


def test_a_sum_of_steps_is_a_step() -> None:
    one, two = StepTime(3.0, 0.1, 0.2, 2.0, 0.3, 0.1, 5), StepTime(1.0, 0.1, 0.1, 0.5, 0.1, 0.1, 6)
    both = added([one, two])
    assert (both.total_s, both.model_s, both.context) == (4.0, 2.5, 11)
    assert both.overhead == pytest.approx(0.375)


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_that_is_no_head_is_not_read(tied: bool) -> None:
    class Model:
        dtype = torch.bfloat16

    shape = spec(tie_word_embeddings=tied)
    layer = 8 * (8 + 2 * 4) + 8 * 8 + 3 * 8 * 16 + 2 * 8
    assert weight_bytes(Model(), shape) == 2 * (50 * 8 + 2 * layer + 8)


def test_a_window_bounds_what_is_read_of_the_cache() -> None:
    assert kv_bytes(spec(), token_bytes=2 * 16.0, context=10) == 16 * 10 + 16 * 4
    assert kv_bytes(spec(), token_bytes=2 * 16.0, context=3) == 2 * 16 * 3


@pytest.mark.parametrize("tokens", [1, 4, 9])
def test_operations_of_a_prompt_are_those_of_its_products(tokens: int) -> None:
    matrices = 2 * (8 * (8 + 2 * 4) + 8 * 8 + 3 * 8 * 16)
    norms = 2 * 2 * 8 + 8
    seen = sum(min(position, window) for position in range(1, tokens + 1) for window in (99, 4))
    wanted = 2 * tokens * (matrices + norms) + 2 * 50 * 8 + 4 * seen * 2 * 4
    assert prefill_flops(spec(), tokens, native=False) == wanted
    after_attention = 8 * 8 + 3 * 8 * 16
    assert prefill_flops(spec(), tokens, native=True) == wanted - 2 * (tokens - 1) * after_attention
