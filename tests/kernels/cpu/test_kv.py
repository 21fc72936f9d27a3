"""The cache layout's arithmetic, and blocks to the kernels' order and back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekv.core.kv_format import KV_FORMATS, KVFormatName
from edgekv.kernels.cpu.abi import KvFormat
from edgekv.kernels.cpu.kv import KEYS, VALUES, KvLayout

NAMES: dict[KvFormat, KVFormatName] = {
    KvFormat.F32: "float32",
    KvFormat.F16: "float16",
    KvFormat.BF16: "bfloat16",
    KvFormat.INT8: "int8",
}
LAYOUTS = st.builds(
    KvLayout,
    kv_format=st.sampled_from(KvFormat),
    num_layers=st.integers(1, 3),
    num_kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from([16, 48, 256]),
    block_size=st.sampled_from([16, 48, 64]),
)


@given(LAYOUTS)
def test_a_block_has_the_bytes_that_plans_count(layout: KvLayout) -> None:
    assert layout.block_bytes == KV_FORMATS[NAMES[layout.kv_format]].block_bytes(layout, layout.block_size)
    assert layout.block_bytes == layout.planes_per_block * (layout.plane_bytes + layout.scale_bytes)


@given(LAYOUTS, st.integers(1, 4))
def test_planes_and_scales_are_the_whole_segment(layout: KvLayout, num_blocks: int) -> None:
    segment = np.zeros(layout.segment_bytes(num_blocks), np.uint8)
    planes, scales = layout.planes(segment), layout.scales(segment)
    shape = (layout.num_layers, 2, layout.num_kv_heads, num_blocks)
    assert planes.shape == (*shape, layout.plane_bytes)
    assert scales.shape == (*shape, layout.block_size if layout.kv_format is KvFormat.INT8 else 0)
    planes[:] = 1
    scales.view(np.uint8)[:] = 1
    assert segment.all()


@pytest.mark.parametrize("side", [KEYS, VALUES])
@given(LAYOUTS, st.integers(0, 2**32 - 1))
def test_rows_come_back_rounded(side: int, layout: KvLayout, seed: int) -> None:
    rows = np.random.default_rng(seed).standard_normal((3, layout.block_size, layout.head_dim), dtype=np.float32)
    planes, scales = layout.encode(rows, side)
    assert planes.shape == (3, layout.plane_bytes)
    found = layout.decode(planes, scales, side)
    largest = np.abs(rows).max(-1, keepdims=True)
    relative = {KvFormat.F32: 0, KvFormat.F16: 2**-11, KvFormat.BF16: 2**-8, KvFormat.INT8: 0}[layout.kv_format]
    absolute = 0.51 / 127 * largest if layout.kv_format is KvFormat.INT8 else 2**-24
    assert (np.abs(found - rows) <= relative * np.abs(rows) + absolute).all()


def test_pairs_lie_side_by_side_and_slots_are_lanes() -> None:
    """The drawings of ek.h, element by element."""
    rows = (np.arange(16 * 32, dtype=np.float32) % 251).reshape(16, 32)
    flat, paired = (KvLayout(kind, 1, 1, 32, 16) for kind in (KvFormat.F32, KvFormat.BF16))
    for slot, dim in ((0, 0), (3, 1), (4, 17), (15, 31)):
        number = rows[slot, dim]
        assert flat.encode(rows, KEYS)[0].view(np.float32).reshape(32, 16)[dim, slot] == number
        assert flat.encode(rows, VALUES)[0].view(np.float32).reshape(16, 32)[slot, dim] == number
        wanted = number.view(np.uint32) >> 16
        assert paired.encode(rows, KEYS)[0].view(np.uint16).reshape(16, 16, 2)[dim // 2, slot, dim % 2] == wanted
        assert paired.encode(rows, VALUES)[0].view(np.uint16).reshape(8, 32, 2)[slot // 2, dim, slot % 2] == wanted


def test_bf16_rounds_ties_to_even_and_keeps_nan() -> None:
    layout = KvLayout(KvFormat.BF16, 1, 1, 16, 16)
    rows = np.zeros((16, 16), np.float32)
    rows[0, :4] = np.array([0x3F808000, 0x3F818000, 0x7F800001, 0x7F7FFFFF], np.uint32).view(np.float32)
    found = layout.decode(*layout.encode(rows, VALUES), VALUES)[0, :4].view(np.uint32)
    assert found[0] == 0x3F800000
    assert found[1] == 0x3F820000
    assert np.isnan(found[2:3].view(np.float32)).all()
    assert found[3] == 0x7F800000


@pytest.mark.parametrize(("head_dim", "block_size"), [(8, 16), (24, 16), (272, 16), (16, 8), (16, 24)])
def test_sizes_that_the_kernels_do_not_have_are_refused(head_dim: int, block_size: int) -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        KvLayout(KvFormat.F32, 1, 1, head_dim, block_size)
