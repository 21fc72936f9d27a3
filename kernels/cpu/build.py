"""Compiles src/ to one shared library. Runs in: anywhere, also in setup.py before anything is installed; owns: nothing.

Only the standard library is imported here. A library has a small file beside it that says from which sources it was
made and what it must look like, so that a torn or stale file is seen before it is loaded (loading it could crash).
"""

import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

SOURCES = Path(__file__).parent / "src"

_FLAGS = (
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",  # a product is rounded before it is added except where the code says fma: the same bits always
    "-pthread",
)
# What each tier's file is compiled with, by machine; tiers that are not named are left out or need nothing.
_X86 = {
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mavx512bf16 -mavx2 -mfma -mf16c".split(),
    "avx2": "-mavx2 -mfma -mf16c".split(),
}
_ARM = {"neon": ["-march=armv8.2-a+dotprod+fp16"]}
_TIER_FLAGS = {"x86_64": _X86, "amd64": _X86, "aarch64": _ARM, "arm64": _ARM}
# gcc 12 and 13 think that their own AVX-512 headers read what is not set (gcc bug 105593).
_QUIET = ("-Wno-uninitialized", "-Wno-maybe-uninitialized", "-Wno-psabi")

_POLL_SECONDS = 0.02
_ALL_UNITS_SECONDS, _LONGEST_UNIT_SECONDS = 36.0, 18.0


class BuildFailed(Exception):
    """The compiler did; the text is what it was asked for and what it said, `summary` the line that matters."""

    def __init__(self, command: Sequence[str], said: str) -> None:
        super().__init__(f"{shlex.join(command)}\n{said}")
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        self.summary = next((line for line in lines if "error" in line), lines[0] if lines else "it said nothing")


def library_name() -> str:
    """What the library of this system and machine is called."""
    return f"ek_cpu-{sys.platform}-{platform.machine().lower()}.so"


@cache
def source_hash() -> str:
    """Names and bytes of all sources and what they are compiled with, as they were when this was first asked."""
    return _hash_now()


def _hash_now() -> str:
    sums = hashlib.sha256(repr((_FLAGS, sorted(_TIER_FLAGS.get(platform.machine().lower(), {}).items()))).encode())
    for file in sorted(SOURCES.iterdir()):
        if file.suffix in (".h", ".cpp"):
            sums.update(f"{file.name}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return sums.hexdigest()[:16]


def find_compiler() -> list[str] | None:
    """The C++ compiler's command: $CXX, else the first of c++, g++ and clang++; None where there is none."""
    if asked := shlex.split(os.environ.get("CXX", "")):
        return asked if shutil.which(asked[0]) else None
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    return None


def build_seconds() -> float:
    """About what a build takes here, measured on processors of 2024."""
    return max(_LONGEST_UNIT_SECONDS, _ALL_UNITS_SECONDS / len(_usable_processors()))


def check_file(path: str | Path) -> str | None:
    """What is wrong with a library on disk; None if it is the one that these sources make."""
    try:
        told = Path(f"{path}.sum").read_text(encoding="ascii").split()
        found = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except (OSError, ValueError) as error:
        return f"{path}: {error}"
    if len(told) != 2 or told[1] != found:
        return f"{path} is damaged"
    return None if told[0] == source_hash() else f"{path} was made from other sources"


def build(
    target: Path,
    compiler: Sequence[str],
    *,
    flags: Sequence[str] = (),
    jobs: int | None = None,
    progress: Callable[[], None] = lambda: None,
) -> None:
    """Compile `target` and the file beside it; neither is seen before it is whole. Raises BuildFailed, OSError.

    `flags` go to the compiler and to the linker after all others. `jobs` compilers run at once, one per processor if
    not said. `progress` is called many times a second; what it raises ends the compilers and is raised.
    """
    # A compiler that has just been killed may still put a file there.
    with tempfile.TemporaryDirectory(prefix="build-", dir=target.parent, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        # What takes longest first: of the tiers, the one that has no vectors to put sixteen lanes into.
        units = sorted(SOURCES.glob("*.cpp"), key=lambda unit: (unit.stem != "tier_plain", "tier_" not in unit.stem))
        commands = [_compile_command(compiler, unit, folder, flags, progress) for unit in units]
        _run_all(commands, folder, jobs or len(_usable_processors()), progress)
        library, summary = folder / "library", folder / "library.sum"
        objects = [str(folder / f"{unit.stem}.o") for unit in units]
        # Nothing of the C++ library is used, and as-needed keeps it from being asked for.
        link = [*compiler, "-shared", "-pthread", *_linker_flags(), *flags, "-o", str(library), *objects]
        _run_all([link], folder, 1, progress)
        if _hash_now() != source_hash():
            raise BuildFailed(link, "error: the sources changed while they were compiled")
        summary.write_text(f"{source_hash()} {hashlib.sha256(library.read_bytes()).hexdigest()}\n", encoding="ascii")
        library.chmod(0o755)
        Path(f"{target}.sum").unlink(missing_ok=True)
        library.replace(target)
        summary.replace(f"{target}.sum")


def _linker_flags() -> tuple[str, ...]:
    return () if sys.platform == "darwin" else ("-Wl,--as-needed", "-Wl,-z,defs", "-Wl,-z,noexecstack", "-s")


def _compile_command(
    compiler: Sequence[str], unit: Path, folder: Path, flags: Sequence[str], progress: Callable[[], None]
) -> list[str]:
    tier = unit.stem.removeprefix("tier_") if unit.stem.startswith("tier_") else None
    special = _TIER_FLAGS.get(platform.machine().lower(), {}).get(tier, []) if tier else []
    if special and not _understands(compiler, special, folder, progress):
        special = []
    command = [*compiler, *_FLAGS, *_QUIET, "-O3" if special else "-O2", *special, *flags]
    return [*command, f'-DEK_SOURCE_HASH="{source_hash()}"', "-c", str(unit), "-o", str(folder / f"{unit.stem}.o")]


def _understands(compiler: Sequence[str], flags: Sequence[str], folder: Path, progress: Callable[[], None]) -> bool:
    """Whether a compiler knows a tier's instruction set; the tier is left out where it does not."""
    try:
        _run_all([[*compiler, *flags, "-x", "c++", "-fsyntax-only", os.devnull]], folder, 1, progress)
    except BuildFailed:
        return False
    return True


def _usable_processors() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _run_all(commands: Sequence[list[str]], folder: Path, jobs: int, progress: Callable[[], None]) -> None:
    """Run commands, `jobs` at a time, in order. Raises BuildFailed with what the first to fail had to say.

    None is left running, and nothing of theirs outside the folder, whatever `progress` raises.
    """
    waiting = list(commands)[::-1]
    running: list[tuple[subprocess.Popen[bytes], list[str], Path]] = []
    variables = os.environ | {"TMPDIR": str(folder)}  # killed, a compiler does not clear away its temporary files
    try:
        while waiting or running:
            progress()
            while waiting and len(running) < jobs:
                command = waiting.pop()
                said = folder / f"said-{len(waiting)}"
                with said.open("wb") as output:
                    started = subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=output,
                        env=variables,
                        # Ctrl-C in a terminal is ours to heed, and with a compiler those that it started must end.
                        start_new_session=True,
                    )
                running.append((started, command, said))
            for job in [job for job in running if job[0].poll() is not None]:
                running.remove(job)
                if job[0].returncode:
                    raise BuildFailed(job[1], job[2].read_text(encoding="utf-8", errors="replace"))
            time.sleep(_POLL_SECONDS)
    finally:
        for process, _, _ in running:
            with suppress(OSError):  # it has just ended
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
