"""Paged attention against the formula, over ragged batches on a pool whose every unowned slot is NaN."""

import dataclasses
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekv.kernels.attn import paged_torch, worklist
from edgekv.kernels.attn.dense import DenseAttention
from edgekv.kernels.attn.worklist import Decode, Prefill, work_list
from tests.kernels.oracle import Bench, Setting, Talk, check_step, ragged

SETTINGS = st.builds(
    Setting,
    kv_heads=st.integers(1, 4),
    group=st.integers(1, 8),
    head_dim=st.sampled_from([16, 32, 64, 80, 128, 256]),
    block_size=st.sampled_from([16, 32]),
    segment_blocks=st.sampled_from([8, 32]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    window=st.none() | st.integers(1, 120),
    softcap=st.none() | st.sampled_from([1.0, 20.0]),
    num_layers=st.just(2),
)


@st.composite
def benches(draw: st.DrawFn) -> Bench:
    """Pools of about 64 blocks in one to many segments, the last one partial, perhaps with holes."""
    setting = draw(SETTINGS)
    count = 2 if setting.segment_blocks == 32 else 8
    sizes = [setting.segment_blocks] * count + [draw(st.integers(1, setting.segment_blocks))]
    holes = draw(st.sets(st.integers(0, count - 1), max_size=count // 4))
    return Bench(setting, sizes, seed=draw(st.integers(0, 2**32 - 1)), holes=sorted(holes))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_ragged_batch_is_as_the_formula_says(data: st.DataObject) -> None:
    bench = data.draw(benches())
    size = bench.setting.block_size
    talks: list[Talk] = []
    for _ in range(data.draw(st.integers(1, 5), label="steps")):
        if len(talks) < 6 and data.draw(st.booleans() if talks else st.just(True), label="another"):
            talks.append(bench.talk())
        if data.draw(st.integers(0, 4), label="fork") == 0 and len(bench.free) > 8:
            talks.append(bench.copy_last_block(talks[0]))
        work: list[tuple[Talk, int]] = []
        room = len(bench.free)
        for talk in data.draw(st.permutations(talks), label="batch"):
            tokens = data.draw(st.sampled_from([1, 1, 0, 2, 15, 16, 17, 70]) | st.integers(1, 100), label="tokens")
            needed = max(0, -(-(talk.length + tokens) // size) - len(talk.table))
            if tokens and needed <= room:
                work.append((talk, tokens))
                room -= needed
        if work:
            check_step(bench, work)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_batch_of_very_different_contexts_decodes_in_buckets(
    dtype: torch.dtype, window: int | None, softcap: float | None
) -> None:
    bench = Bench(Setting(dtype=dtype, window=window, softcap=softcap, segment_blocks=256), [256])
    talks = [bench.talk() for _ in range(10)]
    check_step(bench, list(zip(talks, [1, 300, 15, 16, 17, 31, 520, 150, 3, 513], strict=True)))
    for _ in range(3):
        check_step(bench, [(talk, 1) for talk in talks])
    items = work_list(ragged([(talk, 1) for talk in talks]), bench.pool.cache, None)
    assert 2 <= len(items) < len(talks)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [1, 16, 300, 599, 600, 601, 2000])
def test_a_long_windowed_prefill_is_tiled_without_a_seam(window: int, softcap: float | None) -> None:
    bench = Bench(Setting(window=window, softcap=softcap, segment_blocks=128, num_layers=1), [128])
    talk = bench.talk()
    for tokens in (600, 1, 550, 1):
        check_step(bench, [(talk, tokens)])


def test_a_window_one_short_of_the_prompt_hides_one_key() -> None:
    for tokens in (2, 16, 17, 40):
        bench = Bench(Setting(window=tokens - 1), [8])
        check_step(bench, [(bench.talk(), tokens)])


def test_soft_capped_scores_are_tiled_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_torch, "CAPPED_SCORES", 2 * 2 * 100 * 7)
    bench = Bench(Setting(softcap=5.0), [8])
    talk = bench.talk()
    check_step(bench, [(talk, 20)])
    check_step(bench, [(talk, 80)])


@pytest.mark.parametrize("kv_heads", [1, 3, 8])
def test_contexts_beyond_the_gather_limit_go_through_in_groups_of_heads(
    kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (paged_torch, worklist):
        monkeypatch.setattr(module, "GATHER_BYTES", 1)
    bench = Bench(Setting(kv_heads=kv_heads, segment_blocks=16), [16, 16, 16])
    talks = [bench.talk(), bench.talk()]
    check_step(bench, [(talks[0], 200), (talks[1], 90)])
    check_step(bench, [(talks[0], 1), (talks[1], 50)])
    check_step(bench, [(talks[0], 1), (talks[1], 1)])
    head_bytes = 2 * 16 * 16 * 16 * 4
    assert bench.workspace.num_bytes <= 2 * 2 * head_bytes * torch.get_num_threads()


def test_layers_with_different_windows_share_a_step() -> None:
    bench = Bench(Setting(), [8])
    talk = bench.talk()
    check_step(bench, [(talk, 100)])
    for window in (None, 10, None, 30):
        bench.setting = dataclasses.replace(bench.setting, window=window)
        check_step(bench, [(talk, 1)])


def fixed_rows(talks: list[Talk], work: list[tuple[Talk, int]]) -> Callable[..., torch.Tensor]:
    """For `Bench.random`: rows that depend on the sequence and its positions alone, not on the batch."""
    calls = iter(range(3))

    def random(layers: int, total: int, heads: int, dim: int) -> torch.Tensor:
        call, parts = next(calls), []
        for talk, tokens in work:
            generator = torch.Generator().manual_seed(3 * talks.index(talk) + call)
            rows = torch.randn(200, layers, heads, dim, generator=generator).transpose(0, 1)
            parts.append(rows[:, talk.length : talk.length + tokens])
        assert sum(part.shape[1] for part in parts) == total
        return torch.cat(parts, 1)

    return random


def run_fixed(steps: list[list[tuple[int, int]]]) -> list[torch.Tensor]:
    """Each sequence's rows after steps of (sequence, tokens) pairs."""
    bench = Bench(Setting(segment_blocks=64), [64, 9])
    talks = [bench.talk() for _ in range(6)]
    rows: list[list[torch.Tensor]] = [[] for _ in talks]
    for step in steps:
        work = [(talks[index], tokens) for index, tokens in step]
        with mock.patch.object(bench, "random", fixed_rows(talks, work)):
            for (index, _), result in zip(step, bench.step(work), strict=True):
                rows[index].append(result)
    return [torch.cat(parts, 1) for parts in rows if parts]


def test_results_do_not_depend_on_the_neighbours() -> None:
    steps = [list(enumerate(counts)) for counts in ([5, 40, 41, 77, 120, 16], [1] * 6, [1, 7, 1, 3, 1, 1])]
    together = run_fixed(steps)
    alone = run_fixed([[pair] for step in steps for pair in step])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("cuts", [[1] * 100, [16, 84], [15, 1, 1, 83], [33, 33, 34]])
def test_where_a_prompt_is_cut_into_chunks_makes_no_difference(cuts: list[int]) -> None:
    whole = run_fixed([[(0, 100)]])
    torch.testing.assert_close(run_fixed([[(0, tokens)] for tokens in cuts]), whole, rtol=1e-5, atol=1e-6)


def test_every_slot_of_the_context_counts_and_no_other() -> None:
    """Change one slot at a time: slots in sight change the result, slots behind the context or the window do not."""
    bench = Bench(Setting(window=30, num_layers=1), [4], seed=1)
    talk = bench.talk()
    bench.step([(talk, 40)])
    data = bench.pool.cache.segments[0].data

    def decode() -> torch.Tensor:
        again = Talk(list(talk.table), talk.keys, talk.values, talk.length)
        bench.generator.manual_seed(9)
        return bench.step([(again, 1)])[0]

    baseline = decode()
    for position in range(3 * 16):
        at = (0, 1, slice(None), talk.table[position // 16], position % 16)
        kept = data[at].clone()
        data[at] += 1
        changed = not torch.equal(decode(), baseline)
        data[at] = kept
        # The window of the token at 40 is 11 .. 40; its own slot is appended anew each time.
        assert changed == (11 <= position < 40), position


def test_float32_queries_over_a_bfloat16_cache_answer_in_float32() -> None:
    bench = Bench(Setting(dtype=torch.bfloat16), [8])
    talk = bench.talk()
    with mock.patch.object(bench, "random", torch.randn):
        (result,) = bench.step([(talk, 20)])
    assert result.dtype == torch.float32
    (expected,) = bench.expected([(talk, 20)])
    torch.testing.assert_close(result.double(), expected, rtol=0.05, atol=0.05)


def test_the_scale_is_the_callers() -> None:
    bench = Bench(Setting(num_layers=1), [8])
    talk = bench.talk()
    attention = paged_torch.PagedAttention(bench.pool.cache, ragged([(_extended(bench, talk), 9)]), bench.workspace)
    q, k, v = bench.random(9, 4, 16), bench.random(9, 2, 16), bench.random(9, 2, 16)
    result = attention(0, q, k, v, scale=0.7)
    torch.testing.assert_close(result, DenseAttention()(0, q, k, v, scale=0.7))
    assert not torch.allclose(result, DenseAttention()(0, q, k, v, scale=0.25))


def _extended(bench: Bench, talk: Talk) -> Talk:
    talk.table.append(bench.free.pop())
    return talk


def test_a_window_costs_its_own_length_and_not_the_contexts() -> None:
    bench = Bench(Setting(segment_blocks=256), [256])
    talk = Talk(bench.free[:200], torch.empty(0), torch.empty(0), length=3000)
    (decode,) = work_list(ragged([(talk, 1)]), bench.pool.cache, 64)
    assert isinstance(decode, Decode)
    assert sum(piece.num_blocks for piece in decode.pieces) <= 64 // 16 + 1
    talk = Talk(bench.free[:256], torch.empty(0), torch.empty(0), length=3000)
    prefill = work_list(ragged([(talk, 1024)]), bench.pool.cache, 64)
    assert all(isinstance(item, Prefill) for item in prefill)
    gathered = [sum(piece.num_blocks for piece in item.pieces) for item in prefill]
    assert max(gathered) <= (worklist.MIN_TILE_TOKENS + 64) // 16 + 2
    assert sum(gathered) <= 1.5 * 1024 // 16


def test_buckets_hold_less_padding_than_content() -> None:
    bench = Bench(Setting(segment_blocks=4096), [4096])
    lengths = [1, 10, 100, 130, 200, 260, 300, 500, 900, 1000, 1800, 3000, 4000, 7, 8, 9]
    talks, used = [], 0
    for length in lengths:
        blocks = length // 16 + 1
        talks.append(Talk(bench.free[used : used + blocks], torch.empty(0), torch.empty(0), length))
        used += blocks
    items = work_list(ragged([(talk, 1) for talk in talks]), bench.pool.cache, None)
    gathered = sum(item.pieces[0].rows.shape[2] for item in items)
    assert gathered <= 2 * used
    assert len(items) <= 6


def test_a_mask_of_a_long_context_takes_little_memory() -> None:
    bench = Bench(Setting(segment_blocks=1024), [1024])
    talk = Talk(bench.free[:1000], torch.empty(0), torch.empty(0), length=12000)
    (item,) = work_list(ragged([(talk, 2048)]), bench.pool.cache, None)
    assert isinstance(item, Prefill)
    assert item.mask.untyped_storage().nbytes() < 100_000
