"""The compilers of the GPU kernels for cards that are not there: NVRTC, and the clang inside ziglang, both from pip.

What they found is kept in build/, by everything that it depends on, so that only what has changed is compiled again.
"""

import hashlib
import json
import os
import re
import shlex
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from kernel_resources import Resources, assembly_resources, cubin_resources

from edgekv.kernels.rt.compiler import CompileFailed, CompilerKind, CompilerMissing, compiler_options, define_options
from edgekv.kernels.rt.registry import KERNELS, KernelSpec
from edgekv.kernels.rt.rtc import RuntimeCompiler, line_that_matters
from edgekv.kernels.rt.source import read_source

RESULTS = Path(__file__).resolve().parents[1] / "build" / "kernel-matrix"
_CUDA = 13  # of the NVRTC that is wanted where there are several: an older one does not know the newest cards
_BARE = ("-x", "hip", "--cuda-device-only", "-nogpuinc", "-nogpulib")
# An array with computed indices, which clang would move to LDS that nobody has declared, stays a thread's own memory:
# both are wrong, and this is seen. Without such an array the option changes nothing.
_NO_PROMOTION = ("-mllvm", "-disable-promote-alloca-to-lds")


class NotCompiled(Exception):
    """The compiler's own words."""

    @property
    def summary(self) -> str:
        """The line that matters."""
        return line_that_matters(str(self)) or "the compiler said nothing"


@dataclass(frozen=True)
class Unit:
    """What is compiled at once: all kernels of a source, for one card and with the same defines."""

    target: str
    source: str
    defines: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, target: str, spec: KernelSpec) -> "Unit":
        return cls(target, spec.source, tuple(spec.defines.items()))


class Nvrtc:
    """Cubins, made in this process, in which it makes only one at a time."""

    def __init__(self) -> None:
        """Raises CompilerMissing."""
        self._compiler = RuntimeCompiler("nvrtc", _nvrtc_of_pip())
        self.identity = self._compiler.identity

    def options(self, unit: Unit) -> tuple[str, ...]:
        # What NVRTC has from its own cache, it does not speak of.
        return (*_options("nvrtc", unit), "--ptxas-options=--verbose", "--no-cache")

    def resources(self, text: str, unit: Unit) -> dict[str, Resources]:
        """By the kernel's name. Raises NotCompiled."""
        try:
            compiled = self._compiler.compile(text, unit.source, {}, self.options(unit))
        except CompileFailed as error:
            raise NotCompiled(str(error)) from None
        return cubin_resources(compiled.code, compiled.log)


def _nvrtc_of_pip() -> Path:
    """Not what `find_compiler` finds, which would rather have one that this process has loaded already, as tests do.

    Raises CompilerMissing.
    """
    package = find_spec("nvidia")
    folders = [] if package is None else list(package.submodule_search_locations or ())
    name = re.compile(rf"libnvrtc\.so\.{_CUDA}(\.\d+)*")
    found = (path for folder in folders for path in Path(folder).glob("*/lib/libnvrtc.so*"))
    paths = [path for path in found if name.fullmatch(path.name)]
    if not paths:
        raise CompilerMissing(f"there is no NVRTC {_CUDA} of pip", "pip install nvidia-cuda-nvrtc")
    return max(paths)


class ClangForAmd:
    """Assembly."""

    def __init__(self) -> None:
        """Raises CompilerMissing."""
        package = find_spec("ziglang")
        if package is None or not package.submodule_search_locations:
            raise CompilerMissing("there is no clang of ziglang", "pip install ziglang")
        self._command = (str(Path(package.submodule_search_locations[0], "zig")), "clang")
        done = subprocess.run([*self._command, "--version"], capture_output=True, text=True, check=True)
        self.identity = done.stdout.splitlines()[0]

    def options(self, unit: Unit) -> tuple[str, ...]:
        return (*_BARE, *_options("hiprtc", unit), *_NO_PROMOTION)

    def resources(self, text: str, unit: Unit) -> dict[str, Resources]:
        """By the kernel's name. Raises NotCompiled."""
        return assembly_resources(self.assembly(text, unit))

    def assembly(self, text: str, unit: Unit) -> str:
        """Of all kernels in it. Raises NotCompiled."""
        with tempfile.TemporaryDirectory(prefix="kernel-") as name:
            source = Path(name, "kernel.hip")
            source.write_text(text, encoding="utf-8")
            command = [*self._command, *self.options(unit), "-S", str(source), "-o", "-"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise NotCompiled(f"{done.stderr[:4000]}\n{shlex.join(command)}")
        return done.stdout


def compiler(target: str) -> Nvrtc | ClangForAmd:
    """That for a card. Raises CompilerMissing."""
    return _nvrtc() if target.startswith("sm_") else _clang()


def compiled(unit: Unit) -> dict[str, Resources] | NotCompiled:
    """What each kernel of it takes, by its name. Raises CompilerMissing."""
    made_by, text = compiler(unit.target), source_text(unit.source)
    reader = Path(__file__).with_name("kernel_resources.py").read_text(encoding="utf-8")
    parts = (text, reader, made_by.identity, *made_by.options(unit))
    path = RESULTS / f"{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]}.json"
    if path.exists():
        return _read(path)
    try:
        found = made_by.resources(text, unit)
    except NotCompiled as error:
        return error
    _write(path, found)
    return found


@cache
def source_text(source: str) -> str:
    """With all that it includes; a test's source is not among the kernels, and includes one file that is."""
    path = KERNELS / source
    if path.is_relative_to(KERNELS):
        return read_source(KERNELS, source)
    lines = path.read_text(encoding="utf-8").splitlines()
    name = next(line.split('"')[1] for line in lines if line.startswith("#include"))
    own = [line for line in lines if not line.startswith(("#include", "#pragma once"))]
    return read_source(KERNELS, name) + "\n".join(own) + "\n"


@cache
def _nvrtc() -> Nvrtc:
    return Nvrtc()


@cache
def _clang() -> ClangForAmd:
    return ClangForAmd()


def _options(kind: CompilerKind, unit: Unit) -> tuple[str, ...]:
    return (*compiler_options(kind, unit.target), *define_options(dict(unit.defines)))


def _read(path: Path) -> dict[str, Resources]:
    kept = json.loads(path.read_text(encoding="utf-8"))
    return {name: Resources(**{**each, "forbidden": tuple(each["forbidden"])}) for name, each in kept.items()}


def _write(path: Path, found: Mapping[str, Resources]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps({name: asdict(each) for name, each in found.items()}), encoding="utf-8")
    unfinished.replace(path)
