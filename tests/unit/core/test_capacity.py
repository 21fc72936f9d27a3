"""The planner's arithmetic, against known models and its own promises."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekv.core.capacity import (
    GIB,
    MIB,
    auto_kv_budget,
    choose_dtype,
    context_need_bytes,
    kv_bytes_per_token,
    plan_kv,
    plan_memory,
    segment_blocks,
    workspace_bytes,
)


@dataclass(frozen=True)
class Shape:
    num_layers: int
    num_kv_heads: int
    head_dim: int
    num_parameters: int = 8_030_261_248
    vocab_size: int = 128_256
    hidden_size: int = 4096
    intermediate_size: int = 14_336
    num_heads: int = 32
    max_position_embeddings: int = 8192


LLAMA_8B = Shape(32, 8, 128)


@pytest.mark.parametrize(
    ("shape", "kib"),
    [(LLAMA_8B, 128), (Shape(80, 8, 128), 320), (Shape(126, 8, 128), 504), (Shape(32, 32, 128), 512)],
    ids=["Llama-3-8B", "Llama-3-70B", "Llama-3-405B", "7B with 32 KV heads"],
)
def test_bytes_per_token_of_known_models(shape: Shape, kib: int) -> None:
    assert kv_bytes_per_token(shape, 2) == kib * 1024


def test_a_pool_is_whole_blocks() -> None:
    plan = plan_kv(LLAMA_8B, kv_dtype_bytes=2, block_size=16, budget_bytes=4 * GIB + 1)
    assert plan.block_bytes == 2 * MIB
    assert plan.num_blocks == 2048
    assert plan.pool_tokens == 32_768
    assert plan.max_concurrency(8192) == 4.0
    assert plan.capacity_lines(32_768) == (
        "GPU KV cache size: 32,768 tokens",
        "Maximum concurrency for 32,768 tokens per request: 1.00x",
    )


def test_one_byte_less_is_one_block_less() -> None:
    assert plan_kv(LLAMA_8B, kv_dtype_bytes=2, block_size=16, budget_bytes=4 * GIB - 1).num_blocks == 2047
    assert plan_kv(LLAMA_8B, kv_dtype_bytes=2, block_size=16, budget_bytes=-1).num_blocks == 0


@pytest.mark.parametrize(
    ("block_bytes", "blocks"),
    [(64 * MIB, 1), (64 * MIB + 1, 1), (32 * MIB, 2), (2 * MIB, 32), (3 * MIB, 16), (1 << 40, 1)],
)
def test_a_segment_is_the_largest_power_of_two_within_64_mib(block_bytes: int, blocks: int) -> None:
    assert segment_blocks(block_bytes) == blocks


@given(st.integers(1, 1 << 24), st.integers(0, 1 << 34))
def test_segments_hold_exactly_the_pool(bytes_per_head: int, budget: int) -> None:
    shape = Shape(1, 1, max(1, bytes_per_head // 4))
    plan = plan_kv(shape, kv_dtype_bytes=4, block_size=16, budget_bytes=budget)
    assert sum(plan.segments) == plan.num_blocks
    assert plan.pool_bytes <= budget < plan.pool_bytes + plan.block_bytes
    assert all(segment == plan.segment_blocks for segment in plan.segments[:-1])
    assert all(0 < segment <= plan.segment_blocks for segment in plan.segments)


def test_main_memory_is_shared_and_a_card_is_not() -> None:
    budget = {"free_bytes": 10 * GIB, "one_context_bytes": GIB // 4, "max_sequences": 16}
    assert auto_kv_budget(device="card", **budget) == 10 * GIB
    assert auto_kv_budget(device="cpu", **budget) == 4 * GIB
    assert auto_kv_budget(device="cpu", **budget | {"one_context_bytes": GIB}) == 4 * GIB
    assert auto_kv_budget(device="cpu", **budget | {"one_context_bytes": 6 * GIB}) == 5 * GIB
    assert auto_kv_budget(device="cpu", **budget | {"one_context_bytes": 6 * GIB, "free_bytes": 90 * GIB}) == 6 * GIB
    for device in ("cpu", "card"):
        assert auto_kv_budget(device=device, **budget | {"free_bytes": -1}) == 0  # type: ignore[arg-type]


def test_a_context_takes_whole_blocks() -> None:
    assert context_need_bytes(LLAMA_8B, kv_dtype_bytes=2, block_size=16, context_tokens=17) == 32 * 128 * 1024


@pytest.mark.parametrize(
    ("checkpoint", "parameters", "device", "chosen"),
    [
        ("bfloat16", 1 << 29, "cpu", "float32"),
        ("bfloat16", (1 << 29) + 1, "cpu", "bfloat16"),
        ("float16", 1 << 30, "cpu", "bfloat16"),
        ("float32", 1 << 30, "cpu", "float32"),
        ("float16", 1 << 20, "card", "float16"),
        ("bfloat16", 1 << 20, "card", "bfloat16"),
    ],
)
def test_the_dtype_that_is_chosen(checkpoint: str, parameters: int, device: str, chosen: str) -> None:
    choice = choose_dtype(checkpoint, parameters, device)  # type: ignore[arg-type]
    assert choice.name == chosen
    assert choice.reason


def plan(total_bytes: int, **changes: object):  # type: ignore[no-untyped-def]
    asked = {
        "device": "card", "total_bytes": total_bytes, "dtype": "bfloat16", "kv_dtype": "bfloat16", "block_size": 16,
        "context_tokens": 8192, "max_sequences": 16, "max_step_tokens": 512,
    } | changes  # fmt: skip
    return plan_memory(LLAMA_8B, **asked)  # type: ignore[arg-type]


def test_every_byte_of_the_device_is_accounted_for() -> None:
    made = plan(24 * GIB)
    assert made.weight_bytes == 2 * LLAMA_8B.num_parameters
    parts = made.headroom_bytes + made.weight_bytes + made.workspace_bytes + made.kv.pool_bytes + made.free_bytes
    assert parts == 24 * GIB
    assert 0 <= made.free_bytes < made.kv.block_bytes
    assert made.fits
    assert made.headroom_bytes == 24 * GIB * 6 // 100


def test_what_does_not_fit_says_how_much_is_missing() -> None:
    made = plan(16 * GIB)
    assert not made.fits
    assert made.kv.num_blocks == 0
    assert plan(16 * GIB + made.missing_bytes * 100 // 94 + MIB).kv.num_blocks >= 1


def test_a_pool_smaller_than_the_context_does_not_fit() -> None:
    made = plan(24 * GIB, kv_budget=GIB // 2)
    assert (made.missing_bytes, made.fits, made.kv.pool_tokens) == (0, False, 4096)
    assert plan(24 * GIB, kv_budget=0.05).kv.pool_bytes <= int(24 * GIB * 0.05)


def test_the_workspace_grows_with_what_a_step_may_do() -> None:
    least = {"dtype_bytes": 2, "kv_dtype_bytes": 2, "context_tokens": 8192, "max_step_tokens": 128, "max_sequences": 1}
    small = workspace_bytes(LLAMA_8B, **least)
    for more in ({"max_step_tokens": 512}, {"max_sequences": 16}, {"context_tokens": 8193}, {"kv_dtype_bytes": 4}):
        assert small < workspace_bytes(LLAMA_8B, **least | more)
    assert workspace_bytes(LLAMA_8B, **least | {"context_tokens": 16}) > 16 * MIB
