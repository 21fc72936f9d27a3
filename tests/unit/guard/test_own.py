import mmap
import os

import pytest
import torch

from bench.guard.own import LEAST_BYTES, OwnMeter, mapped_bytes
from edgekv.engine.segment_memory import SegmentMemory

MIB = 1 << 20


def test_a_mapping_that_nobody_has_touched_counts_and_is_gone_when_it_is() -> None:
    meter = OwnMeter(os.getpid(), 7 * MIB)
    assert meter.read() == 7 * MIB
    held = mmap.mmap(-1, 640 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # The kernel joins it with a small neighbour, which counts with it as long as it is there.
    assert meter.read() == pytest.approx(647 * MIB, abs=LEAST_BYTES)
    held.close()
    assert meter.read() == pytest.approx(7 * MIB, abs=LEAST_BYTES)


def test_files_stacks_and_reserved_addresses_are_not_counted() -> None:
    maps = """\
7f0000000000-7f0004000000 rw-p 00000000 00:00 0
7f0004000000-7f0008000000 rw-p 00000000 00:00 0
7f0010000000-7f0010800000 rw-p 00000000 00:00 0
7f0020000000-7f0024000000 ---p 00000000 00:00 0
7f0030000000-7f0034000000 r--p 00000000 08:01 42 /usr/lib/large.so
7f0040000000-7f0044000000 rw-p 00000000 08:01 42 /usr/lib/large.so
7f0050000000-7f0054000000 rw-p 00000000 00:00 0 [heap]
"""
    assert mapped_bytes(maps) == 128 * MIB


def test_the_segments_of_a_pool_are_counted_as_they_come_and_go() -> None:
    def segment() -> SegmentMemory:
        return SegmentMemory((40 * MIB,), dtype=torch.uint8, device=torch.device("cpu"), commit=False)

    meter = OwnMeter(os.getpid(), 0)
    held = [segment(), segment(), segment()]
    assert meter.read() == pytest.approx(120 * MIB, abs=LEAST_BYTES)
    held.pop(1).free()  # the one between the others
    assert meter.read() == pytest.approx(80 * MIB, abs=LEAST_BYTES)
    held.append(segment())
    assert meter.read() == pytest.approx(120 * MIB, abs=LEAST_BYTES)
    for each in held:
        each.free()
    assert meter.read() < LEAST_BYTES
