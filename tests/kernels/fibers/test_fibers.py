"""What runs on fibers runs in any order, and what would not be right on a card is found."""

import fcntl
import re
import subprocess
import sys
from collections.abc import Sequence
from ctypes import Structure, c_int
from pathlib import Path

import numpy as np
import pytest

from edgekv.kernels.rt.registry import KernelSpec
from tests.kernels.fibers import harness
from tests.kernels.fibers.cases import THREADS, EkCase, Words, order_case
from tests.kernels.fibers.harness import (
    ROOT,
    SEEDS,
    FiberFault,
    FiberKernel,
    OrderMatters,
    fiber_kernel,
    in_all_orders,
    sanitized_environment,
)

BLOCKS = 5
NUMBERS = np.random.default_rng(0).integers(0, 1000, (BLOCKS, THREADS), dtype=np.uint32)
UNTOUCHED = np.uint32(0xFFFFFFFF)


def launch(entry: str, seed: int, *, plant: int = 0, steps: int = 1, numbers: Words = NUMBERS) -> Words:
    kernel = fiber_kernel(order_case(entry), plant={"EK_PLANT": plant})
    out = np.zeros_like(numbers)
    kernel(EkCase(numbers.ctypes.data, out.ctypes.data, steps, len(numbers)), (len(numbers),), seed=seed)
    return out


def added_up(numbers: Words, steps: int) -> Words:
    for _ in range(steps):
        numbers = numbers + np.roll(numbers, 1, axis=1)
    return numbers


WANTED = {
    "ek_reverse": NUMBERS[:, ::-1],
    "ek_neighbours": added_up(NUMBERS, 3),
    "ek_warp_sum": np.repeat(NUMBERS.reshape(BLOCKS, 4, 32).sum(2, dtype=np.uint32), 32, axis=1),
    "ek_one_of_all": np.repeat(NUMBERS[:, :1], THREADS, axis=1),
    "ek_chain": NUMBERS + np.uint32(1),
    "ek_block_sum": np.repeat(NUMBERS.sum(1, dtype=np.uint32)[:, None], THREADS, axis=1),
    "ek_untouched": np.full_like(NUMBERS, UNTOUCHED),
}


@pytest.mark.parametrize("entry", WANTED)
def test_kernels_that_keep_the_rules_give_the_same_in_every_order(entry: str) -> None:
    found = in_all_orders(lambda seed: launch(entry, seed, steps=3), range(8))
    np.testing.assert_array_equal(found, WANTED[entry])


@pytest.mark.parametrize("entry", ["ek_reverse", "ek_warp_sum"])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_missing_barrier_is_found_in_every_order(entry: str, seed: int) -> None:
    assert (launch(entry, seed, plant=1) != WANTED[entry]).any()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_missing_barrier_before_shared_memory_is_written_again_is_found(seed: int) -> None:
    assert (launch("ek_neighbours", seed, plant=1, steps=3) != WANTED["ek_neighbours"]).any()


@pytest.mark.parametrize("entry", ["ek_one_of_all", "ek_chain"])
def test_a_result_that_hangs_on_the_order_is_found(entry: str) -> None:
    with pytest.raises(OrderMatters):
        in_all_orders(lambda seed: launch(entry, seed, plant=1))


@pytest.mark.parametrize(
    ("plant", "said"),
    [
        (1, r"no thread can go on; 4 have returned; 124 wait at ek_shfl_xor"),
        (2, r"comes to ek_shfl_xor \(16\) at .*order_cases.h:\d+, thread \d+ of its warp to ek_shfl_xor \(16\) at"),
        (3, r"comes to ek_shfl_xor \((16|8)\) at .*, thread \d+ of its warp to ek_shfl_xor \((8|16)\) at"),
        (4, r"no thread can go on; (?=.*; \d+ wait at ek_shfl_xor|\d+ wait at ek_shfl_xor)(?=.*\d wait at EK_SYNC)"),
        (5, r"comes to EK_SYNC at .*order_cases.h:\d+, thread \d+ to that at .*order_cases.h:\d+"),
        (6, r"no thread can go on; 32 have returned; 96 wait at EK_SYNC"),
    ],
)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_divergent_exchange_or_barrier_is_a_fault(plant: int, said: str, seed: int) -> None:
    with pytest.raises(FiberFault, match=rf"block \(\d, 0, 0\): .*{said}"):
        launch("ek_block_sum", seed, plant=plant)


def test_a_fault_leaves_the_library_usable() -> None:
    kernel = fiber_kernel(order_case("ek_block_sum"), plant={"EK_PLANT": 4})
    out = np.zeros_like(NUMBERS)
    for _ in range(3):
        with pytest.raises(FiberFault, match="no thread can go on"):
            kernel(EkCase(NUMBERS.ctypes.data, out.ctypes.data, 1, BLOCKS), (BLOCKS,), seed=1)


def wide(kernel: FiberKernel, source: int, target: int, count: int = 1) -> None:
    kernel(EkCase(source, target, count, 1), (1,))


