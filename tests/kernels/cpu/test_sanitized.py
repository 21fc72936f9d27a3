"""The kernels under the address and the undefined behaviour sanitizer, on random shapes: see sanitized_cases/."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from edgekv.kernels.cpu.build import build, find_compiler, library_name

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
CASES = sorted(file.stem for file in (HERE / "sanitized_cases").glob("[a-z]*.py"))
SEEDS = 60
FLAGS = ("-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


def runtime(compiler: list[str]) -> str | None:
    """The address sanitizer's library, which has to be there before all others."""
    asked = subprocess.run([*compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=False)
    path = Path(asked.stdout.strip())
    return str(path.resolve()) if path.is_absolute() and path.exists() else None


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """That of a process with the library, compiled for this module."""
    compiler = find_compiler()
    preloaded = runtime(compiler) if compiler else None
    if compiler is None or preloaded is None:
        pytest.skip("there is no compiler with an address sanitizer")
    path = tmp_path_factory.mktemp("sanitized") / library_name()
    build(path, compiler, flags=FLAGS)
    return os.environ | {
        "LD_PRELOAD": preloaded,
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "EDGEKV_CPU_KERNELS": str(path),
    }


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.kernels.cpu.sanitized_cases", *arguments],
        env=environment, cwd=HERE.parents[2], capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_memory_and_arithmetic_are_in_order(environment: dict[str, str], case: str) -> None:
    done = run(environment, case, "0", str(SEEDS))
    assert done.returncode == 0, done.stdout[-100:] + done.stderr[-4000:]
    assert len(done.stdout.splitlines()) == SEEDS


def test_a_byte_too_far_is_noticed(environment: dict[str, str]) -> None:
    program = (
        "import numpy as np; from tests.kernels.cpu.sanitized_cases._memory import guarded, library, pool;"
        "data = guarded(128, np.uint8); library().functions.ek_read(pool('plain', 1), data.ctypes.data, 192)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment, cwd=HERE.parents[2], capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert re.search("AddressSanitizer: use-after-poison", done.stderr)
