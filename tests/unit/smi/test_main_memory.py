"""Main memory, within the control groups that limit it."""

import mmap
import os
from pathlib import Path

import pytest

from edgekv.smi.control_group import GroupMemory, read_group
from edgekv.smi.host import HostMemory, read_memory, read_processor
from edgekv.smi.main_memory import HostReader, OwnMemory, biggest_programs, read_own
from tests.sim import CardState, SimulatedCard

MIB = 1 << 20
GIB = 1 << 30
TOTAL = 32 * GIB


def group(sysfs: Path, path: str = "", **files: object) -> None:
    """A control group's files: `max` stands for memory.max, and so on."""
    folder = sysfs / "fs/cgroup" / path
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"memory.{name}").write_text(f"{text}\n")


def within(proc: Path, path: str) -> None:
    (proc / "self").mkdir(parents=True, exist_ok=True)
    (proc / "self/cgroup").write_text(f"1:name=systemd:/elsewhere\n0::{path}\n")


@pytest.fixture
def machine(tmp_path: Path) -> SimulatedCard:
    state = CardState("cpu", total_bytes=TOTAL, own_bytes=4 * GIB, others=((4711, "game", 8 * GIB),))
    return SimulatedCard(tmp_path / "machine", state)


def test_others_and_own_memory_are_told_apart(machine: SimulatedCard) -> None:
    machine.set(swap_total_bytes=8 * GIB, spilled_own_bytes=3 * MIB, major_faults=7)
    reading = HostReader(machine.sysfs, machine.proc).read(1.5)
    assert (reading.total_bytes, reading.used_bytes, reading.own_bytes) == (TOTAL, 12 * GIB, 4 * GIB)
    assert (reading.others_bytes(), reading.free_bytes) == (8 * GIB, 20 * GIB)
    assert (reading.spilled_own_bytes, reading.major_faults) == (3 * MIB, 7)
    assert (reading.unified, reading.at, reading.source) == (True, 1.5, "host")


def test_a_limited_groups_page_cache_is_not_use(machine: SimulatedCard) -> None:
    machine.set(cgroup_limit_bytes=6 * GIB, page_cache_bytes=GIB)
    reading = HostReader(machine.sysfs, machine.proc).read(0.0)
    assert (reading.total_bytes, reading.free_bytes, reading.own_bytes) == (6 * GIB, 2 * GIB, 4 * GIB)


def test_what_the_machine_has_left_may_be_less_than_what_the_group_has(machine: SimulatedCard) -> None:
    machine.set(cgroup_limit_bytes=16 * GIB, others=((4711, "game", 26 * GIB),))
    assert HostReader(machine.sysfs, machine.proc).read(0.0).free_bytes == 2 * GIB


def test_the_tightest_group_on_the_way_up_counts(tmp_path: Path) -> None:
    within(tmp_path, "/user.slice/app.scope")
    group(tmp_path, "user.slice/app.scope", max=8 * GIB, high="max", current=GIB, stat="anon 1")
    group(tmp_path, "user.slice", max="max", high=10 * GIB, current=9 * GIB, stat=f"inactive_file {GIB // 2}")
    group(tmp_path, current=30 * GIB)
    group(tmp_path, "other", max=MIB, current=MIB)
    assert read_group(tmp_path, tmp_path, TOTAL) == GroupMemory(8 * GIB, 3 * GIB // 2)


def test_a_groups_own_limit_counts_where_the_others_are_wide(tmp_path: Path) -> None:
    within(tmp_path, "/a/b")
    group(tmp_path, "a/b", max=2 * GIB, current=GIB)
    group(tmp_path, "a", max=TOTAL, current=TOTAL)  # as much as there is: no limit
    assert read_group(tmp_path, tmp_path, TOTAL) == GroupMemory(2 * GIB, GIB)


@pytest.mark.parametrize("path", ["/", "/../other", None])
def test_in_a_container_the_root_is_the_group(tmp_path: Path, path: str | None) -> None:
    if path is not None:
        within(tmp_path, path)
    group(tmp_path, "../other", max=MIB, current=MIB)  # not one of ours, whatever its folder is called
    group(tmp_path, max=4 * GIB, current=3 * MIB, stat=f"anon 1\ninactive_file {MIB}")
    assert read_group(tmp_path, tmp_path, TOTAL) == GroupMemory(4 * GIB, 4 * GIB - 2 * MIB)


def test_a_group_that_uses_more_than_its_limit_has_nothing_left(tmp_path: Path) -> None:
    group(tmp_path, max=GIB, high="max", current=2 * GIB, stat="garbage\n\n")
    assert read_group(tmp_path, tmp_path, TOTAL) == GroupMemory(GIB, 0)


@pytest.mark.parametrize("limit", ["max", "", "-1", "garbage", str(TOTAL)])
def test_no_limit_is_none(tmp_path: Path, limit: str) -> None:
    assert read_group(tmp_path / "none", tmp_path, TOTAL) is None
    group(tmp_path, max=limit, current=5)
    assert read_group(tmp_path, tmp_path, TOTAL) is None


def test_a_processs_name_may_hold_anything(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self/stat").write_text("5 (a) b) (c) S 1 5 5 0 -1 4194304 100 0 42 9 0 0\n")
    (tmp_path / "self/status").write_text("Name:\tx\nVmRSS:\t90 kB\nRssAnon:\t    12 kB\nVmSwap:\t3 kB\n")
    assert read_own(tmp_path) == OwnMemory(12 << 10, 3 << 10, 42)


def test_without_proc_the_process_still_has_memory(tmp_path: Path) -> None:
    own = read_own(tmp_path)
    assert own.resident_bytes > 0
    assert (own.swapped_bytes, own.major_faults) == (0, None)
    assert read_memory(tmp_path, tmp_path).total_bytes > 0


@pytest.mark.parametrize("text", ["", "MemTotal: x kB\nMemAvailable: 5 kB\n", "MemTotal: 5 kB\n", "\0\xff"])
def test_odd_tables_of_memory_are_not_believed(tmp_path: Path, text: str) -> None:
    (tmp_path / "meminfo").write_text(text)
    assert read_memory(tmp_path, tmp_path).total_bytes > MIB


def test_never_more_is_free_than_there_is(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 10 kB\nMemAvailable: 99 kB\n")
    assert read_memory(tmp_path, tmp_path) == HostMemory(10 << 10, 10 << 10)


def test_this_machine_can_be_read() -> None:
    reader = HostReader()
    reading = reader.read(0.0)
    reader.close()
    assert 0 < reading.used_bytes < reading.total_bytes
    assert reading.own_bytes is not None
    assert 0 < reading.own_bytes < reading.total_bytes
    assert read_processor().cores >= 1


def test_what_the_process_takes_shows_as_its_own() -> None:
    reader = HostReader()
    before = reader.read(0.0)
    # A mapping of its own: an allocator may have as much left over from before.
    with mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as taken:
        for page in range(0, len(taken), mmap.PAGESIZE):
            taken[page] = 1
        after = reader.read(1.0)
    assert (after.own_bytes or 0) - (before.own_bytes or 0) >= 60 * MIB


def test_the_biggest_programs_come_first_and_we_are_not_among_them() -> None:
    found = biggest_programs(10_000)
    sizes = [holder.num_bytes or 0 for holder in found]
    assert sizes == sorted(sizes, reverse=True)
    assert os.getpid() not in [holder.pid for holder in found]
