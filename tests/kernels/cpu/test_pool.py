"""The threads under the CPU kernels: csrc/pool_cases.cpp, built plain, with the thread sanitizer, and with atomics that
have their threads lose the core at the worst of times.
"""

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from edgekv.kernels.cpu.build import SOURCES, find_compiler

HERE = Path(__file__).parent / "csrc"


def build(target: Path, *flags: str, pool_flags: Sequence[str] = ()) -> Path:
    compiler = find_compiler()
    assert compiler is not None, "the CPU kernels are written in C++ and there is no compiler"
    for source, extra in ((SOURCES / "pool.cpp", pool_flags), (HERE / "pool_cases.cpp", ())):
        command = [*compiler, "-std=c++17", "-pthread", "-Wall", "-Wextra", "-Werror", f"-I{SOURCES}", *flags, *extra]
        command += ["-c", str(source), "-o", f"{target}-{source.stem}.o"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    objects = [f"{target}-pool.o", f"{target}-pool_cases.o"]
    subprocess.run([*compiler, "-pthread", *flags, *objects, "-o", str(target)], check=True)
    return target


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("pool") / "plain", "-O2")


@pytest.fixture(scope="module")
def shaky(tmp_path_factory: pytest.TempPathFactory) -> Path:
    flags = ("-include", str(HERE / "shaky_atomic.h"))
    return build(tmp_path_factory.mktemp("pool") / "shaky", "-O2", pool_flags=flags)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dies of a race."""
    folder = tmp_path_factory.mktemp("pool")
    if not has_thread_sanitizer(folder):
        pytest.skip("no thread sanitizer here")
    return build(folder / "watched", "-O1", "-g", "-fsanitize=thread")


def has_thread_sanitizer(folder: Path) -> bool:
    compiler, setarch = find_compiler(), shutil.which("setarch")
    source = folder / "probe.cpp"
    source.write_text("int main() { return 0; }\n")
    command = [*(compiler or ()), "-fsanitize=thread", str(source), "-o", str(folder / "probe")]
    if setarch is None or subprocess.run(command, capture_output=True, check=False).returncode:
        return False
    return run(folder / "probe").returncode == 0


def run(program: Path, case: str = "", threads: int = 1, rounds: int = 20) -> subprocess.CompletedProcess[str]:
    arguments = [case, str(threads), str(rounds)]
    # Without random addresses: older sanitizers stop where the kernel spreads mappings widely.
    wrapper = ["setarch", "-R"] if shutil.which("setarch") else []
    return subprocess.run([*wrapper, program, *arguments], capture_output=True, text=True, check=False, timeout=60)


CASES_OF_ANY_SIZE = (
    "every_item_once",
    "sleepers_wake",
    "a_long_item_holds_nobody_forever",
    "idle_pools_end",
    "a_busy_pool_says_so",
    "every_thread_takes_part",
    "denormals_are_zero_in_runs_alone",
)


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("case", [*CASES_OF_ANY_SIZE, "a_forked_child_runs_alone", "workers_have_names"])
def test_pool(plain: Path, case: str, threads: int) -> None:
    done = run(plain, case, threads)
    assert done.returncode == 0, done.stderr


def test_workers_stay_where_they_are_put(plain: Path) -> None:
    done = run(plain, "workers_stay_where_they_are_put")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES_OF_ANY_SIZE)
def test_pool_without_races(watched: Path, case: str) -> None:
    done = run(watched, case, 3)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("case", ["every_item_once", "sleepers_wake", "idle_pools_end"])
def test_pool_whose_threads_are_late(shaky: Path, case: str, threads: int) -> None:
    done = run(shaky, case, threads, rounds=3)
    assert done.returncode == 0, done.stderr


def test_a_hand_over_takes_less_than_a_slow_system_call(plain: Path) -> None:
    """A bound that holds on a busy machine; the numbers are printed with -s, and far below it."""
    timings = json.loads(run(plain, "timings", 2).stdout)
    print(timings)
    assert timings["barrier_ns"] < 5_000
    assert timings["empty_run_ns"] < 5_000
