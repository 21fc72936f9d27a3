"""The simulated driver libraries, built from `csrc/` with the machine's C compiler, once for all tests.

A build is a folder laid out like ROCm's (`lib/` inside) under build/sim, named by the hash of everything that it is
made from. Two processes may ask at once: each builds in a folder of its own, and the first to rename it wins.
"""

import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Literal

CardVendor = Literal["nvidia", "amd"]
LibraryBuild = Literal["good", "skew", "none"]

_SOURCES = Path(__file__).parent / "csrc"
_BUILDS = Path(__file__).parents[2] / "build" / "sim"
_FLAGS = ("-std=c11", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror")
_NAMES = {"nvidia": "libnvidia-ml.so.1", "amd": "libamd_smi.so"}
_NOT_SUPPORTED = 2  # AMDSMI_STATUS_NOT_SUPPORTED
# What the library of an older driver (NVIDIA's: before 510) lacks although its Python binding asks for it.
_LACKING = {
    "nvidia": (
        "nvmlDeviceGetMemoryInfo_v2",
        "nvmlDeviceGetComputeRunningProcesses_v3",
        "nvmlDeviceGetGraphicsRunningProcesses_v3",
    ),
    "amd": ("amdsmi_get_gpu_vram_usage",),
}


@cache
def built_libraries(vendor: CardVendor, build: LibraryBuild) -> Path:
    """The folder whose `lib/` holds that vendor's library; made where it is not there yet.

    "none" holds a file of the library's name that is no library: it hides a real driver of this machine, too.
    """
    source = (_SOURCES / ("nvml.c" if vendor == "nvidia" else "amdsmi.c")).read_text(encoding="utf-8")
    stubs = _stubs(source) if vendor == "amd" else ""
    script = _version_script(vendor, build)
    parts = [(_SOURCES / name).read_text(encoding="utf-8") for name in ("card.h", "card.c")]
    parts += [source, stubs, script, build, *_compiler(), *_FLAGS]
    folder = _BUILDS / f"{vendor}-{build}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}"
    if folder.exists():
        return folder
    _BUILDS.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="new-", dir=_BUILDS))
    try:
        (scratch / "lib").mkdir()
        library = scratch / "lib" / _NAMES[vendor]
        if build == "none":
            library.write_text("no driver here\n")
        else:
            _compile(scratch, library, source, stubs, script)
        os.rename(scratch, folder)
    except OSError:
        if not folder.exists():  # else another process was quicker
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _compile(scratch: Path, library: Path, source: str, stubs: str, script: str) -> None:
    for name, text in (("library.c", source), ("stubs.c", stubs), ("exports.map", script)):
        (scratch / name).write_text(text, encoding="utf-8")
    inputs = [str(scratch / "library.c"), str(scratch / "stubs.c"), str(_SOURCES / "card.c"), f"-I{_SOURCES}"]
    link = [f"-Wl,--version-script={scratch / 'exports.map'}", f"-Wl,-soname,{library.name}", "-o", str(library)]
    try:
        done = subprocess.run([*_compiler(), *_FLAGS, *inputs, *link], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise RuntimeError(
            f"the simulated drivers are written in C and there is no C compiler ({_compiler()[0]}); on Debian and "
            "Ubuntu: apt install gcc libc6-dev; or set CC"
        ) from None
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(done.args)} failed:\n{done.stderr}")


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CC", "")) or ["cc"]


def _version_script(vendor: CardVendor, build: LibraryBuild) -> str:
    """What the library exports; a name said outright goes before a pattern."""
    exports = "nvml*;" if vendor == "nvidia" else "amdsmi_*; sim_layout;"
    lacking = "".join(f"{name}; " for name in _LACKING[vendor]) if build == "skew" else ""
    return f"{{ global: {exports} local: {lacking}*; }};\n"


def _stubs(source: str) -> str:
    """A function for each name that the installed binding binds and `source` does not define: it is not supported."""
    spec = importlib.util.find_spec("amdsmi")
    if spec is None or spec.origin is None:
        raise RuntimeError("the simulated AMD driver is made for the installed amdsmi, and there is none")
    wrapper = (Path(spec.origin).parent / "amdsmi_wrapper.py").read_text(encoding="utf-8")
    bound = set(re.findall(r"_libraries\['libamd_smi\.so'\]\.(\w+)", wrapper))
    defined = set(re.findall(r"^status_t (amdsmi_\w+)\(", source, re.MULTILINE))
    return "".join(f"unsigned {name}(void)\n{{\n    return {_NOT_SUPPORTED};\n}}\n" for name in sorted(bound - defined))
