"""Where the libraries of a vendor are: those this process has loaded, those of Python's wheels, those of the system.

Runs in: anywhere; owns: nothing. No variable such as CUDA_HOME is needed, and no program is run.
"""

import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

# Below each folder of sys.path: NVIDIA's wheels (nvidia/cuda_nvrtc/lib, nvidia/cu13/lib), torch's own copies, AMD's.
_WHEELS = ("nvidia/*/lib", "torch/lib", "_rocm_sdk_core/lib")
_SYSTEM = (
    "/usr/local/cuda/lib64",
    "/usr/local/cuda/targets/x86_64-linux/lib",
    "/usr/lib/wsl/lib",
    "/opt/rocm/lib",
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib64",
    "/usr/lib",
)
_LOADED = Path("/proc/self/maps")


def library_folders(torch_folders: Sequence[Path] = ()) -> list[Path]:
    """Those that are there, in the order in which they are to be looked through: torch's own come first."""
    named = (Path(name) for name in os.environ.get("LD_LIBRARY_PATH", "").split(":"))
    candidates = (*torch_folders, *_wheel_folders(), *named, *map(Path, _SYSTEM))
    # What a relative path means depends on where the program was started.
    return list(dict.fromkeys(folder for folder in candidates if folder.is_absolute() and folder.is_dir()))


def find_libraries(name: re.Pattern[str], folders: Iterable[Path]) -> list[Path]:
    """The files of that name, each once: those this process has loaded, then folder by folder, the newest first.

    A second copy of a library that is loaded already would have a state of its own: a HIP runtime without torch's
    device, for instance.
    """
    found = [path for path in _loaded_files() if name.fullmatch(path.name)]
    for folder in folders:
        with suppress(OSError):
            fitting = [path for path in folder.iterdir() if name.fullmatch(path.name)]
            found += sorted(fitting, key=library_version, reverse=True)
    unique: dict[Path, Path] = {}
    for path in found:
        with suppress(OSError, RuntimeError):  # a link to nowhere, or to itself
            unique.setdefault(path.resolve(strict=True), path)
    return list(unique.values())


def library_version(path: Path) -> tuple[int, ...]:
    """(12, 8) of libnvrtc.so.12.8 and of libnvrtc-0123abcd.so.12.8; () of libnvrtc.so."""
    _, _, suffix = path.name.partition(".so")
    return tuple(int(number) for number in re.findall(r"\d+", suffix))


def _wheel_folders() -> Iterator[Path]:
    for entry in sys.path:
        folder = Path(entry)
        if folder.is_absolute():
            for pattern in _WHEELS:
                with suppress(OSError):
                    yield from sorted(folder.glob(pattern), reverse=True)


def _loaded_files() -> list[Path]:
    try:
        lines = _LOADED.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []
    mapped = (line.split(maxsplit=5) for line in lines)
    return list(dict.fromkeys(Path(fields[5]) for fields in mapped if len(fields) == 6 and fields[5].startswith("/")))
