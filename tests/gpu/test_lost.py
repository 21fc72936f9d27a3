"""A card that is lost takes its process with it: in children, since their cards are lost to them for good."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.bed import Bed

ROOT = Path(__file__).parents[2]

# Blocks are copied from an address at which there is nothing; whoever launches next is told.
ILLEGAL_ADDRESS = """
import torch
from edgekv.kernels.attn import block_copy
from edgekv.kernels.attn.gpu_layout import BlockOrder, GpuCache, GpuKvFormat, GpuLayout
from edgekv.kernels.rt.device_error import DeviceLost
from tests.gpu.bed import open_bed

bed = open_bed()
layout = GpuLayout(GpuKvFormat.BF16, BlockOrder.BLOCK_MAJOR, 1, 1, 64, 16, 4)
segment = torch.zeros(layout.segment_bytes(), dtype=torch.uint8, device=bed.device)
right, wrong = (
    GpuCache(layout, {}, torch.tensor([address], device=bed.device)) for address in (segment.data_ptr(), 1 << 40)
)
copies = torch.tensor([[0, 1, 16]], dtype=torch.int32, device=bed.device)
bed.run(block_copy.prepare(right, right, copies))
launcher = bed.card.launchers.launcher(block_copy.spec())
bad = block_copy.prepare(wrong, right, copies)
launcher(bad.grid, bad.args, bed.card.stream)
try:
    torch.cuda.synchronize()
except RuntimeError as error:
    print(type(error).__name__, str(error).splitlines()[0])
try:
    launcher(bad.grid, bad.args, bed.card.stream)
except DeviceLost as error:
    print("DeviceLost", error)
"""


def test_an_illegal_address_is_told_as_a_lost_device(real: Bed) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ILLEGAL_ADDRESS], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    print(done.stdout, done.stderr[-2000:])
    assert "DeviceLost" in done.stdout


def test_a_server_whose_card_is_lost_says_so_and_ends_with_70(real: Bed, tmp_path: Path) -> None:
    servers = pytest.importorskip("tests.gpu.servers", exc_type=ImportError)
    server = servers.start_server(tmp_path, device="auto", module="tests.gpu.lost_server")
    try:
        response = server.chat("How do I grow tomatoes?", temperature=0, max_tokens=200)
        assert response.status_code >= 500 or "device_lost" in response.text
        assert server.process.wait(60) == 70, server.output
        # What cannot be mended is told to those who wait and to whoever starts it again.
        assert any("llegal" in line or "DeviceLost" in line for line in server.lines), server.output
    finally:
        server.kill()
