"""Compiled kernels on disk: found again, never wrong, never in anybody's way."""

import errno
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

import pytest

from edgekv.kernels.rt.cache import CodeCache, open_cache

KEY = "0123456789abcdef" * 4
CODE = b"\x7fELF" + bytes(range(256)) * 40


@pytest.fixture
def cache(tmp_path: Path) -> CodeCache:
    return CodeCache(tmp_path)


def only_file(cache: CodeCache) -> Path:
    (path,) = cache.folder.iterdir()
    return path


def test_what_was_put_is_got_by_every_process(cache: CodeCache) -> None:
    assert cache.get(KEY) is None
    cache.put(KEY, CODE)
    assert CodeCache(cache.folder).get(KEY) == CODE
    assert cache.get(KEY[:-1]) is None
    assert only_file(cache).stat().st_mode & 0o777 == 0o600


def test_the_last_that_was_put_counts(cache: CodeCache) -> None:
    cache.put(KEY, CODE)
    cache.put(KEY, b"another")
    assert cache.get(KEY) == b"another"
    assert only_file(cache)


@pytest.mark.parametrize("damage", ["cut short", "only the head", "longer", "a bit", "the sum", "empty", "other magic"])
def test_a_damaged_file_is_not_there_and_goes(cache: CodeCache, damage: str) -> None:
    cache.put(KEY, CODE)
    path = only_file(cache)
    content = path.read_bytes()
    match damage:
        case "cut short":
            path.write_bytes(content[:-1])
        case "only the head":
            path.write_bytes(content[: len(content) - len(CODE)])
        case "longer":
            path.write_bytes(content + b"\0")
        case "a bit":
            path.write_bytes(content[:-9] + bytes([content[-9] ^ 4]) + content[-8:])
        case "the sum":
            path.write_bytes(content[:20] + bytes([content[20] ^ 1]) + content[21:])
        case "empty":
            path.write_bytes(b"")
        case "other magic":
            path.write_bytes(b"Edgekv" + content[6:])
    assert cache.get(KEY) is None
    assert not path.exists()
    cache.put(KEY, CODE)
    assert cache.get(KEY) == CODE


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    cache = CodeCache(tmp_path, limit_bytes=3 * (len(CODE) + 100))
    keys = [f"{number:064x}" for number in range(5)]
    for age, key in enumerate(keys[:3]):
        cache.put(key, CODE)
        long_ago = time.time() - 1000 + age
        os.utime(tmp_path / f"{key}.code", (long_ago, long_ago))
    assert cache.get(keys[0]) == CODE  # used again
    cache.put(keys[3], CODE)
    assert [key for key in keys if cache.get(key)] == [keys[0], keys[2], keys[3]]


def test_what_was_just_made_stays_however_large(tmp_path: Path) -> None:
    cache = CodeCache(tmp_path, limit_bytes=10)
    cache.put(KEY, CODE)
    assert cache.get(KEY) == CODE
    cache.put("a" * 64, CODE)
    assert (cache.get(KEY), cache.get("a" * 64)) == (None, CODE)


def test_others_files_are_left_alone_and_killed_writers_leavings_are_not(cache: CodeCache) -> None:
    notes, fresh, old = (cache.folder / name for name in ("notes", "new-1", "new-2"))
    for path in (notes, fresh, old):
        path.write_bytes(b"x" * 1000)
    long_ago = time.time() - 100_000
    for path in (notes, old):
        os.utime(path, (long_ago, long_ago))
    CodeCache(cache.folder, limit_bytes=1).put(KEY, CODE)
    assert (notes.exists(), fresh.exists(), old.exists()) == (True, True, False)


def full(*_: object, **__: object) -> NoReturn:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("function", ["tempfile.NamedTemporaryFile", "os.replace", "_framed"])
def test_a_full_disk_costs_nothing_but_the_keeping(
    cache: CodeCache, function: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(f"edgekv.kernels.rt.cache.{function}", full)
    for _ in range(3):
        cache.put(KEY, CODE)
    assert [record.getMessage().split(": ")[-1] for record in caplog.records] == ["[Errno 28] No space left on device"]
    assert list(cache.folder.iterdir()) == []
    assert cache.get(KEY) is None


def test_a_folder_that_has_gone_costs_nothing_but_the_keeping(
    cache: CodeCache, caplog: pytest.LogCaptureFixture
) -> None:
    cache.folder.rmdir()
    cache.put(KEY, CODE)
    assert cache.get(KEY) is None
    assert len(caplog.records) == 1
    cache.folder.write_text("a file")
    cache.put(KEY, CODE)
    assert cache.get(KEY) is None


def test_a_key_cannot_lead_elsewhere(cache: CodeCache) -> None:
    with pytest.raises(ValueError):
        cache.get("../../etc/passwd")


RACE = """
import random, sys
from pathlib import Path
from edgekv.kernels.rt.cache import CodeCache
cache = CodeCache(Path(sys.argv[1]), limit_bytes=40_000)
draw = random.Random(int(sys.argv[2]))
hits = 0
for _ in range(300):
    number = draw.randrange(8)
    key, code = f"{number:064x}", bytes([number + 1]) * (5000 + number)
    if draw.random() < 0.5:
        cache.put(key, code)
    else:
        found = cache.get(key)
        assert found in (None, code), number
        hits += found is not None
print(hits)
"""


def test_processes_that_put_get_and_evict_at_once_see_whole_files_only(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, str(tmp_path), str(seed)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in range(4)
    ]
    told = [process.communicate(timeout=60) for process in processes]
    assert [error for _, error in told] == [""] * 4
    assert all(int(hits) > 0 for hits, _ in told)
    assert {path.suffix for path in tmp_path.iterdir()} == {".code"}
    # Two who prune at once may remove more than they must, and never less than one of them would have.
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 40_000 + 4 * 5100


def test_the_users_own_is_in_their_cache_folder_and_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cache = open_cache()
    assert cache is not None
    assert cache.folder == tmp_path / "cache" / "edgekv" / "gpu"
    assert cache.folder.stat().st_mode & 0o777 == 0o700


def test_without_that_variable_it_is_in_their_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    cache = open_cache()
    assert cache is not None
    assert cache.folder == tmp_path / "home" / ".cache" / "edgekv" / "gpu"


def no_home() -> NoReturn:
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize("why", ["others may write to it", "no home", "a file in the way"])
def test_without_a_folder_of_their_own_nothing_is_kept(
    tmp_path: Path, why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    match why:
        case "others may write to it":
            (tmp_path / "cache" / "edgekv").mkdir(parents=True)
            (tmp_path / "cache" / "edgekv").chmod(0o777)
        case "no home":
            monkeypatch.delenv("XDG_CACHE_HOME")
            monkeypatch.setattr(Path, "home", no_home)
        case "a file in the way":
            (tmp_path / "cache").write_text("no folder")
    with caplog.at_level(logging.WARNING):
        assert open_cache() is None
    assert "cannot be kept" in caplog.text
