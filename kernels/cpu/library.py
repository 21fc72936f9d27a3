"""The compiled kernels: found in the package, found in the user's cache, or compiled into it once.

Runs in: any thread, once a process; owns: the loaded library, which is never unloaded.

EDGEKV_CPU_KERNELS says where from: "auto" (or nothing), "off", or the path of a library.
"""

import ctypes
import fcntl
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from ctypes import c_char_p, c_double, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import IO

from edgekv.kernels.cpu.abi import ABI_VERSION
from edgekv.kernels.cpu.build import (
    BuildFailed,
    build,
    build_seconds,
    check_file,
    find_compiler,
    library_name,
    source_hash,
)
from edgekv.kernels.private_folder import is_private, make_private

log = logging.getLogger(__name__)

VARIABLE = "EDGEKV_CPU_KERNELS"
_PREBUILT = Path(__file__).parent / "prebuilt"
_GET_COMPILER = "install a C++ compiler (on Debian and Ubuntu: apt install g++), or set CXX"
_ELSEWHERE = "set TMPDIR or XDG_CACHE_HOME to where code may be run from, or CXX to another C++ compiler"
_OTHER_COMPILER = "set CXX to another C++ compiler: g++ 11 and clang++ 14 or later will do"

_POLL_SECONDS = 0.05

_POINTER = c_void_p
# What each exported function answers and takes.
_FUNCTIONS = {
    "ek_abi_version": (c_int32, ()),
    "ek_source_hash": (c_char_p, ()),
    "ek_tiers": (c_int32, (c_char_p, c_int32)),
    "ek_pool_new": (c_void_p, (c_char_p, c_int32, _POINTER)),
    "ek_pool_free": (None, (c_void_p,)),
    "ek_pool_tier_name": (c_char_p, (c_void_p,)),
    "ek_pool_threads": (c_int32, (c_void_p,)),
    "ek_run": (c_int32, (c_void_p, _POINTER, _POINTER)),
    "ek_linear_run": (c_int32, (c_void_p, _POINTER)),
    "ek_attend_run": (c_int32, (c_void_p, _POINTER, c_int32, c_int32)),
    "ek_rows_run": (c_int32, (c_void_p, _POINTER, _POINTER, _POINTER)),
    "ek_attend_shared_bytes": (c_int64, (_POINTER, c_int32)),
    "ek_pack": (c_int32, (c_void_p, c_int32, c_int32, _POINTER, c_int64, c_int64, _POINTER, _POINTER)),
    "ek_matrix_rows": (c_int32, (c_void_p, _POINTER, _POINTER, c_int64, _POINTER, c_int64)),
    "ek_read": (c_double, (c_void_p, _POINTER, c_int64)),
}


