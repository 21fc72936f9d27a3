"""Which card these tests have, and that a kernel can be compiled for it, loaded and launched."""

import torch

from edgekv.kernels.attn import block_copy
from edgekv.kernels.attn.gpu_layout import BlockOrder, GpuCache, GpuKvFormat, GpuLayout
from tests.gpu.bed import Bed


def test_there_is_a_card(bed: Bed) -> None:
    if bed.is_real:
        properties = torch.cuda.get_device_properties(bed.device)
        print(f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB, torch {torch.__version__}")
        print(f"target {bed.card.target}, driver's version {bed.card.loader.driver.version}")
    layout = GpuLayout(GpuKvFormat.BF16, BlockOrder.BLOCK_MAJOR, 1, 1, 64, 16, 2)
    segment = torch.arange(layout.segment_bytes(), device=bed.device).to(torch.uint8)
    table = torch.tensor([segment.data_ptr()], device=bed.device)
    copies = torch.tensor([[0, 1, 16]], dtype=torch.int32, device=bed.device)
    first = segment[: layout.block_stride].clone()
    segment[layout.block_stride :] = 0
    cache = GpuCache(layout, {0: segment}, table)
    bed.run(block_copy.prepare(cache, cache, copies))
    assert torch.equal(segment[: layout.block_stride], first)
    assert torch.equal(segment[layout.block_stride :], first)