def test_an_address_that_is_no_multiple_of_the_access_is_a_fault() -> None:
    kernel = fiber_kernel(order_case("ek_wide", 32))
    memory = np.zeros(64, np.uint32)
    start = memory.ctypes.data + -memory.ctypes.data % 16
    wide(kernel, start, start + 64)
    with pytest.raises(FiberFault, match=r"ek_ldg16 of .*no multiple of 16"):
        wide(kernel, start + 8, start + 64)
    with pytest.raises(FiberFault, match=r"ek_stg16 of .*no multiple of 16"):
        wide(kernel, start, start + 72)


def test_a_segment_that_is_not_there_is_a_fault_and_no_crash() -> None:
    kernel = fiber_kernel(order_case("ek_wide", 32))
    memory = np.zeros(64, np.uint32)
    start = memory.ctypes.data + -memory.ctypes.data % 16
    with pytest.raises(FiberFault, match=r"ek_ldg16 of 0x.*where there is no memory"):
        wide(kernel, 1 << 20, start)
    with pytest.raises(FiberFault, match=r"ek_stg16 of 0.*where there is no memory"):
        wide(kernel, start, 0)


def test_grids_of_all_dimensions_run_each_block_once() -> None:
    kernel = fiber_kernel(order_case("ek_wide", 32))
    memory = np.zeros(64, np.uint32)
    start = memory.ctypes.data + -memory.ctypes.data % 16
    once = kernel(EkCase(start, start + 64, 1, 1), (1,))
    assert kernel(EkCase(start, start + 64, 1, 1), (3, 4, 5), seed=3) == 60 * once
    with pytest.raises(FiberFault, match="3 x 0 x 5 blocks"):
        kernel(EkCase(start, start + 64, 1, 1), (3, 0, 5))


def test_a_mirror_of_another_size_is_refused() -> None:
    class Shorter(Structure):
        _fields_ = [("steps", c_int)]

    spec = order_case("ek_wide", 32)
    with pytest.raises(TypeError, match="ek_wide takes 24 bytes, and Shorter has 4"):
        fiber_kernel(KernelSpec(spec.source, spec.entry, spec.threads, Shorter))


def test_a_library_is_compiled_by_one_process_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compile(program: str, flags: Sequence[str], library: Path) -> None:
        with library.with_suffix(".lock").open("w") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        library.touch()
        compiled.append(library)

    monkeypatch.setattr(harness, "BUILD", tmp_path)
    monkeypatch.setattr(harness, "_compile", compile)
    spec = order_case("ek_wide", 32)
    for _ in range(2):  # beside what this process remembers
        harness._library.__wrapped__(spec.source, spec.entry, spec.threads, (), False)
    assert len(compiled) == 1


def test_fibers_by_the_systems_own_switch_give_the_same() -> None:
    kernel = fiber_kernel(order_case("ek_block_sum"), plant={"EK_UCONTEXT": 1})
    out = np.zeros_like(NUMBERS)
    for seed in SEEDS:
        kernel(EkCase(NUMBERS.ctypes.data, out.ctypes.data, 1, BLOCKS), (BLOCKS,), seed=seed)
        np.testing.assert_array_equal(out, WANTED["ek_block_sum"])


# A process of its own: kernels whose memory is watched. The last argument is how far beyond the end it goes.
WATCHED = """
import sys
import numpy as np
from tests.kernels.fibers import harness
from tests.kernels.fibers.cases import EkCase, order_case
from tests.kernels.fibers.harness import fiber_kernel
entry, beyond = sys.argv[1], int(sys.argv[2])
memory, out = np.zeros(4096, np.uint8), np.zeros(4096, np.uint8)
for seed in range(3):
    fiber_kernel(order_case("ek_reverse", 128))(EkCase(memory.ctypes.data, out.ctypes.data, 1, 2), (2,), seed=seed)
start = memory.ctypes.data + (-memory.ctypes.data) % 16
watched = np.zeros(1 << 20, np.uint8)
end = (watched.ctypes.data + watched.size) // 16 * 16
source = {"ek_wide": end - 32 * 16 + beyond, "ek_shared_index": 0}[entry]
steps = {"ek_wide": 32, "ek_shared_index": beyond}[entry]
fiber_kernel(order_case(entry, 32))(EkCase(source, start, steps, 1), (1,))
print("done")
"""


def watched(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WATCHED, *arguments],
        env=sanitized_environment(), cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("entry", ["ek_wide", "ek_shared_index"])
def test_sanitized_kernels_may_use_all_of_their_memory_and_not_a_byte_more(entry: str) -> None:
    inside = watched([entry, "0"])
    assert inside.returncode == 0, inside.stderr[-4000:]
    assert "done" in inside.stdout
    beyond = watched([entry, {"ek_wide": "16", "ek_shared_index": "1"}[entry]])
    assert beyond.returncode != 0
    assert re.search("AddressSanitizer: |runtime error: ", beyond.stderr)
    assert entry in beyond.stderr
