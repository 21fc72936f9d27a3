"""Thousands of damaged files are read or refused, and the fuzzer notices a reader that does neither."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgekv.errors import ModelError
from tests.unit.formats import fuzz_gguf

REPOSITORY = Path(__file__).parents[3]


def test_no_damaged_file_does_harm() -> None:
    command = [sys.executable, "-m", "tests.unit.formats.fuzz_gguf", "--count", "4000", "--seed", "11"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("4,000 files in ")
    assert done.stdout.endswith("\n0 faults\n")


def test_cases_can_be_repeated() -> None:
    assert fuzz_gguf.case(3, 5) == fuzz_gguf.case(3, 5)
    assert len({fuzz_gguf.case(3, index) for index in range(200)}) > 190


@pytest.mark.parametrize("name", ["IndexError", "MemoryError", "AssertionError"])
def test_any_other_error_is_a_fault(name: str) -> None:
    def read(path: Path) -> None:
        raise {"IndexError": IndexError, "MemoryError": MemoryError, "AssertionError": AssertionError}[name]

    assert fuzz_gguf.read_one(read, (ModelError,), b"") == (name, False)


def test_a_read_without_end_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_gguf, "CASE_S", 0.05)

    def read(path: Path) -> None:
        while True:
            path.stat()

    assert fuzz_gguf.read_one(read, (ModelError,), b"") == ("TooLong", False)


def test_memory_is_limited() -> None:
    """In a process of its own, whose limit stays."""
    program = (
        "from tests.unit.formats import fuzz_gguf as f\n"
        "big = lambda path: bytearray(f.MEMORY_BYTES * 2) if path.stat().st_size != len(f.SEEDS[0].build()) else None\n"
        "print(f.run_batch(1, range(3), big, (), f.MEMORY_BYTES).faults)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, env=os.environ
    )
    assert done.stdout == f"{[f'case {index}: MemoryError' for index in range(3)]}\n", done.stderr
