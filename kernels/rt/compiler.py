"""What a compiler of kernels is: C++ in, a cubin or a code object out. Runs in: anywhere; owns: nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

CompilerKind = Literal["nvrtc", "hiprtc"]

CALLED: dict[CompilerKind, str] = {"nvrtc": "NVRTC", "hiprtc": "HIPRTC"}


@dataclass(frozen=True, slots=True)
class Compiled:
    """What a compiler made, and what it said about it."""

    code: bytes
    log: str


class CompilerMissing(Exception):
    """There is no compiler for this: why, and what to do about it."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}; {remedy}")
        self.reason, self.remedy = reason, remedy


class CompileFailed(Exception):
    """The compiler did; `log` is all that it said, `summary` the line that matters."""

    def __init__(self, name: str, summary: str, log: str) -> None:
        super().__init__("\n".join(filter(None, (f"{name}: {summary}", log.strip()))))
        self.name, self.summary, self.log = name, summary, log


class Compiler(Protocol):
    """What kernels are compiled with."""

    @property
    def kind(self) -> CompilerKind:
        """Whose options it takes."""

    @property
    def identity(self) -> str:
        """Names this very build of the compiler: another one makes other code."""

    @property
    def targets(self) -> tuple[str, ...] | None:
        """As sm_89: what it can compile for; None where it does not say."""

    def compile(self, source: str, name: str, headers: Mapping[str, str], options: Sequence[str]) -> Compiled:
        """Raises CompileFailed. `headers` are texts by what the source includes them as; errors speak of `name`."""


def compiler_options(kind: CompilerKind, target: str) -> tuple[str, ...]:
    """What the project's kernels are compiled with, for sm_89 or gfx1100."""
    if kind == "nvrtc":
        return (f"--gpu-architecture={target}", "-std=c++17")
    return (f"--offload-arch={target}", "-std=c++17", "-O3")


def define_options(defines: Mapping[str, int]) -> tuple[str, ...]:
    """One for each, by name."""
    return tuple(f"-D{name}={value}" for name, value in sorted(defines.items()))