class KernelsUnavailable(Exception):
    """There is no library: why, and what to do about it."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}; {remedy}" if remedy else reason)
        self.reason, self.remedy = reason, remedy


class Library:
    """The loaded library. `functions` has those of dispatch.cpp; `tiers` are its tiers that work here, best first."""

    def __init__(self, path: Path) -> None:
        """Raises OSError where the file is no library of ours."""
        self.path = path
        self.functions = ctypes.CDLL(str(path))
        try:
            for name, (answer, arguments) in _FUNCTIONS.items():
                function = getattr(self.functions, name, None)
                if function is not None:
                    function.restype, function.argtypes = answer, arguments
            version = self.functions.ek_abi_version()
        except AttributeError as error:
            raise OSError(f"{path} is not the CPU kernels: {error}") from None
        if version != ABI_VERSION:
            raise OSError(f"{path} has version {version} of the interface, not {ABI_VERSION}")
        names = ctypes.create_string_buffer(256)
        self.functions.ek_tiers(names, len(names))
        self.tiers: tuple[str, ...] = tuple(names.value.decode().splitlines())


def load_library(progress: Callable[[], None] = lambda: None) -> Library:
    """The library, compiled if need be (once; takes a while and says so in the log). Raises KernelsUnavailable.

    `progress` is called many times a second while it is compiled, here or by another process. What it raises ends that
    and is raised; nothing is left behind, and the next call begins anew.
    """
    found = _load(_wanted(), progress)
    if isinstance(found, KernelsUnavailable):
        raise KernelsUnavailable(found.reason, found.remedy)
    return found


def available(*, compile: bool = False) -> bool:
    """Whether `load_library` would answer a library, as far as that is known without loading or compiling it.

    With `compile`, it is loaded, and compiled where it must be, to know for certain.
    """
    if compile:
        return isinstance(_load(_wanted()), Library)
    return is_ready() or (_wanted() == "auto" and find_compiler() is not None)


def is_ready() -> bool:
    """Whether there is a library that need not be compiled any more."""
    match _wanted():
        case "off":
            return False
        case "auto":
            return any(check_file(path) is None for path in _ready_places())
        case path:
            return Path(path).is_file()


def _wanted() -> str:
    return os.environ.get(VARIABLE, "").strip() or "auto"


def _load(wanted: str, progress: Callable[[], None] = lambda: None) -> Library | KernelsUnavailable:
    found = _found()
    if wanted not in found:
        try:
            found[wanted] = _find(wanted, progress)
        except KernelsUnavailable as error:
            # Not the one that was raised: its traceback would keep the caller's progress, and what that belongs to.
            found[wanted] = KernelsUnavailable(error.reason, error.remedy)
    return found[wanted]


@cache
def _found() -> dict[str, Library | KernelsUnavailable]:
    """What there was to find in this process, by what was wanted."""
    return {}


def _find(wanted: str, progress: Callable[[], None]) -> Library:
    if wanted == "off":
        raise KernelsUnavailable(f"they are switched off by {VARIABLE}=off", f"unset {VARIABLE}")
    if wanted != "auto":
        try:
            return Library(Path(wanted))
        except OSError as error:
            raise KernelsUnavailable(f"{VARIABLE}: {error}", f"unset {VARIABLE}, or correct the path") from None
    for path in _ready_places():
        if (library := _open(path)) is not None:
            return library
    compiler = find_compiler()
    if compiler is None:
        raise KernelsUnavailable("there is no library for this machine, and no C++ compiler", _GET_COMPILER)
    folder = _cache_folder()
    if folder is not None:
        try:
            make_private(folder)
            return _compile_into(folder, compiler, progress)
        except OSError as error:
            log.warning("the compiled CPU kernels cannot be kept, and are made anew at every start: %s", error)
    try:
        with tempfile.TemporaryDirectory(prefix="edgekv-cpu-") as name:  # once it is loaded, nobody needs the file
            return _compile_into(Path(name), compiler, progress)
    except OSError as error:
        raise KernelsUnavailable(f"they could not be compiled: {error}", "make room for temporary files") from None


def _compile_into(folder: Path, compiler: list[str], progress: Callable[[], None]) -> Library:
    """Raises KernelsUnavailable, and OSError where the folder cannot be written to."""
    path = folder / library_name()
    with _locked(folder / "lock", progress):
        if (library := _open(path)) is not None:  # another process was quicker
            return library
        log.info("compiling the CPU kernels (once, about %d s)", build_seconds())
        began = time.monotonic()
        try:
            build(path, compiler, progress=progress)
        except BuildFailed as error:
            log.debug("%s", error)
            reason = f"{compiler[0]} could not compile them: {error.summary}"
            raise KernelsUnavailable(reason, _OTHER_COMPILER) from None
        log.info("compiled the CPU kernels in %.0f s: %s", time.monotonic() - began, path)
        library = _open(path)
    if library is None:
        raise KernelsUnavailable(f"what {compiler[0]} made of them does not load", _ELSEWHERE)
    return library


def _open(path: Path) -> Library | None:
    """The library at `path` if it is whole and made from these sources; of one that does not load there a copy."""
    if not path.exists() or check_file(path) is not None:
        return None
    try:
        return Library(path)
    except OSError as error:
        failure = error
    # Many a home is on a file system from which no code may be run.
    with suppress(OSError), tempfile.TemporaryDirectory(prefix="edgekv-cpu-") as name:
        return Library(Path(shutil.copy(path, name)))
    log.warning("cannot use the CPU kernels: %s", failure)
    return None


def _ready_places() -> list[Path]:
    folder = _cache_folder()
    places = [_PREBUILT / library_name()]
    return places if folder is None or not is_private(folder) else [*places, folder / library_name()]


def _cache_folder() -> Path | None:
    """Where libraries compiled from these sources are kept; None where the user has no home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        root = Path(base) if base.startswith("/") else Path.home() / ".cache"
    except RuntimeError:
        return None
    return root / "edgekv" / "cpu" / source_hash()


@contextmanager
def _locked(path: Path, progress: Callable[[], None]) -> Iterator[None]:
    """One process at a time; the lock goes with the process that holds it. `progress` is called during the wait."""
    # Whatever lies there already is not followed elsewhere, and not emptied.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "rb+") as file:
        while not _try_lock(file):
            progress()
            time.sleep(_POLL_SECONDS)
        yield


def _try_lock(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
