"""From a kernel's name to something that can be launched: from the cache, from the compiler, or prebuilt.

Runs in: `Loader.code` in any thread, several at once, before anything is on the device; `Loader.launcher` in the thread
in which the device is set. Owns: the loaded modules.
"""

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from ctypes import Structure
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from edgekv.kernels.rt.cache import CodeCache, open_cache
from edgekv.kernels.rt.compiler import (
    CALLED,
    CompileFailed,
    Compiler,
    CompilerMissing,
    compiler_options,
    define_options,
)
from edgekv.kernels.rt.driver import Driver, DriverKind, Launcher, Module
from edgekv.kernels.rt.installed import find_compiler, find_driver
from edgekv.kernels.rt.prebuilt import PREBUILT, find_prebuilt
from edgekv.kernels.rt.source import read_source

log = logging.getLogger(__name__)

KERNELS = Path(__file__).parents[1]
_EMBEDDED = ("sm_72", "sm_87", "sm_101", "sm_110")  # boards' own: a card does not run their code


@dataclass(frozen=True)
class KernelSpec:
    """One kernel as it is compiled and launched.

    `source` is its file, from kernels/ on; `entry` its extern "C" name; `args` mirrors the one structure that it takes;
    `shared_bytes` are those of a block beside what the kernel declares. What differs in `defines` is another kernel.
    Launchers are looked up by it at every launch, so its hash is made once.
    """

    source: str
    entry: str
    threads: int
    args: type[Structure]
    defines: Mapping[str, int] = field(default_factory=dict)
    shared_bytes: int = 0
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Nobody can change the defines afterwards."""
        defines = tuple(sorted(self.defines.items()))
        object.__setattr__(self, "defines", MappingProxyType(dict(defines)))
        parts = (self.source, self.entry, self.threads, self.args, defines, self.shared_bytes)
        object.__setattr__(self, "_hash", hash(parts))

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        defines = ", ".join(f"{name}={value}" for name, value in self.defines.items())
        return f"{self.source} ({defines})" if defines else self.source


class KernelUnavailable(Exception):
    """A kernel can neither be compiled here nor was it before: why, and what to do about it."""

    def __init__(self, spec: KernelSpec, reason: str, remedy: str) -> None:
        super().__init__(f"{spec}: {reason}; {remedy}")
        self.spec, self.reason, self.remedy = spec, reason, remedy


def open_loader(
    kind: DriverKind, target: str, torch_folders: Sequence[Path] = (), *, major: int | None = None
) -> "Loader":
    """With what there is on this machine and the user's own cache. Raises DriverMissing, DriverError.

    A compiler that is missing is no error before a kernel needs it. `torch_folders` hold torch's libraries, `major` is
    the major version of the CUDA that it was built with.
    """
    compiler: Compiler | CompilerMissing
    try:
        compiler = find_compiler("nvrtc" if kind == "cuda" else "hiprtc", torch_folders, major=major)
    except CompilerMissing as error:
        compiler = error.with_traceback(None)
    return Loader(target, compiler, find_driver(kind, torch_folders), open_cache())


class Loader:
    """The kernels for one card, `target`: sm_89, gfx1100."""

    def __init__(
        self,
        target: str,
        compiler: Compiler | CompilerMissing,
        driver: Driver,
        cache: CodeCache | None = None,
        *,
        prebuilt: Path = PREBUILT,
        sources: Path = KERNELS,
    ) -> None:
        """Where there is no compiler, `compiler` is what find_compiler raised."""
        self.target, self.driver = target, driver
        self._compiler, self._cache = compiler, cache
        self._prebuilt, self._sources = prebuilt, sources
        self._compile_target = _compile_target(compiler, target)
        self._has_compiled = False
        self._texts: dict[str, str] = {}
        self._modules: dict[str, Module] = {}
        self._launchers: dict[KernelSpec, Launcher] = {}

    def launcher(self, spec: KernelSpec) -> Launcher:
        """Loaded and ready; the same one every time. Before a graph is captured: loading may wait for the device.

        Raises KernelUnavailable, CompileFailed, DriverError.
        """
        launcher = self._launchers.get(spec)
        if launcher is None:
            key = spec_key(spec, self._text(spec))
            if key not in self._modules:  # several kernels of one source are one module
                self._modules[key] = self.driver.load(self.code(spec))
            function = self._modules[key].function(spec.entry)
            launcher = self._launchers[spec] = function.launcher(spec.args, spec.threads, spec.shared_bytes)
        return launcher

    def code(self, spec: KernelSpec) -> bytes:
        """What is loaded: kept from another time, compiled now (a second), or prebuilt.

        Raises KernelUnavailable, CompileFailed.
        """
        compiler, target = self._compiler, self._compile_target
        if isinstance(compiler, CompilerMissing) or target is None:
            return self._code_without_compiler(spec, _why_not(compiler, self.target))
        options = (*compiler_options(compiler.kind, target), *define_options(spec.defines))
        text = self._text(spec)
        key = _hash("code", compiler.identity, options, spec.source, text)
        if self._cache is not None and (kept := self._cache.get(key)) is not None:
            return kept
        if not self._has_compiled:
            log.info("compiling the GPU kernels for %s (once, about a second each)", self.target)
            self._has_compiled = True
        began = time.monotonic()
        try:
            compiled = compiler.compile(text, spec.source, {}, options)
        except CompileFailed as error:
            # What a faulty compiler cannot do may have been done for it.
            if (code := self._find_prebuilt(spec)) is None:
                raise
            log.warning("%s could not compile %s, and what came with edgekv is used", CALLED[compiler.kind], spec)
            log.debug("%s", error)
            return code
        seconds = time.monotonic() - began
        log.debug("compiled %s with %s in %.1f s\n%s", spec, compiler.identity, seconds, compiled.log.strip())
        if self._cache is not None:
            self._cache.put(key, compiled.code)
        return compiled.code

    def close(self) -> None:
        """Unload everything; no launcher, and no graph with one, may be launched again. Raises DriverError."""
        self._launchers.clear()
        while self._modules:
            self._modules.popitem()[1].close()

    def _code_without_compiler(self, spec: KernelSpec, missing: CompilerMissing) -> bytes:
        code = self._find_prebuilt(spec)
        if code is None:
            reason = f"{missing.reason}, and edgekv brings no compiled kernel for {self.target}"
            raise KernelUnavailable(spec, reason, missing.remedy)
        log.debug("%s: what came with edgekv for %s is used", spec, self.target)
        return code

    def _find_prebuilt(self, spec: KernelSpec) -> bytes | None:
        return find_prebuilt(self._prebuilt, self.target, spec.source, spec_key(spec, self._text(spec)))

    def _text(self, spec: KernelSpec) -> str:
        text = self._texts.get(spec.source)
        if text is None:
            text = self._texts[spec.source] = read_source(self._sources, spec.source)
        return text


def spec_key(spec: KernelSpec, text: str) -> str:
    """A hash of what a kernel is, whatever it is compiled with and for; `text` is its whole source."""
    return _hash("kernel", spec.source, sorted(spec.defines.items()), text)


def _hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _compile_target(compiler: Compiler | CompilerMissing, target: str) -> str | None:
    """What to compile for: the card itself, or the nearest older one whose machine code it runs; None without one.

    A cubin runs on cards of its own major version and its own or a higher minor one (CUDA programming guide, binary
    compatibility).
    """
    if isinstance(compiler, CompilerMissing):
        return None
    if compiler.targets is None or target in compiler.targets:
        return target
    major, minor = _capability(target)
    cards = [_capability(each) for each in compiler.targets if each not in _EMBEDDED]
    older = [each for each in cards if each[0] == major and each[1] < minor]
    if not older:
        return None
    _, nearest = max(older)
    return f"sm_{major}{nearest}"


def _capability(target: str) -> tuple[int, int]:
    """(8, 9) of sm_89."""
    number = int(target.removeprefix("sm_"))
    return number // 10, number % 10


def _why_not(compiler: Compiler | CompilerMissing, target: str) -> CompilerMissing:
    if isinstance(compiler, CompilerMissing):
        return compiler
    reason = f"{compiler.identity.rsplit(maxsplit=1)[0]} does not know {target}"
    return CompilerMissing(reason, "install a torch that was built for this card")
