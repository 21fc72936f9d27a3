"""Kernels of the card on the host: a kernel's header, compiled with fibers for threads, and launched by ctypes.

A library is compiled once for each source with all it includes, defines and flags, and kept in build/ of the tree.
What a launch can tell apart from a card's: see kernels/common/compat.h for the rules that it checks.
"""

import ctypes
import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from ctypes import Structure, byref, c_char_p, c_int, c_uint32, c_uint64, c_void_p, sizeof
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pytest

from edgekv.kernels.rt.registry import KERNELS, KernelSpec
from edgekv.kernels.rt.source import read_source

if TYPE_CHECKING:
    from edgekv.kernels.common.prepared import Prepared

ROOT = Path(__file__).parents[3]
BUILD = ROOT / "build" / "fibers"
SANITIZE = "EDGEKV_FIBER_SANITIZE"  # set: all libraries are compiled with sanitizers
SEEDS = (0, 1, 2, 3)

FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-w", "-ffp-contract=off", "-fno-strict-aliasing")
SANITIZERS = (
    "-g1", "-fsanitize=address,undefined", "-fsanitize-sections=ek_shared", "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
)  # fmt: skip
FAULT = 2**64 - 1
_INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)
_T = TypeVar("_T")


class FiberFault(Exception):
    """A launch that could not go on, or must not on a card."""


class OrderMatters(AssertionError):
    """A launch had other results when its threads ran in another order."""


class FiberKernel:
    """One kernel, ready to be launched."""

    def __init__(self, spec: KernelSpec, library: Path) -> None:
        self.spec = spec
        functions = ctypes.CDLL(str(library))
        self._run, self._fault = functions.ek_run, functions.ek_fault
        self._run.argtypes, self._run.restype = (c_void_p, c_int, c_int, c_int, c_uint32), c_uint64
        self._fault.restype = c_char_p
        functions.ek_args_bytes.restype = c_uint64
        if (size := functions.ek_args_bytes()) != sizeof(spec.args):
            raise TypeError(f"{spec.entry} takes {size} bytes, and {spec.args.__name__} has {sizeof(spec.args)}")

    def __call__(self, args: Structure, grid: Sequence[int], *, seed: int = 0) -> int:
        """Launch, and wait: how often fibers were switched. Raises FiberFault."""
        assert isinstance(args, self.spec.args)
        x, y, z = (*grid, 1, 1)[:3]
        switches: int = self._run(byref(args), x, y, z, seed)
        if switches == FAULT:
            raise FiberFault(f"{self.spec}: {self._fault().decode(errors='replace')}")
        return switches


def fiber_kernel(spec: KernelSpec, *, plant: Mapping[str, int] | None = None) -> FiberKernel:
    """`spec` compiled for the host, with `plant` defined beside its own defines; skips where nothing compiles."""
    defines = tuple(sorted({**spec.defines, **(plant or {})}.items()))
    return FiberKernel(spec, _library(spec.source, spec.entry, spec.threads, defines, bool(os.environ.get(SANITIZE))))


def run_prepared(
    prepared: "Prepared | Iterable[Prepared]", *, seed: int = 0, plant: str | Mapping[str, int] | None = None
) -> None:
    """Launch one, or one after the other, and wait; `plant` is a fault that they are compiled with."""
    from edgekv.kernels.common.prepared import Prepared  # it needs torch, and who has no tensors can do without

    defines = {plant: 1} if isinstance(plant, str) else plant
    for each in (prepared,) if isinstance(prepared, Prepared) else prepared:
        fiber_kernel(each.spec, plant=defines)(each.args, each.grid, seed=seed)


def in_all_orders(launch: Callable[[int], _T], seeds: Sequence[int] = SEEDS) -> _T:
    """What `launch(seed)` returns (arrays or tensors, or a sequence of them), the same bits for every seed.

    Raises OrderMatters.
    """
    first = launch(seeds[0])
    wanted = _bytes(first)
    for seed in seeds[1:]:
        if _bytes(launch(seed)) != wanted:
            raise OrderMatters(f"seeds {seeds[0]} and {seed} differ")
    return first


def sanitized_environment() -> dict[str, str]:
    """Variables of a process whose libraries check each access to memory; skips where there are no sanitizers."""
    asked = subprocess.run([_compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True, check=False)
    runtime = Path(asked.stdout.strip())
    if not runtime.is_absolute() or not runtime.exists():
        pytest.skip("there is no compiler with an address sanitizer")
    return os.environ | {
        SANITIZE: "1",
        "LD_PRELOAD": str(runtime.resolve()),
        # Fibers have stacks of their own, which the sanitizer would replace by others.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def run_sanitized(module: str, *arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """`python -m module arguments` with sanitizers. Cheapest where the module needs numpy alone."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=sanitized_environment(), cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip


def _bytes(value: Any) -> list[bytes]:
    if isinstance(value, tuple | list):
        return [part for each in value for part in _bytes(each)]
    if not isinstance(value, np.ndarray):  # a tensor; numpy has no bfloat16
        import torch

        value = value.detach().contiguous().view(torch.uint8).numpy()
    return [np.ascontiguousarray(value).tobytes()]


@cache
def _compiler() -> str:
    for name in (os.environ.get("CXX", ""), "g++", "c++"):
        if name and (found := shutil.which(name)):
            return found
    pytest.skip("there is no C++ compiler")


@cache
def _compiler_version() -> str:
    return subprocess.run([_compiler(), "--version"], capture_output=True, text=True, check=True).stdout


@cache
def _machine_flags() -> tuple[str, ...]:
    """A library call for each fused multiplication would take most of the time."""
    cpu = Path("/proc/cpuinfo")
    has_fma = platform.machine() == "x86_64" and cpu.exists() and " fma " in cpu.read_text(encoding="utf-8")
    return ("-mfma",) if has_fma else ()


@cache
def _library(
    source: str, entry: str, threads: int, defines: tuple[tuple[str, int], ...], is_sanitized: bool
) -> Path:
    flags = [*FLAGS, *_machine_flags(), *(SANITIZERS if is_sanitized else ())]
    flags += [f"-D{name}={value}" for name, value in defines]
    # The structure is the one that the kernel takes, whatever its mirror is called.
    program = (
        f'#include "{source}"\n'
        f"EK_FIBER_ENTRY({entry}, decltype(ek_fibers::args_of({entry})), {threads})\n"
    )
    parts = (program, *flags, _compiler_version(), _whole_text(source))
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    library = BUILD / f"{entry}-{key}.so"
    with _alone(BUILD / f"{entry}-{key}.lock"):
        if not library.exists():
            _compile(program, flags, library)
    return library


def _compile(program: str, flags: Sequence[str], library: Path) -> None:
    unfinished = library.with_suffix(f".{os.getpid()}")
    command = [_compiler(), "-x", "c++", "-", "-I", str(KERNELS), *flags, "-o", str(unfinished)]
    done = subprocess.run(command, input=program, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{program}\n{done.stderr[:6000]}")
    unfinished.rename(library)


def _whole_text(source: str) -> str:
    """A source with all that it includes; a test's own includes only what is in kernels/."""
    path = KERNELS / source
    if path.is_relative_to(KERNELS):
        return read_source(KERNELS, source)
    text = path.read_text(encoding="utf-8")
    return text + "".join(read_source(KERNELS, name) for name in _INCLUDE.findall(text))


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One process at a time; the others find what it has made."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
