"""The planner's arithmetic, against known models and its own promises."""

from dataclasses import dataclass, replace
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekv.config.units import GIB, MIB
from edgekv.core.capacity import RUNTIME_BYTES, auto_kv_budget, headroom_bytes, plan_memory
from edgekv.core.demand import Demand
from edgekv.core.draft_plan import DRAFT_KV_BYTES, Draft
from edgekv.core.dtype_choice import DeviceKind, choose_dtype
from edgekv.core.kv_format import (
    KV_FORMATS,
    KVFormatName,
    context_need_bytes,
    kv_bytes_per_token,
    plan_kv,
    segment_blocks,
)
from edgekv.core.memory_plan import MemoryPlan
from edgekv.core.model_shape import WeightBytes, beyond_window_bytes, decode_read_bytes


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
    windows: tuple[int | None, ...] = (None,) * 32
    attention_softcap: float | None = None


LLAMA_8B = Shape(32, 8, 128)


@pytest.mark.parametrize(
    ("shape", "kib"),
    [(LLAMA_8B, 128), (Shape(80, 8, 128), 320), (Shape(126, 8, 128), 504), (Shape(32, 32, 128), 512)],
    ids=["Llama-3-8B", "Llama-3-70B", "Llama-3-405B", "7B with 32 KV heads"],
)
def test_bytes_per_token_of_known_models(shape: Shape, kib: int) -> None:
    assert kv_bytes_per_token(shape, 2) == kib * 1024


def test_a_pool_is_whole_blocks() -> None:
    plan = plan_kv(LLAMA_8B, kv_format="bfloat16", block_size=16, budget_bytes=4 * GIB + 1)
    assert plan.block_bytes == 2 * MIB
    assert plan.num_blocks == 2048
    assert plan.pool_tokens == 32_768
    assert plan.max_concurrency(8192) == 4.0
    assert plan.capacity_lines(32_768) == (
        "GPU KV cache size: 32,768 tokens",
        "Maximum concurrency for 32,768 tokens per request: 1.00x",
    )


def test_one_byte_less_is_one_block_less() -> None:
    assert plan_kv(LLAMA_8B, kv_format="bfloat16", block_size=16, budget_bytes=4 * GIB - 1).num_blocks == 2047
    assert plan_kv(LLAMA_8B, kv_format="bfloat16", block_size=16, budget_bytes=-1).num_blocks == 0


@pytest.mark.parametrize(
    ("block_bytes", "blocks"),
    [(64 * MIB, 1), (64 * MIB + 1, 1), (32 * MIB, 2), (2 * MIB, 32), (3 * MIB, 16), (1 << 40, 1)],
)
def test_a_segment_is_the_largest_power_of_two_within_64_mib(block_bytes: int, blocks: int) -> None:
    assert segment_blocks(block_bytes) == blocks


@given(st.integers(1, 1 << 27))
def test_a_segment_of_pages_wastes_at_most_one_percent(block_bytes: int) -> None:
    usual, paged = segment_blocks(block_bytes), segment_blocks(block_bytes, page_bytes=2 * MIB)
    num_bytes = paged * block_bytes
    wasted = -num_bytes % (2 * MIB)
    assert paged in (usual, 2 * usual, 4 * usual)
    assert wasted * 100 <= num_bytes or num_bytes > 64 * MIB
    assert wasted * 64 <= num_bytes, "not even where four times as many do not help"


def test_a_segment_of_usual_size_is_kept_where_it_fills_its_pages() -> None:
    assert segment_blocks(2 * MIB, page_bytes=2 * MIB) == segment_blocks(2 * MIB) == 32
    # Llama-3-8B in int8: 32.5 MiB would take 34, and 65 take 66.
    int8 = KV_FORMATS["int8"].block_bytes(LLAMA_8B, 16)
    assert segment_blocks(int8) == 32
    assert segment_blocks(int8, page_bytes=2 * MIB) == 128


