"""Where the compiled kernels come from, each time in a process of its own.

Compiling them for real takes a while and is done once for all tests; here the compiler is a script (compiler.py) that
can be counted and made to fail.
"""

import ctypes
import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from edgekv.kernels.cpu import build as build_module
from edgekv.kernels.cpu.build import (
    SOURCES,
    BuildFailed,
    build,
    check_file,
    find_compiler,
    library_name,
    source_hash,
)
from edgekv.kernels.cpu.library import VARIABLE
from tests.kernels.cpu import compiler
from tests.kernels.cpu.room import library

ASK = """
import json, logging, sys
from edgekv.kernels.cpu.library import KernelsUnavailable, available, is_ready, load_library
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
answer = {"ready": is_ready(), "available": available()}
try:
    found = load_library()
    answer |= {"path": str(found.path), "tiers": found.tiers, "again": load_library() is found}
except KernelsUnavailable as error:
    answer |= {"reason": error.reason, "remedy": error.remedy}
answer["for certain"] = available(compile=True)
print(json.dumps(answer))
"""

# Says "called" every time; stops when it is told to, and tries again when it is told that.
STOP = """
import select, sys
from edgekv.kernels.cpu.library import load_library

class Stopped(BaseException):
    pass

def progress():
    print("called", flush=True)
    if select.select([sys.stdin], [], [], 0)[0]:
        sys.stdin.readline()
        raise Stopped

try:
    load_library(progress)
except Stopped:
    print("stopped", flush=True)
    sys.stdin.readline()
    print(load_library().path)
"""


