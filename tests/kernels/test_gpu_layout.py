"""Where keys and values lie on a card: how much a block takes, and that planes and blocks do not overlap."""

import pytest
import torch
from torch import Tensor

from edgekv.kernels.attn.gpu_layout import BlockOrder, GpuKvFormat, GpuLayout


def layout(
    kv_format: GpuKvFormat = GpuKvFormat.INT8,
    order: BlockOrder = BlockOrder.BLOCK_MAJOR,
    *,
    num_layers: int = 3,
    kv_heads: int = 2,
    head_dim: int = 96,
    block_size: int = 16,
    segment_blocks: int = 4,
) -> GpuLayout:
    return GpuLayout(kv_format, order, num_layers, kv_heads, head_dim, block_size, segment_blocks)


@pytest.mark.parametrize(
    ("kv_format", "head_dim", "kv_heads", "layer_bytes"),
    [
        (GpuKvFormat.BF16, 128, 8, 2 * 32768),
        (GpuKvFormat.F32, 128, 8, 2 * 65536),
        (GpuKvFormat.E4M3, 64, 3, 2 * 3072),
        (GpuKvFormat.INT8, 128, 8, 2 * (16384 + 256)),
        (GpuKvFormat.INT8, 96, 3, 2 * (4608 + 128)),  # 96 bytes of scales
        (GpuKvFormat.INT4, 128, 8, 2 * (8192 + 512)),
        (GpuKvFormat.INT4, 32, 1, 2 * (256 + 128)),  # 64 bytes of scales
    ],
)
def test_a_block_takes_what_the_formula_says(
    kv_format: GpuKvFormat, head_dim: int, kv_heads: int, layer_bytes: int
) -> None:
    for order in BlockOrder:
        each = layout(kv_format, order, head_dim=head_dim, kv_heads=kv_heads)
        assert each.block_stride == 3 * layer_bytes
        assert each.segment_bytes() == 4 * each.block_stride


@pytest.mark.parametrize("order", BlockOrder)
@pytest.mark.parametrize("kv_format", GpuKvFormat)
def test_every_byte_of_a_segment_is_of_one_plane_or_of_none(kv_format: GpuKvFormat, order: BlockOrder) -> None:
    each = layout(kv_format, order)
    owners = torch.zeros(each.segment_bytes(), dtype=torch.uint8)
    for layer in range(3):
        for views in (each.rows, each.scales):
            for plane in views(owners, layer):
                plane.view(torch.uint8).add_(1)
                assert plane.storage_offset() * plane.itemsize % 128 == 0
    assert owners.max() == 1
    rows = 3 * 2 * 4 * 2 * 16  # layers, keys and values, slots, heads, tokens
    assert owners.sum() == rows * (each.row_bytes + each.scale_bytes)


def test_a_block_major_segment_may_be_a_short_one() -> None:
    each = layout()
    assert each.segment_bytes(3) == 3 * each.block_stride
    keys, _ = each.rows(torch.zeros(each.segment_bytes(3), dtype=torch.uint8), 2)
    assert keys.shape == (3, 2, 16, 96)


@pytest.mark.parametrize(
    ("order", "num_blocks"),
    [
        (BlockOrder.LAYER_MAJOR, 3),  # the place of its layers would be another one
        (BlockOrder.BLOCK_MAJOR, 5),
        (BlockOrder.BLOCK_MAJOR, 0),
    ],
)
def test_a_segment_that_kernels_could_not_find_their_way_in_is_refused(order: BlockOrder, num_blocks: int) -> None:
    each = layout(order=order)
    with pytest.raises(ValueError, match="segment of 4 blocks cannot have"):
        each.segment_bytes(num_blocks)
    with pytest.raises(ValueError, match="cannot have"):
        each.rows(torch.zeros(num_blocks * each.block_stride, dtype=torch.uint8), 0)


def test_bytes_that_are_no_whole_blocks_are_refused() -> None:
    each = layout()
    segment: Tensor = torch.zeros(each.block_stride + 128, dtype=torch.uint8)
    with pytest.raises(ValueError, match="is no 1 blocks of"):
        each.rows(segment, 0)


@pytest.mark.parametrize("wrong", [{"block_size": 8}, {"head_dim": 48}, {"head_dim": 288}, {"segment_blocks": 3}])
def test_sizes_that_the_kernels_do_not_have_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"blocks have|head dim|power of two"):
        layout(**wrong)  # type: ignore[arg-type]
