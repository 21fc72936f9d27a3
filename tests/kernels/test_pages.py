"""Memory of its own: zeros, returned with the last view of it, and refused in words where there is none."""

import gc
from pathlib import Path

import numpy as np
import pytest

from edgekv.kernels.pages import map_pages

SIZE = 24 << 20

needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_it_is_zeros_and_can_be_written_to() -> None:
    view = np.frombuffer(map_pages(10_000, commit=False), np.uint8)
    assert (len(view), view.any()) == (10_000, False)
    assert view.ctypes.data % 4096 == 0
    view[:] = 7
    assert view[-1] == 7


@needs_proc
@pytest.mark.parametrize("advice", [23, 9999])
def test_committed_pages_are_there_at_once_and_gone_with_the_last_view(
    advice: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a kernel that does not know the advice, too."""
    monkeypatch.setattr("edgekv.kernels.pages._POPULATE_WRITE", advice)
    before = resident_bytes()
    view = np.frombuffer(map_pages(SIZE, commit=True), np.uint8)
    part = view[SIZE // 2 :]
    assert resident_bytes() - before > 0.9 * SIZE
    del view
    gc.collect()
    assert resident_bytes() - before > 0.9 * SIZE
    del part
    gc.collect()
    assert resident_bytes() - before < 0.3 * SIZE


@needs_proc
def test_other_pages_come_as_they_are_written_to() -> None:
    before = resident_bytes()
    view = np.frombuffer(map_pages(SIZE, commit=False), np.uint8)
    assert resident_bytes() - before < 0.3 * SIZE
    view[:] = 1
    assert resident_bytes() - before > 0.9 * SIZE


def test_what_there_is_not_is_a_memory_error() -> None:
    with pytest.raises(MemoryError, match=r"no 1,152,921,504,606,846,976 bytes of main memory"):
        map_pages(1 << 60, commit=False)
