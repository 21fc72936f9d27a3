"""Driver and compiler libraries without a card, built from `csrc/` with the machine's C compiler, once for all tests.

What they are told to do, and how, stands at the top of csrc/fake.h and csrc/fake_rtc.c.
"""

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import pytest

Library = Literal["cuda", "hip", "nvrtc", "hiprtc", "builtins"]

_SOURCES = Path(__file__).parent / "csrc"
_BUILDS = Path(__file__).parents[3] / "build" / "rt"
_FLAGS = ("-std=gnu11", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror")
# File, its name as the vendors' wheels and drivers have it, flags.
_LIBRARIES: dict[Library, tuple[str, str, tuple[str, ...]]] = {
    "cuda": ("fake_driver.c", "libcuda.so.1", ()),
    "hip": ("fake_driver.c", "libamdhip64.so.7", ("-DFAKE_HIP",)),
    "nvrtc": ("fake_rtc.c", "libnvrtc.so.12", ()),
    "hiprtc": ("fake_rtc.c", "libhiprtc.so.7", ("-DFAKE_HIP",)),
    "builtins": ("fake_rtc.c", "libnvrtc-builtins.so.12.8", ("-DFAKE_BUILTINS", "-Wno-unused-function")),
}

SOURCE = """
#include "common/types.h"
// entry ek_scale 24
// entry ek_shift 24
"""


class Args(ctypes.Structure):
    """What the kernels of SOURCE take."""

    _fields_ = (("to", ctypes.c_uint64), ("rows", ctypes.c_int64), ("by", ctypes.c_float), ("flags", ctypes.c_int32))


@dataclass(frozen=True)
class Calls:
    """What the libraries were asked, call by call."""

    path: Path

    def read(self) -> list[str]:
        return self.path.read_text().splitlines() if self.path.exists() else []

    def forget(self) -> None:
        self.path.unlink(missing_ok=True)


@cache
def fake(library: Library, *, old: bool = False) -> Path:
    """The file; made where it is not there yet."""
    source, name, special = _LIBRARIES[library]
    flags = (*_FLAGS, *special, f"-Wl,-soname,{name}", *(["-DFAKE_OLD"] if old else []))
    command = shlex.split(os.environ.get("CC", "")) or ["cc"]
    if shutil.which(command[0]) is None:
        pytest.skip("needs a C compiler")
    parts = [(_SOURCES / each).read_text() for each in ("fake.h", source)]
    number = hashlib.sha256("\0".join((*parts, *command, *flags)).encode()).hexdigest()[:16]
    path = _BUILDS / f"{library}-{number}" / name
    if path.exists():
        return path
    _BUILDS.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="new-", dir=_BUILDS))
    try:
        done = subprocess.run(
            [*command, *flags, "-o", str(scratch / name), str(_SOURCES / source), "-ldl"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        scratch.rename(path.parent)
    except OSError:
        if not path.exists():  # else another process was quicker
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return path


def install(library: Library, folder: Path, name: str | None = None) -> Path:
    """A copy in a folder, as if it had been installed there."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (name or fake(library).name)
    shutil.copy(fake(library), path)
    return path


def write_kernels(root: Path, text: str = SOURCE) -> Path:
    """A folder of sources with one kernel in it, attn/scale.h."""
    for name, content in (("attn/scale.h", text), ("common/types.h", "#pragma once\ntypedef int i32;\n")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root
