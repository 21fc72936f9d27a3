"""A segment's memory is zeros, its own, and the system's again once it is freed."""

from pathlib import Path

import pytest
import torch

from edgekv.engine.segment_memory import SegmentMemory

CPU = torch.device("cpu")
MIB = 1 << 20


def resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) << 10
    raise AssertionError("no RssAnon")


def data_of(memory: SegmentMemory) -> torch.Tensor:
    assert memory.data is not None
    return memory.data


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn])
def test_it_is_zeros_of_the_shape_and_type_asked_for(dtype: torch.dtype) -> None:
    data = data_of(SegmentMemory((3, 2, 5, 7), dtype=dtype, device=CPU, commit=True))
    assert (data.shape, data.dtype, data.is_contiguous()) == ((3, 2, 5, 7), dtype, True)
    assert not data.view(torch.uint8).any()


def test_committed_memory_is_there_at_once_and_gone_when_freed() -> None:
    before = resident_bytes()
    memory = SegmentMemory((64, MIB), dtype=torch.uint8, device=CPU, commit=True)
    assert 63 * MIB < resident_bytes() - before < 70 * MIB
    memory.free()
    assert abs(resident_bytes() - before) < 4 * MIB


def test_memory_that_is_not_committed_comes_as_it_is_written_to() -> None:
    before = resident_bytes()
    memory = SegmentMemory((64, MIB), dtype=torch.uint8, device=CPU, commit=False)
    assert resident_bytes() - before < 4 * MIB
    data_of(memory)[:16].fill_(1)
    assert 15 * MIB < resident_bytes() - before < 22 * MIB


def test_a_view_that_is_still_used_keeps_the_memory_until_it_goes() -> None:
    before = resident_bytes()
    memory = SegmentMemory((32, MIB), dtype=torch.uint8, device=CPU, commit=True)
    view = data_of(memory)[3]
    memory.free()
    assert resident_bytes() - before > 30 * MIB
    assert not view.any()
    del view
    assert resident_bytes() - before < 4 * MIB


@pytest.mark.parametrize("commit", [True, False])
def test_memory_that_is_not_there_is_a_memory_error(commit: bool) -> None:
    with pytest.raises(MemoryError, match=r"no [\d,]+ bytes of main memory"):
        SegmentMemory((1 << 30, 1 << 20), dtype=torch.uint8, device=CPU, commit=commit)
