"""Objects that came with the package, for where no compiler does. Runs in: anywhere; owns: nothing.

    prebuilt/<target>/<kernel>-<key>-<sum>.hsaco

The key is a hash of the source and the defines, so an object of other sources is never found; the sum is one of the
object itself, so that a damaged one is seen before it is loaded (loading it could crash).
"""

import hashlib
import re
from contextlib import suppress
from pathlib import Path, PurePosixPath

PREBUILT = Path(__file__).parents[1] / "prebuilt"
_SUFFIX = ".hsaco"
# Code for any card of a family, a little slower than a card's own (LLVM, AMDGPUUsage; HIP's hip_fatbin.cpp).
_FAMILIES = (
    (re.compile(r"gfx103[0-6]"), "gfx10-3-generic"),
    (re.compile(r"gfx11[05][0-3]"), "gfx11-generic"),
    (re.compile(r"gfx120[01]"), "gfx12-generic"),
)


def find_prebuilt(folder: Path, target: str, source: str, key: str) -> bytes | None:
    """The object of a kernel for a card, or else for its family; None where there is none."""
    for name in prebuilt_targets(target):
        with suppress(OSError):
            for path in sorted((folder / name).glob(f"{_stem(source, key)}-*{_SUFFIX}")):
                code = path.read_bytes()
                if path.name == prebuilt_name(source, key, code):
                    return code
    return None


def prebuilt_targets(target: str) -> tuple[str, ...]:
    """Whose objects run on it, the best first."""
    return (target, *(family for pattern, family in _FAMILIES if pattern.fullmatch(target)))


def prebuilt_name(source: str, key: str, code: bytes) -> str:
    """What the file is called that holds `code`."""
    return f"{_stem(source, key)}-{hashlib.sha256(code).hexdigest()[:16]}{_SUFFIX}"


def _stem(source: str, key: str) -> str:
    return f"{PurePosixPath(source).stem}-{key[:16]}"