@given(st.integers(1, 1 << 24), st.integers(0, 1 << 34))
def test_segments_hold_exactly_the_pool(bytes_per_head: int, budget: int) -> None:
    shape = Shape(1, 1, max(1, bytes_per_head // 4))
    plan = plan_kv(shape, kv_format="float32", block_size=16, budget_bytes=budget)
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
    assert context_need_bytes(LLAMA_8B, kv_format="bfloat16", block_size=16, context_tokens=17) == 32 * 128 * 1024


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


def test_quantised_weights_stay_so_on_the_native_kernels_and_are_unpacked_without() -> None:
    small, large = 1 << 29, 1 << 33
    for parameters in (small, large):
        kept = choose_dtype("float16", parameters, "cpu", quantised=True, native=True)
        assert (kept.name, kept.keeps_stored) == ("bfloat16", True)
        assert not choose_dtype("float16", parameters, "cpu", native=True).keeps_stored
    for parameters, device, name, why in (
        (small, "cpu", "float32", "native CPU kernels are not in use"),
        (large, "cpu", "bfloat16", "native CPU kernels are not in use"),
        (large, "card", "float16", "the card's kernels are not in use"),
    ):
        made = choose_dtype("float16", parameters, device, quantised=True)  # type: ignore[arg-type]
        assert (made.name, made.keeps_stored) == (name, False)
        assert made.reason.startswith(f"the quantised weights are unpacked to {name}: ")
        assert why in made.reason


SMALL_DRAFT = Shape(
    4, 2, 64, num_parameters=100_000_000, hidden_size=512, intermediate_size=2048, num_heads=8, windows=(None,) * 4
)


DEMAND = Demand(
    shape=LLAMA_8B, device="card", dtype="bfloat16", kv_dtype="bfloat16", block_size=16, context_tokens=8192,
    max_sequences=16, max_step_tokens=512,
)  # fmt: skip


def plan(total_bytes: int, *, demand: Demand = DEMAND, **changes: Any) -> MemoryPlan:
    return plan_memory(demand, total_bytes=total_bytes, **changes)


@given(
    total=st.integers(0, 128 * GIB),
    held=st.floats(0, 1),
    reserve=st.none() | st.integers(0, 8 * GIB),
    most=st.none() | st.integers(0, 128 * GIB),
    kv_budget=st.none() | st.integers(0, 64 * GIB) | st.floats(0, 1),
    draft=st.none() | st.just(Draft(SMALL_DRAFT, "bfloat16")) | st.just(Draft(SMALL_DRAFT, "bfloat16", GIB)),
    device=st.sampled_from(get_args(DeviceKind)),
)
def test_every_byte_of_the_device_is_accounted_for(
    total: int,
    held: float,
    reserve: int | None,
    most: int | None,
    kv_budget: int | float | None,
    draft: Draft | None,
    device: DeviceKind,
) -> None:
    made = plan(
        total, free_bytes=total - int(total * held), reserve_bytes=reserve, most_bytes=most, kv_budget=kv_budget,
        draft=draft, demand=replace(DEMAND, device=device),
    )  # fmt: skip
    parts = sum(made.leases.values()) + made.free_bytes
    assert parts + made.withheld_bytes + made.headroom_bytes + made.others_bytes == total
    if most is not None:
        assert made.budget_bytes <= most
    if kv_budget is None and made.kv.num_blocks:
        assert sum(made.leases.values()) <= made.budget_bytes
    assert (made.missing_bytes > 0) == (made.fixed_bytes + made.kv.block_bytes > made.budget_bytes) or total == 0
    assert made.ceiling_blocks >= made.kv.num_blocks


def test_a_card_is_filled_up_to_its_headroom() -> None:
    made = plan(24 * GIB)
    assert made.weight_bytes == 2 * LLAMA_8B.num_parameters
    assert 0 <= made.free_bytes < made.kv.block_bytes
    assert made.fits
    assert made.headroom_bytes == 24 * GIB * 6 // 100
    assert list(made.leases) == ["runtime", "weights", "workspace", "graphs", "kv.target"]
    assert made.runtime_bytes == RUNTIME_BYTES["card"]
    assert plan(24 * GIB, runtime_bytes=GIB).runtime_bytes == GIB


def test_the_headroom_is_of_the_whole_device_however_little_is_free() -> None:
    made = plan(64 * GIB, free_bytes=30 * GIB)
    assert made.others_bytes == 34 * GIB
    assert made.headroom_bytes == headroom_bytes(64 * GIB)
    assert made.budget_bytes == 30 * GIB - headroom_bytes(64 * GIB)
    assert plan(64 * GIB, reserve_bytes=GIB).headroom_bytes == GIB


def test_a_budget_withholds_what_is_beyond_it() -> None:
    made = plan(64 * GIB, most_bytes=30 * GIB)
    assert made.budget_bytes == 30 * GIB
    assert made.withheld_bytes == 64 * GIB - made.headroom_bytes - 30 * GIB
    assert sum(made.leases.values()) <= 30 * GIB < sum(made.leases.values()) + made.kv.block_bytes


def test_a_pool_on_a_card_may_grow_into_what_others_held_when_it_was_loaded() -> None:
    alone, beside = plan(48 * GIB), plan(48 * GIB, free_bytes=40 * GIB)
    assert alone.ceiling_blocks == alone.kv.num_blocks
    assert beside.kv.num_blocks < beside.ceiling_blocks == alone.kv.num_blocks
    assert beside.ceiling_bytes == beside.ceiling_blocks * beside.kv.block_bytes


def test_no_pool_may_grow_beyond_what_was_set_for_it() -> None:
    on_cpu = replace(DEMAND, device="cpu")
    for changes in ({"kv_budget": 4 * GIB}, {"demand": on_cpu}, {"most_bytes": 30 * GIB}):
        made = plan(64 * GIB, free_bytes=50 * GIB, **changes)
        assert made.ceiling_blocks == made.kv.num_blocks, changes
    grown = plan(64 * GIB, free_bytes=30 * GIB, most_bytes=40 * GIB)
    assert grown.fixed_bytes + grown.ceiling_bytes <= 40 * GIB < grown.fixed_bytes + grown.ceiling_bytes + 2 * MIB


def test_a_draft_has_lines_of_its_own_and_takes_from_the_pool() -> None:
    without, made = plan(24 * GIB), plan(24 * GIB, draft=Draft(SMALL_DRAFT, "bfloat16", GIB))
    assert made.draft is not None
    assert (made.leases["weights.draft"], made.leases["kv.draft"]) == (200_000_000, made.draft.kv.pool_bytes)
    assert GIB - made.draft.kv.block_bytes < made.draft.kv.pool_bytes <= GIB
    less = without.kv.pool_bytes - made.kv.pool_bytes
    assert abs(less - made.draft.num_bytes) < 2 * made.kv.block_bytes
    assert list(made.leases)[-4:] == ["weights.draft", "workspace.draft", "kv.draft", "kv.target"]
    assert made.leases["workspace.draft"] == made.draft.workspace_bytes > 0
    assert made.draft.num_bytes == 200_000_000 + made.draft.workspace_bytes + made.draft.kv.pool_bytes


def test_a_drafts_pool_is_no_larger_than_it_can_use() -> None:
    chosen = plan(24 * GIB, draft=Draft(SMALL_DRAFT, "bfloat16")).draft
    assert chosen is not None
    sixteen = 16 * context_need_bytes(SMALL_DRAFT, kv_format="bfloat16", block_size=16, context_tokens=8192)
    assert chosen.kv.pool_bytes == sixteen < DRAFT_KV_BYTES


def test_a_drafts_pool_never_has_more_than_a_quarter_of_what_is_left() -> None:
    made = plan(20 * GIB, draft=Draft(SMALL_DRAFT, "bfloat16"), demand=replace(DEMAND, max_sequences=256))
    assert made.draft is not None
    assert made.draft.kv.pool_bytes < DRAFT_KV_BYTES
    left = made.kv.pool_bytes + made.free_bytes + made.draft.kv.pool_bytes
    assert left // 4 - made.draft.kv.block_bytes < made.draft.kv.pool_bytes <= left // 4


def test_a_draft_is_kept_as_it_was_told() -> None:
    asked = Draft(SMALL_DRAFT, "bfloat16", GIB, workspace_bytes=3 * MIB, kv_format="int8", kv_alignment=128)
    made = plan(24 * GIB, draft=asked).draft
    assert made is not None
    assert (made.kv_dtype, made.dtype, made.workspace_bytes) == ("int8", "bfloat16", 3 * MIB)
    # K and V of 2 heads of 64 in 16 tokens of 4 layers; scales of 64 bytes take 128 each.
    assert made.kv.block_bytes == 4 * 2 * (2 * 16 * 64 + 128)
    assert made.kv.pool_bytes <= GIB < made.kv.pool_bytes + made.kv.block_bytes


@pytest.mark.parametrize("softcap", [None, 50.0])
@pytest.mark.parametrize("device", ["cpu", "card"])
def test_a_step_over_smaller_keys_takes_no_more(device: DeviceKind, softcap: float | None) -> None:
    shape = replace(LLAMA_8B, attention_softcap=softcap)
    demand = replace(DEMAND, shape=shape, device=device, context_tokens=65_536)
    taken = [replace(demand, kv_dtype=name).workspace_bytes for name in ("bfloat16", "int8", "int4")]
    assert taken == sorted(taken, reverse=True)
    assert 0 < taken[-1] < taken[0]


def test_what_is_proposed_has_logits_too() -> None:
    proposing = replace(DEMAND, max_proposed=8)
    more = plan(24 * GIB, demand=proposing).workspace_bytes - plan(24 * GIB).workspace_bytes
    assert more == 8 * LLAMA_8B.vocab_size * 16, "float32, its softmax, and int64 indices"


@pytest.mark.parametrize(
    ("name", "bytes_per_block"),
    # K and V of 16 tokens x 128 elements, 32 layers x 8 heads; for each token of K and of V a scale of two bytes (int8)
    # or a scale and a zero (int4)
    [("float32", 4096 * 4), ("bfloat16", 4096 * 2), ("float16", 4096 * 2), ("fp8", 4096), ("int8", 4096 + 64),
     ("int4", 2048 + 128)],
)  # fmt: skip
def test_blocks_of_each_format(name: KVFormatName, bytes_per_block: int) -> None:
    made = KV_FORMATS[name]
    assert made.block_bytes(LLAMA_8B, 16) == 256 * bytes_per_block
    assert made.block_bytes(LLAMA_8B, 16, alignment=128) == made.block_bytes(LLAMA_8B, 16)
    assert ("torch" in made.engines) == (name in ("float32", "bfloat16", "float16"))
    assert ("cpu" in made.engines) == (name not in ("fp8", "int4"))
    assert "card" in made.engines
    kv = plan_kv(LLAMA_8B, kv_format=name, block_size=16, budget_bytes=GIB)
    assert kv.num_blocks == GIB // (256 * bytes_per_block)
    assert kv.bytes_per_token == -(-256 * bytes_per_block // 16)


def test_a_token_reads_every_weight_once_and_what_its_windows_show() -> None:
    weights = WeightBytes(total=5000, step=4000, kinds={"q8_0": 5000})
    asked = {"weights": weights, "kv_format": "bfloat16", "block_size": 16}
    assert decode_read_bytes(LLAMA_8B, context_tokens=0, **asked) == 4000  # type: ignore[arg-type]
    far = decode_read_bytes(LLAMA_8B, context_tokens=1000, **asked)  # type: ignore[arg-type]
    assert far == 4000 + 1000 * 128 * 1024
    half = Shape(32, 8, 128, windows=(512, None) * 16)
    seen = decode_read_bytes(half, context_tokens=1000, **asked) - 4000  # type: ignore[arg-type]
    assert seen == (16 * 512 + 16 * 1000) * 4096


def test_what_lies_behind_a_window_is_whole_blocks_of_its_layers() -> None:
    shape = Shape(32, 8, 128, windows=(512, None) * 16)
    asked = {"kv_format": "bfloat16", "block_size": 16}
    assert beyond_window_bytes(shape, context_tokens=512 + 33, **asked) == 16 * 2 * 16 * 4096  # type: ignore[arg-type]
    assert beyond_window_bytes(shape, context_tokens=512, **asked) == 0  # type: ignore[arg-type]
    assert beyond_window_bytes(LLAMA_8B, context_tokens=8192, **asked) == 0  # type: ignore[arg-type]


def test_weights_take_what_the_checkpoint_says() -> None:
    weights, of_draft = WeightBytes(5 * GIB, 4 * GIB, {"q4_K": 5 * GIB}), WeightBytes(GIB, GIB, {"q8_0": GIB})
    draft = Draft(SMALL_DRAFT, "bfloat16", GIB, of_draft)
    made = plan(24 * GIB, weights=weights, draft=draft)
    assert (made.weight_bytes, made.leases["weights"]) == (5 * GIB, 5 * GIB)
    assert made.draft is not None
    assert made.draft.weight_bytes == made.leases["weights.draft"] == GIB
    less = 2 * LLAMA_8B.num_parameters - 5 * GIB + 200_000_000 - GIB
    more = made.kv.pool_bytes - plan(24 * GIB, draft=Draft(SMALL_DRAFT, "bfloat16", GIB)).kv.pool_bytes
    assert abs(more - less) < 2 * made.kv.block_bytes


def test_what_does_not_fit_says_how_much_is_missing() -> None:
    made = plan(16 * GIB)
    assert not made.fits
    assert made.kv.num_blocks == 0
    assert plan(16 * GIB + made.missing_bytes * 100 // 94 + MIB).kv.num_blocks >= 1


def test_a_pool_smaller_than_the_context_does_not_fit() -> None:
    made = plan(24 * GIB, kv_budget=GIB // 2)
    assert (made.missing_bytes, made.fits, made.kv.pool_tokens) == (0, False, 4096)
    assert plan(24 * GIB, kv_budget=0.05).kv.pool_bytes <= int(24 * GIB * 0.05)


def test_a_share_is_of_what_is_free() -> None:
    made = plan(64 * GIB, free_bytes=40 * GIB, kv_budget=0.25)
    assert made.kv.pool_bytes == 10 * GIB


def test_the_workspace_grows_with_what_a_step_may_do() -> None:
    least = replace(DEMAND, device="cpu", max_step_tokens=128, max_sequences=1)
    small = least.workspace_bytes
    for more in ({"max_step_tokens": 512}, {"max_sequences": 16}, {"context_tokens": 8193}, {"kv_dtype": "float32"}):
        assert small < replace(least, **more).workspace_bytes
    assert replace(least, context_tokens=16).workspace_bytes > 16 * MIB


def test_captured_graphs_are_a_cards_alone() -> None:
    assert plan(24 * GIB, demand=replace(DEMAND, device="cpu")).graphs_bytes == 0
    assert 0 < plan(24 * GIB).graphs_bytes < 128 * MIB
