"""The compiler and the driver of this machine: those that torch itself uses, where it has them.

Runs in: any thread; owns: nothing.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from edgekv.kernels.rt.apart import CompilerApart
from edgekv.kernels.rt.compiler import CALLED, Compiler, CompilerKind, CompilerMissing
from edgekv.kernels.rt.device_error import DriverError
from edgekv.kernels.rt.driver import Driver, DriverKind
from edgekv.kernels.rt.libraries import find_libraries, library_folders, library_version
from edgekv.kernels.rt.rtc import RuntimeCompiler

_COMPILERS: dict[CompilerKind, re.Pattern[str]] = {
    "nvrtc": re.compile(r"libnvrtc(-[0-9a-f]{8})?\.so(\.\d+)*"),
    "hiprtc": re.compile(r"libhiprtc(-[0-9a-f]{8})?\.so(\.\d+)*"),
}
_DRIVERS: dict[DriverKind, re.Pattern[str]] = {
    "cuda": re.compile(r"libcuda\.so\.1"),
    "hip": re.compile(r"libamdhip64(-[0-9a-f]{8})?\.so(\.\d+)*"),
}
_GET_COMPILER: dict[CompilerKind, str] = {
    "nvrtc": (
        "torch's CUDA builds bring it; alone: pip install nvidia-cuda-nvrtc (for CUDA 12: nvidia-cuda-nvrtc-cu12)"
    ),
    "hiprtc": "torch's ROCm builds bring it: install torch again, from its index for ROCm",
}
_GET_DRIVER: dict[DriverKind, str] = {
    "cuda": "install NVIDIA's driver (on WSL: the one of Windows)",
    "hip": "torch's ROCm builds bring it: install torch again, from its index for ROCm",
}
_DRIVER_CALLED: dict[DriverKind, str] = {"cuda": "NVIDIA driver (libcuda.so.1)", "hip": "HIP runtime"}


class DriverMissing(Exception):
    """There is no driver library: why, and what to do about it."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}; {remedy}")
        self.reason, self.remedy = reason, remedy


def find_compiler(kind: CompilerKind, torch_folders: Sequence[Path] = (), *, major: int | None = None) -> Compiler:
    """The compiler beside torch, else another of this machine. Raises CompilerMissing.

    `major` is CUDA's major version that torch was built with: a driver need not load what a newer compiler made.
    HIPRTC is run in a process of its own, since some of its versions crash.
    """
    paths = find_libraries(_COMPILERS[kind], library_folders(torch_folders))
    if major is not None:
        paths.sort(key=lambda path: library_version(path)[:1] != (major,))
    failures = []
    for path in paths:
        try:
            compiler = RuntimeCompiler(kind, path)
        except OSError as error:
            failures.append(str(error))
        else:
            return CompilerApart(compiler) if kind == "hiprtc" else compiler
    raise CompilerMissing(_why(CALLED[kind], failures), _GET_COMPILER[kind])


def find_driver(kind: DriverKind, torch_folders: Sequence[Path] = ()) -> Driver:
    """The driver that torch has loaded, else the one that it would load. Raises DriverMissing, DriverError."""
    paths: list[Path | str] = [*find_libraries(_DRIVERS[kind], library_folders(torch_folders))]
    if kind == "cuda":
        # Under this name the loader knows it wherever the system keeps it; what is loaded already is the same.
        paths.insert(0, "libcuda.so.1")
    failures = []
    for path in paths:
        try:
            return Driver(kind, path)
        except (OSError, DriverError) as error:  # a stub loads, and answers nothing
            failures.append(str(error))
    raise DriverMissing(_why(_DRIVER_CALLED[kind], failures), _GET_DRIVER[kind])


def _why(called: str, failures: list[str]) -> str:
    return f"{called} does not load ({'; '.join(failures)})" if failures else f"there is no {called}"
