"""Operations on rows: each against torch in float32 or float64, on every tier and on one and two threads."""

import ctypes
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from edgekv.kernels.cpu import abi
from edgekv.kernels.cpu.abi import Form, OpKind
from edgekv.kernels.cpu.program import KernelError, Pool
from edgekv.model.rope import RotaryEmbedding
from edgekv.model.spec import RopeSpec
from tests.kernels.cpu.room import Room, f32_matrix, library, pool

widths = st.integers(1, 200)
counts = st.integers(1, 9)
seeds = st.integers(0, 2**32)
pools = [pytest.param((threads, tier), id=f"{tier}-{threads}") for tier in library().tiers for threads in (1, 2)]


@pytest.fixture(params=pools, scope="session")
def threads(request: pytest.FixtureRequest) -> Pool:
    return pool(*request.param)


def draw(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def quantise(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What EK_FORM_Q8 is: values, scales and sums of a [rows, width] in groups of 32."""
    padded = F.pad(x, (0, -x.shape[1] % 32)).unflatten(1, (-1, 32))
    top = padded.abs().amax(-1)
    most = torch.full_like(top, 127)  # `127 / top` would be 127 times the reciprocal, which is another number
    values = (padded * torch.where(top > 0, most / top, 0).unsqueeze(-1)).round().to(torch.int8)
    return values.flatten(1), top / 127, values.sum(-1, dtype=torch.int32)


def test_embed_takes_rows_and_scales_them(threads: Pool) -> None:
    weight = draw(37, 48, seed=0)
    room = Room([48], 5)
    room.token_ids = np.array([0, 36, 5, 5, 16])
    room.set_batch()
    parts, panels = f32_matrix(weight)
    room.kept.append(panels)
    threads.run_op(room.program, room.op(OpKind.EMBED, dst=0, width=48, parts=parts, scale=0.5), room.step)
    assert torch.equal(room.rows(0), weight[room.token_ids] * 0.5)


@pytest.mark.parametrize("token", [-1, 37, 2**40])
def test_a_token_without_a_row_is_refused(token: int) -> None:
    parts, panels = f32_matrix(draw(37, 48, seed=0))
    room = Room([48], 2)
    room.token_ids = np.array([3, token])
    room.set_batch()
    room.kept.append(panels)
    with pytest.raises(KernelError, match="token id"):
        pool(1).run_op(room.program, room.op(OpKind.EMBED, dst=0, width=48, parts=parts), room.step)
    assert room.memory[0].isnan().all()


@settings(deadline=None, max_examples=40)
@given(width=widths, tokens=counts, seed=seeds, forms=st.integers(0, 7), stored=st.booleans(), weighted=st.booleans())
def test_norm(threads: Pool, width: int, tokens: int, seed: int, forms: int, stored: bool, weighted: bool) -> None:
    room = Room([width, width], tokens)
    x, weight = draw(tokens, width, seed=seed, scale=3), draw(width, seed=seed + 1)
    room.rows(0).copy_(x)
    op = room.op(OpKind.NORM, src=0, dst=1 if stored else -1, width=width, forms=forms, eps=1e-5)
    if weighted:
        op.weight = weight.data_ptr()
    threads.run_op(room.program, op, room.step)
    normed = F.rms_norm(x, (width,), weight if weighted else None, 1e-5)
    if stored:
        torch.testing.assert_close(room.rows(1), normed, rtol=2e-6, atol=1e-7)
        assert room.is_untouched_around(1)
        normed = room.rows(1)
    if forms & Form.F32:
        torch.testing.assert_close(room.f32[:tokens, :width], normed, rtol=2e-6, atol=1e-7)
    if forms & Form.BF16:
        torch.testing.assert_close(room.bf16[:tokens, :width].float(), normed, rtol=2**-8, atol=1e-7)
    if forms & Form.Q8:
        groups = -(-width // 32)
        near = room.q8[:tokens, : 32 * groups].float() * room.scales[:tokens, :groups].repeat_interleave(32, 1)
        error = (near - F.pad(normed, (0, 32 * groups - width))).abs()
        assert (error <= 0.51 * room.scales[:tokens, :groups].repeat_interleave(32, 1)).all()
    assert torch.equal(room.rows(0), x)


@settings(deadline=None, max_examples=40)
@given(width=widths, tokens=counts, seed=seeds, forms=st.integers(1, 7))
@example(width=179, tokens=4, seed=55, forms=4)  # half the largest of its group: 63.5, but for how 127 / top rounds
def test_prepare(threads: Pool, width: int, tokens: int, seed: int, forms: int) -> None:
    room = Room([width], tokens)
    x = draw(tokens, width, seed=seed, scale=10)
    room.rows(0).copy_(x)
    threads.run_op(room.program, room.op(OpKind.PREPARE, src=0, width=width, forms=forms), room.step)
    groups = -(-width // 32)
    values, scales, sums = quantise(x)
    if forms & Form.F32:
        assert torch.equal(room.f32[:tokens, :width], x)
    if forms & Form.BF16:
        assert torch.equal(room.bf16[:tokens, :width], x.bfloat16())
        assert not room.bf16[:tokens, width : width + width % 2].any()
    if forms & Form.Q8:
        assert torch.equal(room.q8[:tokens, : 32 * groups], values)
        assert torch.equal(room.sums[:tokens, :groups], sums)
        assert torch.equal(room.scales[:tokens, :groups], scales)
    # What was not asked for is not touched, nor is the row behind.
    assert room.f32[0 if not forms & Form.F32 else tokens :].isnan().all()
    assert room.bf16[0 if not forms & Form.BF16 else tokens :].isnan().all()
    assert (room.q8[0 if not forms & Form.Q8 else tokens :] == -128).all()
    assert room.scales[0 if not forms & Form.Q8 else tokens :].isnan().all()


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_reaches_the_int8_form(threads: Pool, odd: float) -> None:
    room = Room([96], 3)
    room.rows(0).fill_(1.0)
    room.rows(0)[1, 40] = odd
    threads.run_op(room.program, room.op(OpKind.PREPARE, src=0, width=96, forms=int(Form.Q8)), room.step)
    told = (room.q8[:3].float()[:, :96] * room.scales[:3, :3].repeat_interleave(32, 1)).isfinite().all(1)
    assert told.tolist() == [True, False, True]


def test_numbers_too_small_to_scale_are_zeros(threads: Pool) -> None:
    room = Room([32], 1)
    room.rows(0).fill_(1e-36)
    threads.run_op(room.program, room.op(OpKind.PREPARE, src=0, width=32, forms=int(Form.Q8)), room.step)
    assert (room.q8[0, :32].float() * room.scales[0, 0]).abs().max() <= 1e-36


@settings(deadline=None, max_examples=25)
@given(width=widths, tokens=counts, seed=seeds)
def test_norm_add(threads: Pool, width: int, tokens: int, seed: int) -> None:
    room = Room([width, width], tokens)
    x, y, weight = (draw(*shape, seed=seed + i) for i, shape in enumerate([(tokens, width), (tokens, width), (width,)]))
    room.rows(0).copy_(x)
    room.rows(1).copy_(y)
    threads.run_op(
        room.program, room.op(OpKind.NORM_ADD, src=0, dst=1, width=width, weight=weight, eps=1e-6), room.step
    )
    torch.testing.assert_close(room.rows(1), y + F.rms_norm(x, (width,), weight, 1e-6), rtol=2e-6, atol=1e-6)
    assert room.is_untouched_around(1)


@settings(deadline=None, max_examples=25)
@given(data=st.data(), tokens=st.integers(1, 40), pairs=st.integers(1, 70))
def test_rope_tables_are_as_accurate_as_float32_angles_allow(
    threads: Pool, data: st.DataObject, tokens: int, pairs: int
) -> None:
    head_dim = 2 * pairs + 2 * data.draw(st.integers(0, 8))
    room = Room([1], tokens, head_dim=head_dim, rope_dim=2 * pairs, ropes=2)
    room.positions = np.array(data.draw(st.lists(st.integers(0, 10_000_000), min_size=tokens, max_size=tokens)))
    room.set_batch()
    frequencies = torch.rand(pairs, generator=torch.Generator().manual_seed(tokens)) ** 4
    op = room.op(OpKind.ROPE_TABLE, width=pairs, rope=1, weight=frequencies, scale=1.25)
    threads.run_op(room.program, op, room.step)
    angles = (torch.from_numpy(room.positions).float().unsqueeze(1) * frequencies).double()
    table = room.tables[1].double()
    torch.testing.assert_close(table[:, :pairs], angles.cos() * 1.25, rtol=0, atol=1.6e-7)
    torch.testing.assert_close(table[:, head_dim // 2 :][:, :pairs], angles.sin() * 1.25, rtol=0, atol=1.6e-7)
    assert room.tables[0].isnan().all()


@pytest.mark.parametrize("head_dim", [16, 48, 80, 128])
@pytest.mark.parametrize("normed", [False, True])
def test_heads_are_normed_and_turned_as_the_torch_layers_do(threads: Pool, head_dim: int, normed: bool) -> None:
    heads, kv_heads, tokens = 4, 2, 7
    width = (heads + 2 * kv_heads) * head_dim
    room = Room([width], tokens, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    room.positions = np.array([0, 1, 2, 1000, 1001, 130_000, 7])
    room.set_batch()
    attach_cache(room, kv_heads, head_dim)
    x = draw(tokens, width, seed=3)
    room.rows(0).copy_(x)
    rope = RotaryEmbedding(RopeSpec(500_000.0), head_dim, torch.device("cpu"))
    q_norm, k_norm = draw(head_dim, seed=4), draw(head_dim, seed=5)
    table = room.op(OpKind.ROPE_TABLE, width=head_dim // 2, weight=rope._frequencies)
    weights = {"weight": q_norm, "weight2": k_norm, "eps": 1e-6} if normed else {}
    append = room.op(OpKind.ROPE_APPEND, src=0, width=width, **weights)
    threads.run_op(room.program, table, room.step)
    threads.run_op(room.program, append, room.step)

    split = x.view(tokens, -1, head_dim)
    q, k, v = split.split((heads, kv_heads, kv_heads), 1)
    if normed:
        q, k = F.rms_norm(q, (head_dim,), q_norm, 1e-6), F.rms_norm(k, (head_dim,), k_norm, 1e-6)
    rotation = rope.at(torch.from_numpy(room.positions))
    wanted = torch.cat((rotation.apply(q), rotation.apply(k), v), 1)
    torch.testing.assert_close(room.rows(0).view_as(wanted), wanted, rtol=1e-6, atol=2e-6)
    assert room.is_untouched_around(0)


def test_only_the_leading_dimensions_turn(threads: Pool) -> None:
    room = Room([3 * 32], 2, head_dim=32, rope_dim=8)
    attach_cache(room, 1, 32)
    x = draw(2, 96, seed=1)
    room.rows(0).copy_(x)
    threads.run_op(room.program, room.op(OpKind.ROPE_TABLE, width=4, weight=torch.ones(4)), room.step)
    threads.run_op(room.program, room.op(OpKind.ROPE_APPEND, src=0, width=96), room.step)
    moved = (room.rows(0) != x).view(2, 3, 32)
    assert not moved[0].any()  # at position 0
    assert moved[1, :2, :8].all()
    assert not moved[1, :, 8:].any()
    assert not moved[1, 2].any()


def test_without_a_table_nothing_turns(threads: Pool) -> None:
    room = Room([48], 3)
    attach_cache(room, 1, 16)
    x = draw(3, 48, seed=1)
    room.rows(0).copy_(x)
    threads.run_op(room.program, room.op(OpKind.ROPE_APPEND, src=0, width=48, rope=-1), room.step)
    assert torch.equal(room.rows(0), x)


@pytest.mark.parametrize("tokens", [1, 3, 200])
def test_what_was_turned_is_what_goes_into_the_cache(threads: Pool, tokens: int) -> None:
    heads, kv_heads, dim = 6, 2, 32
    width = (heads + 2 * kv_heads) * dim
    room = Room([width], tokens, heads=heads, kv_heads=kv_heads, head_dim=dim)
    memory = attach_cache(room, kv_heads, dim)
    room.rows(0).copy_(draw(tokens, width, seed=2))
    threads.run_op(room.program, room.op(OpKind.ROPE_TABLE, width=dim // 2, weight=torch.rand(dim // 2)), room.step)
    threads.run_op(room.program, room.op(OpKind.ROPE_APPEND, src=0, width=width), room.step)
    k, v = room.rows(0).view(tokens, -1, dim)[:, heads:].split(kv_heads, 1)
    keys = memory[0].permute(1, 3, 0, 2).flatten(0, 1)[:tokens]  # [heads, blocks, dim, slots] to [tokens, heads, dim]
    values = memory[1].view(kv_heads, -1, 16, dim).permute(1, 2, 0, 3).flatten(0, 1)[:tokens]
    assert torch.equal(keys, k)
    assert torch.equal(values, v)


@settings(deadline=None, max_examples=25)
@given(width=st.integers(1, 300) | st.integers(4000, 9000), tokens=st.integers(1, 3), seed=seeds)
def test_softcap(threads: Pool, width: int, tokens: int, seed: int) -> None:
    room = Room([width], tokens)
    x = draw(tokens, width, seed=seed, scale=40)
    room.rows(0).copy_(x)
    threads.run_op(room.program, room.op(OpKind.SOFTCAP, dst=0, width=width, softcap=30.0), room.step)
    torch.testing.assert_close(room.rows(0), 30 * (x / 30).tanh(), rtol=2e-6, atol=1e-7)
    assert room.is_untouched_around(0)


def test_softcap_keeps_what_is_not_a_number(threads: Pool) -> None:
    room = Room([20], 1)
    room.rows(0).fill_(math.inf)
    room.rows(0)[0, 3] = math.nan
    threads.run_op(room.program, room.op(OpKind.SOFTCAP, dst=0, width=20, softcap=30.0), room.step)
    assert room.rows(0)[0].isnan().nonzero().flatten().tolist() == [3]
    assert room.rows(0)[0, 0] == pytest.approx(30)


def test_gather_takes_the_sampled_rows(threads: Pool) -> None:
    room = Room([24, 24], 6, samples=[5, 0, 3])
    x = draw(6, 24, seed=0)
    room.rows(0).copy_(x)
    threads.run_op(room.program, room.op(OpKind.GATHER, src=0, dst=1, width=24, of_samples=1), room.step)
    assert torch.equal(room.rows(1)[:3], x[[5, 0, 3]])
    assert room.rows(1)[3:].isnan().all()


@pytest.mark.parametrize("run", [1, 2, 3])
def test_an_operation_of_samples_has_a_row_for_each(threads: Pool, run: int) -> None:
    room = Room([64], 4, samples=[3] * run)
    room.rows(0).fill_(1.0)
    op = room.op(OpKind.PREPARE, src=0, width=64, forms=int(Form.F32), of_samples=1)
    threads.run_op(room.program, op, room.step)
    assert (room.f32[:run, :64] == 1).all()
    assert room.f32[run:].isnan().all()


def each_row_alone(room: Room, work: Callable[[Room], None], x: Tensor) -> None:
    for row in range(len(x)):
        alone = Room(room.widths, 1)
        alone.rows(0).copy_(x[row : row + 1])
        work(alone)
        for together, single in ((room.f32, alone.f32), (room.q8, alone.q8), (room.scales, alone.scales)):
            assert torch.equal(together[row].nan_to_num(), single[0].nan_to_num())


def test_a_row_is_the_same_to_the_bit_whoever_is_beside_it(threads: Pool) -> None:
    """Also where rows are dealt out to threads: 60 rows of 1,500 are eleven items."""
    x, weight = draw(60, 1500, seed=6), draw(1500, seed=7)

    def work(room: Room) -> None:
        op = room.op(OpKind.NORM, src=0, width=1500, weight=weight, eps=1e-5, forms=int(Form.F32 | Form.Q8))
        threads.run_op(room.program, op, room.step)

    room = Room([1500], 60)
    room.rows(0).copy_(x)
    work(room)
    each_row_alone(room, work, x)


def attach_cache(room: Room, kv_heads: int, head_dim: int) -> Tensor:
    """A cache of one segment in float32 for the room's tokens, as [2, kv_heads, blocks, head_dim, 16] (K's shape)."""
    blocks = -(-room.tokens // 16)
    memory = torch.full((2, kv_heads, blocks, head_dim, 16), math.nan)
    segment = (abi.Segment * 1)(abi.Segment(memory.data_ptr(), blocks))
    cache = abi.Cache(ctypes.addressof(segment), 1, 16, int(abi.KvFormat.F32), 1, kv_heads, head_dim, 16)
    room.kept += [memory, segment, cache]
    room.blocks, room.table_starts = np.arange(blocks), np.array([0, blocks])
    room.set_batch()
    room.step.cache = ctypes.addressof(cache)
    return memory
