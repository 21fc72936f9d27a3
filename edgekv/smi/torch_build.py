"""Which accelerators the installed torch was built for, without importing it. Runs in: anywhere; owns: nothing."""

import importlib.util
import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

_TARGET = rb"(?:sm_\d+[af]?|compute_\d+[af]?|gfx[0-9a-f]+(?:(?:-\d+)?-generic)?(?::[a-z0-9+:-]+)?)"
_TARGETS = re.compile(rb"%b(?: %b)*(?=\x00)" % (_TARGET, _TARGET))


@dataclass(frozen=True, slots=True)
class TorchBuild:
    """torch's version, and the CUDA or ROCm version it was built with.

    `targets`: what it has code for, as torch.cuda.get_arch_list() says it; empty where that is not known. `libraries`:
    the folder of its libraries.
    """

    version: str
    cuda: str | None
    hip: str | None
    targets: tuple[str, ...] = ()
    libraries: Path | None = None


def read_torch_build() -> TorchBuild | None:
    """The installed torch's build, read from its files: importing it takes seconds. None without torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    try:
        text = (folder / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None

    def field(name: str) -> str | None:
        match = re.search(rf"^{name}\b[^=\n]*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
        return match[1] if match else None

    cuda, hip = field("cuda"), field("hip")
    targets = built_for(folder / "lib" / "libtorch_python.so") if cuda or hip else ()
    return TorchBuild(field("__version__") or "unknown", cuda, hip, targets, folder / "lib")


@lru_cache(maxsize=2)
def built_for(library: Path) -> tuple[str, ...]:
    """What a build has code for; empty where its library does not tell.

    The answer of get_arch_list() is one string of that library (torch/csrc/cuda/Module.cpp, CUDA_ARCH_FLAGS): "sm_75
    sm_80 compute_80", "gfx1030 gfx1100".
    """
    try:
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            found = set(_lists(content))
    except (OSError, ValueError):  # ValueError: it is empty
        return ()
    longest = max(found, key=len, default=b"")
    if b" " not in longest and len(found) > 1:  # single names may be there for any reason
        return ()
    return tuple(longest.decode("ascii").split())


def _lists(content: mmap.mmap) -> Iterator[bytes]:
    """Strings that are nothing but targets."""
    for beginning in (b"sm_", b"compute_", b"gfx"):
        at = content.find(beginning)
        while at >= 0:
            # Of a string, only its beginning: what is before it is no letter, as a rule the end of another string.
            if at == 0 or not 32 <= content[at - 1] < 127:
                match = _TARGETS.match(content, at)
                if match is not None:
                    yield match[0]
            at = content.find(beginning, at + 1)
