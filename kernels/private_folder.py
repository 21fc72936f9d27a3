"""Folders from which code is loaded, at paths that anybody can know: only where nobody else decides what is there.

Runs in: anywhere; owns: nothing. Only the standard library is imported here.
"""

import os
import stat
from contextlib import suppress
from pathlib import Path


def make_private(folder: Path) -> None:
    """Make it, for this user alone. Raises OSError, and has made nothing, where others could put something there."""
    above = next(each for each in (folder, *folder.parents) if each.exists())
    if above != folder:
        _check_above(above)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check(folder)


def is_private(folder: Path) -> bool:
    """Whether it is there, and only this user and the system's own decide what lies in it."""
    try:
        _check(folder)
    except OSError:
        return False
    return True


def _check(folder: Path) -> None:
    status = folder.stat()
    if _is_writable(status):  # sticky or not: to add a file is enough
        raise OSError(f"others may write to {folder}")
    _check_above(folder)


def _check_above(folder: Path) -> None:
    real = folder.resolve(strict=True)
    for each in (real, *real.parents):
        status = each.stat()
        if status.st_uid not in _trusted_users():
            raise OSError(f"{each} belongs to another user")
        # In a sticky folder others can add files, and neither remove nor rename what is not theirs.
        if _is_writable(status) and not status.st_mode & stat.S_ISVTX:
            raise OSError(f"others may write to {each}")


def _trusted_users() -> set[int]:
    """The system's, this one, and whose the home is: Python loads code from there anyway (the user's site-packages)."""
    users = {0, os.geteuid()}
    with suppress(OSError, RuntimeError):
        users.add(Path.home().stat().st_uid)
    return users


def _is_writable(status: os.stat_result) -> bool:
    """By others. Many systems give each user a group of their own, and it the right to write."""
    return bool(status.st_mode & 0o002 or (status.st_mode & 0o020 and status.st_gid not in _own_groups()))


def _own_groups() -> set[int]:
    groups = {0, os.getegid()}
    with suppress(ImportError, KeyError):
        import pwd

        groups.add(pwd.getpwuid(os.geteuid()).pw_gid)
    return groups