@dataclass
class User:
    """Someone with a cache folder and a compiler of their own, or none."""

    home: Path
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def cache(self) -> Path:
        return self.home / "cache"

    @property
    def cached(self) -> Path:
        return self.cache / "edgekv" / "cpu" / source_hash() / library_name()

    @property
    def compilations(self) -> int:
        return compiler.count_linked(self.home / "bin")

    def install_compiler(self, link: str = "", compile: str = "") -> None:
        compiler.install(self.home / "bin", link=link, compile=compile)

    def start(self, program: str = ASK) -> "subprocess.Popen[str]":
        kept = {name: os.environ[name] for name in ("PYTHONPATH", "LD_LIBRARY_PATH") if name in os.environ}
        folders = {"PATH": "bin", "XDG_CACHE_HOME": "cache", "TMPDIR": "tmp"}
        variables = {name: str(self.home / folder) for name, folder in folders.items()}
        return subprocess.Popen(
            [sys.executable, "-c", program],
            env=kept | variables | self.variables,
            cwd=Path(__file__).parents[3],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ask(self) -> tuple[dict[str, Any], str]:
        """What a process of theirs finds, and what it logs."""
        return told(self.start())


def told(process: "subprocess.Popen[str]") -> tuple[dict[str, Any], str]:
    output, logged = process.communicate(timeout=60)
    assert process.returncode == 0, logged
    return json.loads(output), logged


def stop(process: "subprocess.Popen[str]") -> None:
    """Tell STOP to, and see that it does so soon."""
    assert process.stdin is not None
    assert process.stdout is not None
    patience = threading.Timer(15, process.kill)
    patience.start()
    process.stdin.write("stop\n")
    process.stdin.flush()
    assert "stopped\n" in iter(process.stdout.readline, "")
    patience.cancel()
    patience.join()


@pytest.fixture
def user(tmp_path: Path) -> Iterator[User]:
    for name in ("bin", "tmp"):
        (tmp_path / name).mkdir()
    yield User(tmp_path)
    assert not list((tmp_path / "tmp").iterdir())  # nothing is left behind


def test_without_library_and_compiler_there_is_a_reason_and_a_remedy(user: User) -> None:
    answer, _ = user.ask()
    assert "no C++ compiler" in answer["reason"]
    assert "apt install g++" in answer["remedy"]
    assert (answer["ready"], answer["available"], answer["for certain"]) == (False, False, False)
    assert not user.cache.exists()


def test_the_first_process_compiles_and_the_next_does_not(user: User) -> None:
    user.install_compiler()
    answer, logged = user.ask()
    assert answer["path"] == str(user.cached)
    assert answer["tiers"][-1] == "plain"
    assert answer["again"]
    assert (answer["ready"], answer["available"], answer["for certain"]) == (False, True, True)
    assert logged.count("compiling the CPU kernels (once, about ") == 1
    (user.home / "bin" / "c++").unlink()
    answer, logged = user.ask()
    assert answer["path"] == str(user.cached)
    assert (answer["ready"], logged) == (True, "")
    assert user.compilations == 1
    assert sorted(path.name for path in user.cached.parent.iterdir()) == [
        library_name(),
        f"{library_name()}.sum",
        "lock",
    ]


@pytest.mark.parametrize("damage", ["cut short", "a byte changed", "other sources", "no sum", "an empty sum", "empty"])
def test_a_damaged_library_is_made_anew(user: User, damage: str) -> None:
    user.install_compiler()
    user.ask()
    path, summary = user.cached, Path(f"{user.cached}.sum")
    content = path.read_bytes()
    match damage:
        case "cut short":
            path.write_bytes(content[: len(content) // 2])  # to map this one would be a bus error
        case "a byte changed":
            path.write_bytes(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
        case "other sources":
            summary.write_text("0123456789abcdef" + summary.read_text()[16:])
        case "no sum":
            summary.unlink()
        case "an empty sum":
            summary.write_text("")
        case "empty":
            path.write_bytes(b"")
    assert check_file(path) is not None
    answer, _ = user.ask()
    assert answer["path"] == str(path)
    assert not answer["ready"]
    assert user.compilations == 2
    assert path.read_bytes() == content
    assert check_file(path) is None


def test_two_first_processes_compile_once(user: User) -> None:
    user.install_compiler(link="sleep 0.5")
    processes = [user.start(), user.start()]
    answers = [told(process)[0] for process in processes]
    assert [answer["path"] for answer in answers] == [str(user.cached)] * 2
    assert user.compilations == 1


def test_a_stop_ends_the_compilers_leaves_nothing_and_spoils_nothing(user: User) -> None:
    started = user.home / "started"
    # What a compiler starts itself, as g++ does, must end too.
    user.install_compiler(compile=f': > "$TMPDIR/half.s"; sleep 60 & echo $! >> {started}; wait')
    process = user.start(STOP)
    while not (started.exists() and started.read_text()):
        assert process.poll() is None
        time.sleep(0.01)
    compiling = [int(line) for line in started.read_text().split()]
    # Ctrl-C in a terminal is for all processes of the group: it must not reach them.
    assert all(os.getpgid(pid) != os.getpgid(process.pid) for pid in compiling)
    stop(process)
    deadline = time.monotonic() + 10  # they are told at once; that they are gone may take the system a moment
    while any(map(is_running, compiling)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not [pid for pid in compiling if is_running(pid)]
    assert [path.name for path in user.cached.parent.iterdir()] == ["lock"]
    assert not list((user.home / "tmp").iterdir())
    user.install_compiler()
    output, logged = process.communicate("go on\n", timeout=60)
    assert (output, logged) == (f"{user.cached}\n", "")
    assert user.compilations == 1


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_progress_is_called_several_times_a_second_while_it_is_compiled(user: User) -> None:
    user.install_compiler(link="sleep 1")
    process = user.start(STOP)
    assert process.stdout is not None
    called_at = [time.monotonic() for _ in process.stdout]
    process.communicate()
    assert len([at for at in called_at if at > called_at[-1] - 0.9]) >= 5


def test_the_wait_for_another_process_that_compiles_can_be_stopped(user: User) -> None:
    user.install_compiler()
    user.cached.parent.mkdir(parents=True)
    with (user.cached.parent / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = user.start(STOP)
        stop(process)
        assert user.compilations == 0
    output, _ = process.communicate("go on\n", timeout=60)
    assert output == f"{user.cached}\n"


def test_where_the_cache_cannot_be_written_every_process_compiles(user: User) -> None:
    user.install_compiler()
    user.cache.write_text("no folder")
    answer, logged = user.ask()
    assert answer["tiers"]
    assert not Path(answer["path"]).exists()  # it is loaded, and gone
    assert "cannot be kept" in logged
    user.ask()
    assert user.compilations == 2


NO_CODE = """
import ctypes
real = ctypes.CDLL
def CDLL(path):
    if path.startswith({cache!r}):
        raise OSError(path + ": failed to map segment from shared object: Operation not permitted")
    return real(path)
ctypes.CDLL = CDLL
"""


def test_from_a_file_system_without_code_a_copy_is_loaded_and_nothing_compiled_again(user: User) -> None:
    user.install_compiler()
    program = NO_CODE.format(cache=str(user.cache)) + ASK
    for _ in range(2):
        answer, logged = told(user.start(program))
        assert answer["tiers"]
        assert not Path(answer["path"]).exists()
        assert "Operation not permitted" not in logged
        assert user.compilations == 1
    assert check_file(user.cached) is None


@pytest.mark.parametrize("which", ["edgekv", "edgekv/cpu", "the folder itself"])
def test_a_library_that_others_could_have_put_there_is_not_loaded(user: User, which: str) -> None:
    user.install_compiler()
    user.ask()
    folder = user.cached.parent if which == "the folder itself" else user.cache / which
    folder.chmod(0o777)
    answer, logged = user.ask()
    assert not answer["ready"]
    assert not answer["path"].startswith(str(user.cache))
    assert f"others may write to {folder}" in logged
    folder.chmod(0o1777)  # as /tmp: they cannot replace what is there, but add to it
    assert (user.ask()[0]["path"] == str(user.cached)) == (folder != user.cached.parent)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_folder_of_another_user_is_not_trusted(user: User) -> None:
    user.install_compiler()
    user.ask()
    os.chown(user.cached.parent, 12345, 12345)
    answer, logged = user.ask()
    assert not answer["path"].startswith(str(user.cache))
    assert f"{user.cached.parent} belongs to another user" in logged
    # What the user's home is, Python itself trusts.
    os.chown(user.home, 12345, 12345)
    user.variables = {"HOME": str(user.home)}
    assert user.ask()[0]["path"] == str(user.cached)


def test_nothing_is_made_in_a_folder_that_is_not_trusted(user: User) -> None:
    user.install_compiler()
    user.cache.mkdir()
    user.cache.chmod(0o777)
    user.ask()
    assert not list(user.cache.iterdir())


def test_the_cache_is_made_for_one_user_alone_and_a_link_in_it_is_not_followed(user: User) -> None:
    user.install_compiler()
    before = os.umask(0o002)
    try:
        user.ask()
    finally:
        os.umask(before)
    assert user.cached.parent.stat().st_mode & 0o777 == 0o700
    user.cached.unlink()
    precious = user.home / "precious"
    precious.write_text("letters")
    (user.cached.parent / "lock").unlink()
    (user.cached.parent / "lock").symlink_to(precious)
    answer, _ = user.ask()
    assert precious.read_text() == "letters"
    assert answer["tiers"]


def test_a_home_that_cannot_be_found_is_no_reason_to_fail(user: User) -> None:
    user.install_compiler()
    user.variables = {"XDG_CACHE_HOME": "not absolute", "HOME": str(user.home / "elsewhere")}
    answer, _ = user.ask()
    assert answer["path"].startswith(str(user.home / "elsewhere" / ".cache" / "edgekv" / "cpu"))


def test_a_compiler_that_fails_is_quoted(user: User) -> None:
    user.install_compiler(compile="echo In file; echo 'rows.h:7: error: nothing works' >&2; exit 1")
    answer, _ = user.ask()
    assert "rows.h:7: error: nothing works" in answer["reason"]
    assert "CXX" in answer["remedy"]
    assert (answer["available"], answer["for certain"]) == (True, False)
    assert not user.cached.exists()
    assert [path.name for path in user.cached.parent.iterdir()] == ["lock"]


def test_a_compiler_whose_work_does_not_load_is_no_crash(user: User) -> None:
    user.install_compiler(link='echo text > "$output"; exit 0')
    answer, _ = user.ask()
    assert "does not load" in answer["reason"]


@pytest.mark.parametrize("name", ["clang++", "g++"])
def test_other_compilers_are_found(user: User, name: str) -> None:
    user.install_compiler()
    (user.home / "bin" / "c++").rename(user.home / "bin" / name)
    assert user.ask()[0]["path"] == str(user.cached)


def test_the_compiler_that_is_asked_for_is_taken(user: User) -> None:
    user.install_compiler()
    own = user.home / "own"
    shutil.move(user.home / "bin" / "c++", own)
    user.variables = {"CXX": f"{own} -Dsomething"}
    assert user.ask()[0]["path"] == str(user.cached)
    user.variables = {"CXX": str(user.home / "nothing"), "XDG_CACHE_HOME": str(user.home / "another")}
    assert "no C++ compiler" in user.ask()[0]["reason"]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="it is the flags of that machine that are refused")
def test_a_tier_that_the_compiler_does_not_know_is_left_out(user: User) -> None:
    """The file is compiled without the flags, and then answers that there is no such tier."""
    commands = user.home / "commands"
    user.install_compiler(compile=f'echo "$*" >> {commands}; case "$*" in *-mavx512f*) echo unknown >&2; exit 1;; esac')
    assert user.ask()[0]["path"] == str(user.cached)
    compiled = {line.split("/")[-1]: line for line in commands.read_text().splitlines() if " -c " in line}
    assert "-mavx512f" not in compiled["tier_avx512.o"]
    assert "-mavx2" in compiled["tier_avx2.o"]


def test_switched_off(user: User) -> None:
    user.install_compiler()
    user.variables = {VARIABLE: "off"}
    answer, _ = user.ask()
    assert "switched off" in answer["reason"]
    assert (answer["ready"], answer["available"], answer["for certain"]) == (False, False, False)


def test_a_library_can_be_named(user: User) -> None:
    user.variables = {VARIABLE: str(library().path)}
    answer, _ = user.ask()
    assert answer["path"] == str(library().path)
    assert (answer["ready"], answer["available"], answer["for certain"]) == (True, True, True)


@pytest.mark.parametrize("kind", ["nothing", "text", "another library"])
def test_a_wrong_library_that_is_named_is_not_replaced_in_silence(user: User, kind: str) -> None:
    user.install_compiler()
    path = user.home / "named.so"
    if kind == "text":
        path.write_text("no library")
    elif kind == "another library":
        maps = Path("/proc/self/maps").read_text().splitlines()
        path = Path(next(line.split()[-1] for line in maps if "libc." in line))
    user.variables = {VARIABLE: str(path)}
    answer, _ = user.ask()
    assert VARIABLE in answer["reason"]
    assert VARIABLE in answer["remedy"]
    assert user.compilations == 0


def test_the_library_needs_nothing_but_the_c_library() -> None:
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("no readelf here")
    dynamic = subprocess.run([readelf, "-d", library().path], capture_output=True, text=True, check=True).stdout
    needed = [line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "(NEEDED)" in line]
    assert {name.split(".")[0] for name in needed} <= {"libc", "libpthread", "libm", "ld-linux-x86-64"}


def test_it_exports_only_what_is_ours() -> None:
    symbols = shutil.which("nm")
    if symbols is None:
        pytest.skip("no nm here")
    command = [symbols, "-D", "--defined-only", library().path]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = [line.split()[-1].split("@")[0] for line in listed.splitlines()]
    assert names
    assert all(name.startswith("ek_") for name in names)


def test_every_tier_of_this_processor_was_compiled() -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    wanted = ["plain"]
    if {"avx2", "fma", "f16c"} <= set(flags):
        wanted.insert(0, "avx2")
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16"} <= set(flags):
        wanted.insert(0, "avx512")
    if "asimddp" in flags:
        wanted.insert(0, "neon")
    assert list(library().tiers) == wanted


@pytest.mark.skipif(platform.machine() != "x86_64", reason="it is about that machine's registers")
def test_registers_that_the_system_does_not_save_are_not_used(tmp_path: Path) -> None:
    found = find_compiler()
    if found is None or "avx2" not in library().tiers:
        pytest.skip("needs a compiler and avx2")
    source, program = Path(__file__).parent / "csrc" / "tier_cases.cpp", tmp_path / "cases"
    # What the rest of dispatch.cpp asks for is not there, and neither is the rest.
    flags = ("-std=c++17", "-O1", f"-I{SOURCES}", "-ffunction-sections", "-Wl,--gc-sections")
    subprocess.run([*found, *flags, str(source), "-o", str(program)], check=True)
    ymm, zmm = 0b110, 0b1110_0110  # and what they consist of
    saved = [0xFF, 0xE7, 0xE6, *(0xFF ^ 1 << bit for bit in (1, 2, 5, 6, 7)), 0x1F, 0]
    told = subprocess.run([program, *map(hex, saved)], capture_output=True, text=True, check=True).stdout
    has_avx512 = "avx512" in library().tiers
    assert told.splitlines() == [f"{mask & ymm == ymm:d} {has_avx512 and mask & zmm == zmm:d}" for mask in saved]


def test_names_of_tiers_that_do_not_fit_are_cut() -> None:
    room = ctypes.create_string_buffer(b"x" * 8, 8)
    names = "\n".join(library().tiers).encode()
    assert library().functions.ek_tiers(room, 4) == len(names) + 1
    assert room.raw == names[:3] + b"\0" + b"xxxx"


def test_what_is_compiled_while_its_sources_change_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source_hash()
    monkeypatch.setattr(build_module, "_FLAGS", (*build_module._FLAGS, "-DNEWER"))
    with pytest.raises(BuildFailed, match="sources changed"):
        build(tmp_path / "library.so", [str(compiler.install(tmp_path))])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c++", "linked"]
