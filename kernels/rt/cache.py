"""Compiled kernels on disk, so that they are compiled once for a user and not at every start.

Runs in: any thread and process, all at once; owns: the files of its folder. Nobody waits for anybody: two who compile
the same both write it, and a file is there whole or not at all.
"""

import hashlib
import logging
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from edgekv.kernels.private_folder import make_private

log = logging.getLogger(__name__)

_MAGIC = b"edgekv kernel 1\n"
_SUM_BYTES = hashlib.sha256().digest_size
_SUFFIX, _UNFINISHED = ".code", "new-"
_LIMIT_BYTES = 128 << 20  # a kernel has some 50 kB, a model needs a few dozen
_UNFINISHED_SECONDS = 3600.0


def open_cache(limit_bytes: int = _LIMIT_BYTES) -> "CodeCache | None":
    """The user's own; None, and a warning, where there is no folder that is theirs alone."""
    folder = cache_folder()
    if folder is None:
        log.warning("the compiled GPU kernels cannot be kept: there is no home folder")
        return None
    try:
        make_private(folder)
    except OSError as error:
        log.warning("the compiled GPU kernels cannot be kept, and are made anew at every start: %s", error)
        return None
    return CodeCache(folder, limit_bytes)


def cache_folder() -> Path | None:
    """Where the user's own is, or would be; None where the user has no home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        root = Path(base) if base.startswith("/") else Path.home() / ".cache"
    except RuntimeError:
        return None
    return root / "edgekv" / "gpu"


class CodeCache:
    """Code by key (hexadecimal, a hash of all that it was made from), the least recently used going first.

    What goes wrong with the disk costs a compilation, never an error: `get` finds nothing, `put` keeps nothing.
    """

    def __init__(self, folder: Path, limit_bytes: int = _LIMIT_BYTES) -> None:
        """`folder` is there, and nobody else may write to it: what is found there is run."""
        self.folder, self.limit_bytes = folder, limit_bytes
        self._has_warned = False

    def get(self, key: str) -> bytes | None:
        """None where it is not there, or not whole any more."""
        path = self._path(key)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn(error)
            return None
        code = content[len(_MAGIC) + _SUM_BYTES :]
        if not code or content != _framed(code):  # as a power cut, or a disk that was full, leaves it
            log.debug("%s is damaged", path)
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):
            os.utime(path)
        return code

    def put(self, key: str, code: bytes) -> None:
        """Keep it, then remove the least recently used down to the limit."""
        try:
            with tempfile.NamedTemporaryFile(prefix=_UNFINISHED, dir=self.folder, delete=False) as file:
                try:
                    file.write(_framed(code))
                    file.close()
                    os.replace(file.name, self._path(key))
                except BaseException:
                    with suppress(OSError):
                        os.unlink(file.name)
                    raise
        except OSError as error:
            self._warn(error)
            return
        self._prune(keep=self._path(key))

    def _path(self, key: str) -> Path:
        if not key.isalnum():
            raise ValueError(f"{key!r} is no key")
        return self.folder / f"{key}{_SUFFIX}"

    def _prune(self, keep: Path) -> None:
        """Others may do the same at the same time, and remove what was listed here."""
        files = []
        now = time.time()
        with suppress(OSError):
            for entry in os.scandir(self.folder):
                with suppress(OSError):
                    status = entry.stat(follow_symlinks=False)
                    if entry.name.endswith(_SUFFIX):
                        files.append((status.st_mtime_ns, status.st_size, Path(entry.path)))
                    elif entry.name.startswith(_UNFINISHED) and now - status.st_mtime > _UNFINISHED_SECONDS:
                        os.unlink(entry.path)  # of a process that was killed
        excess = sum(size for _, size, _ in files) - self.limit_bytes
        for _, size, path in sorted(files):
            if excess <= 0:
                return
            if path != keep:
                with suppress(OSError):
                    path.unlink()
                excess -= size

    def _warn(self, error: OSError) -> None:
        if not self._has_warned:
            log.warning("compiled GPU kernels cannot be kept in %s: %s", self.folder, error)
        self._has_warned = True


def _framed(code: bytes) -> bytes:
    return _MAGIC + hashlib.sha256(code).digest() + code
