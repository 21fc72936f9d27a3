"""Heads turned to their positions, against the formula in torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edgekv.kernels.fused import rope
from tests.kernels.fibers.harness import in_all_orders, run_prepared
from tests.kernels.fibers.paged_memory import assert_near, ints

# By type (relative, absolute): products of numbers up to 5 that may cancel, then one rounding, which may be to the
# other neighbour.
BOUNDS = {
    torch.bfloat16: (2**-7, 2e-6),
    torch.float16: (2**-10, 2e-6),
    torch.float32: (1e-6, 2e-6),
}


def angles_of(rows: int, rope_dim: int, generator: torch.Generator) -> Tensor:
    turns = torch.rand(rows, rope_dim // 2, generator=generator) * 100
    return torch.stack((turns.cos(), turns.sin()), 1)


@pytest.mark.parametrize("act", BOUNDS, ids=str)
@settings(max_examples=20)
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_any_heads_are_turned(act: torch.dtype, data: st.DataObject, seed: int) -> None:
    tokens, heads, kv_heads = (data.draw(st.integers(1, most)) for most in (4, 6, 3))
    head_dim = data.draw(st.sampled_from([16, 64, 96, 128, 256]))
    rope_dim = data.draw(st.sampled_from([head_dim, 16, head_dim // 32 * 16]))
    rope_dim = max(rope_dim, 16)
    generator = torch.Generator().manual_seed(seed)
    # As a projection leaves them: queries, keys and values of a token side by side.
    both = torch.randn(tokens, heads + 2 * kv_heads, head_dim, generator=generator).to(act)
    rows = data.draw(st.none() | st.lists(st.integers(0, 9), min_size=tokens, max_size=tokens))
    angles = angles_of(tokens if rows is None else 10, rope_dim, generator)
    own_rows = None if rows is None else ints(rows)

    def launch(order: int) -> Tensor:
        turned = both.clone()
        q, k = turned[:, :heads], turned[:, heads : heads + kv_heads]
        run_prepared(rope.prepare(q, k, angles, own_rows), seed=order)
        return turned

    result, all_turned = in_all_orders(launch, (0, seed | 1)), heads + kv_heads
    assert_near(result[:, :all_turned], rope.reference(both[:, :all_turned], angles, own_rows), BOUNDS)
    assert torch.equal(result[:, all_turned:], both[:, all_turned:])
    assert torch.equal(result[..., rope_dim:], both[..., rope_dim:])


def test_no_turn_changes_no_bit() -> None:
    q = torch.randn(3, 2, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    k, before = q[:, :1].clone(), q.clone()
    still = torch.tensor([1.0, 0.0]).view(1, 2, 1).expand(3, 2, 32).contiguous()
    run_prepared(rope.prepare(q, k, still))
    assert torch.equal(q, before)
    assert torch.equal(k, before[:, :1])


def test_dimensions_that_there_are_not_are_refused() -> None:
    q = torch.zeros(1, 1, 64)
    for rope_dim in (8, 72, 128):
        with pytest.raises(ValueError, match="cannot be turned"):
            rope.prepare(q, q, torch.zeros(1, 2, rope_dim // 2))


def test_what_does_not_fit_together_is_refused() -> None:
    q, angles = torch.zeros(3, 2, 64), torch.zeros(3, 2, 32)
    with pytest.raises(ValueError, match="contiguous float32"):
        rope.prepare(q, q, angles.half())
    for k in (q[:2], q[..., :32], q.half()):
        with pytest.raises(ValueError, match="are not those of queries"):
            rope.prepare(q, k, angles)
    with pytest.raises(ValueError, match="too few for 3 tokens"):
        rope.prepare(q, q, angles[:2])
    for rows in (ints([0, 1]), torch.tensor([0, 1, 2])):
        with pytest.raises(ValueError, match="rows are int32"):
            rope.prepare(q, q, angles[:2], rows)
    with pytest.raises(ValueError, match="not dense"):
        rope.prepare(q[..., ::2], q[..., ::2], angles[..., :16].contiguous())
