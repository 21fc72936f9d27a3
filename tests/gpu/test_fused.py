"""The small kernels between the large ones, on the card: norms, gates, turns."""

from collections.abc import Iterator
from itertools import product

import pytest
import torch

from edgekv.kernels.fused import gated, rmsnorm, rope
from edgekv.kernels.fused.gated import Gate
from edgekv.kernels.fused.rmsnorm import Add
from edgekv.kernels.rt.registry import KernelSpec
from tests.gpu import bounds
from tests.gpu.bed import Bed
from tests.kernels.fibers.paged_memory import ACTS, assert_near, ints

WIDTHS = (896, 4096, 10240)
of_acts = pytest.mark.parametrize("act", ACTS, ids=str)


def specs(bed: Bed) -> Iterator[KernelSpec]:
    for act in ACTS:
        yield rope.spec(act)
        yield from (gated.spec(gate, act) for gate in Gate)
        for add, rounds_first, width in product(Add, (False, True), bed.sized(card=WIDTHS, host=WIDTHS[:1])):
            yield rmsnorm.spec(width, act, add=add, rounds_first=rounds_first)


@of_acts
@pytest.mark.parametrize("add", Add)
def test_rows_are_normed(act: torch.dtype, add: Add, bed: Bed) -> None:
    for width, rounds_first in product(bed.sized(card=WIDTHS, host=WIDTHS[:1]), (False, True)):
        generator = torch.Generator().manual_seed(width)
        wide = torch.full((bed.sized(card=130, host=3), 2 * width + 8), torch.nan, dtype=act)
        x, other = wide[:, :width], wide[:, width : 2 * width]
        for each in (x, other):
            each.copy_(torch.randn(each.shape, generator=generator))
        weight = torch.rand(width, generator=generator) * 2
        own_x, own_weight = bed.put(x), bed.put(weight)
        own_other = None if add is Add.NOTHING else bed.put(other)
        out = torch.full(x.shape, torch.nan, dtype=act, device=bed.device)
        total = torch.full_like(out, torch.nan) if add is Add.BEFORE else None
        bed.run(
            rmsnorm.prepare(
                own_x, own_weight, out, eps=1e-5, add=add, rounds_first=rounds_first, other=own_other, total=total
            )
        )
        wanted, sums = rmsnorm.reference(x, weight, eps=1e-5, add=add, rounds_first=rounds_first, other=other)
        assert_near(out.cpu(), wanted, bounds.NORMED)
        if total is not None:
            assert sums is not None
            assert torch.equal(total.cpu(), sums)


@of_acts
@pytest.mark.parametrize("gate", Gate)
def test_gates_open_and_shut(act: torch.dtype, gate: Gate, bed: Bed) -> None:
    rows, width = bed.sized(card=(65, 14336), host=(2, 264))
    both = (torch.randn(rows, 2 * width, generator=torch.Generator().manual_seed(1)) * 6).to(act)
    both[0, :7] = torch.tensor([-1e4, -100.0, -0.0, 0.0, 100.0, 1e4, torch.nan])
    own = bed.put(both)
    out = torch.full((rows, width), torch.nan, dtype=act, device=bed.device)
    bed.run(gated.prepare(own[:, :width], own[:, width:], out, gate))
    wanted = gated.reference(both[:, :width], both[:, width:], gate)
    assert torch.equal(out.cpu().isnan(), wanted.isnan())
    assert_near(out.cpu().nan_to_num(), wanted.nan_to_num(), bounds.GATED)


@of_acts
@pytest.mark.parametrize(("head_dim", "rope_dim"), [(128, 128), (96, 96), (256, 64)])
def test_heads_are_turned(act: torch.dtype, head_dim: int, rope_dim: int, bed: Bed) -> None:
    tokens, heads, kv_heads = bed.sized(card=(200, 32, 8), host=(3, 3, 1))
    generator = torch.Generator().manual_seed(head_dim)
    turns = torch.rand(64, rope_dim // 2, generator=generator) * 100
    angles, rows = torch.stack((turns.cos(), turns.sin()), 1), ints(7 * i % 64 for i in range(tokens))
    both = torch.randn(tokens, heads + 2 * kv_heads, head_dim, generator=generator).to(act)
    own, own_angles, own_rows = bed.put(both), bed.put(angles), bed.put(rows)
    bed.run(rope.prepare(own[:, :heads], own[:, heads : heads + kv_heads], own_angles, own_rows))
    got, turned = own.cpu(), heads + kv_heads
    assert_near(got[:, :turned], rope.reference(both[:, :turned], angles, rows), bounds.TURNED)
    assert torch.equal(got[:, turned:], both[:, turned:])
    assert torch.equal(got[..., rope_dim:], both[..., rope_dim:])
