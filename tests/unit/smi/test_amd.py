"""Reading AMD's cards and APUs from the files of amdgpu, /proc and KFD."""

import os
from pathlib import Path
from typing import Literal

import pytest

from edgekv.core.reading import Holder, Reading
from edgekv.smi.amd import MemoryUse, memory_use, open_sysfs
from edgekv.smi.amdgpu_sysfs import CardTotals
from edgekv.smi.host import HostMemory
from edgekv.smi.processes import CardClients, Names, own_pid
from edgekv.smi.reader import ReadingFailed, Watched
from edgekv.smi.sources import sources_for
from tests.sim import CardState, SimulatedCard

MIB = 1 << 20
GIB = 1 << 30
PCI = "0000:03:00.0"
DESKTOP = (1200, "/usr/bin/kwin_wayland", 700 * MIB)
GAME = (4711, "/opt/game", 6 * GIB)


@pytest.fixture
def card(tmp_path: Path) -> SimulatedCard:
    state = CardState("amd", total_bytes=16 * GIB, own_bytes=5 * GIB, others=(DESKTOP,), gtt_total_bytes=16 * GIB)
    return SimulatedCard(tmp_path / "card", state)


@pytest.fixture
def apu(tmp_path: Path) -> SimulatedCard:
    state = CardState(
        "amd-apu", total_bytes=32 * GIB, own_bytes=5 * GIB, others=((4711, "game", 6 * GIB),), gtt_total_bytes=16 * GIB,
        gtt_used_bytes=5 * GIB, swap_total_bytes=8 * GIB,
    )  # fmt: skip
    return SimulatedCard(tmp_path / "apu", state)


def read(card: SimulatedCard) -> Reading:
    reader = open_sysfs(PCI, card.sysfs, card.proc)
    try:
        return reader.read(2.5)
    finally:
        reader.close()


@pytest.mark.parametrize("kernel", ["6.x", "6.14", "7.2"])
def test_a_cards_memory_is_ours_and_others(card: SimulatedCard, kernel: Literal["6.x", "6.14", "7.2"]) -> None:
    card.set(fdinfo=kernel, others=(DESKTOP, GAME), both_lists=(GAME[0],), gtt_used_bytes=90 * MIB, evicted_ms=40)
    reading = read(card)
    assert (reading.total_bytes, reading.own_bytes) == (16 * GIB, 5 * GIB)
    assert reading.others_bytes() == 6 * GIB + 700 * MIB
    assert reading.holders == (Holder(4711, "game", 6 * GIB), Holder(1200, "kwin_wayland", 700 * MIB))
    assert (reading.spilled_own_bytes, reading.gtt_used_bytes, reading.evicted_ms) == (0, 90 * MIB, 40)
    assert (reading.unified, reading.source, reading.at, reading.major_faults) == (False, "sysfs", 2.5, None)


@pytest.mark.parametrize("kernel", ["6.x", "6.14", "7.2"])
def test_what_was_evicted_of_ours_is_spilled(card: SimulatedCard, kernel: Literal["6.x", "6.14", "7.2"]) -> None:
    card.set(fdinfo=kernel, own_bytes=4 * GIB, spilled_own_bytes=GIB, gtt_used_bytes=GIB + 50 * MIB)
    reading = read(card)
    assert (reading.own_bytes, reading.spilled_own_bytes) == (4 * GIB, GIB)


def test_gtt_that_we_asked_for_is_not_spilled(card: SimulatedCard) -> None:
    card.set(own_gtt_bytes=512 * MIB, gtt_used_bytes=612 * MIB)
    assert read(card).spilled_own_bytes == 0


def test_a_reader_follows_the_card(card: SimulatedCard) -> None:
    reader = open_sysfs(PCI, card.sysfs, card.proc)
    assert reader.read(0.0).free_bytes == 11 * GIB - 700 * MIB
    card.set(others=(DESKTOP, GAME))
    assert reader.read(1.0).free_bytes == 5 * GIB - 700 * MIB
    card.set(others=())
    assert reader.read(2.0).holders == ()


def test_another_process_of_the_same_number_has_its_own_name(card: SimulatedCard) -> None:
    reader = open_sysfs(PCI, card.sysfs, card.proc)
    assert [holder.name for holder in reader.read(0.0).holders] == ["kwin_wayland"]
    card.set(others=())
    reader.read(1.0)
    card.set(others=((DESKTOP[0], "/usr/bin/other", MIB),))
    assert [holder.name for holder in reader.read(2.0).holders] == ["other"]


def test_a_card_that_falls_off_the_bus_is_no_reading_and_can_be_opened_again(card: SimulatedCard) -> None:
    reader = open_sysfs(PCI, card.sysfs, card.proc)
    reader.read(0.0)
    card.set(gone=True)
    with pytest.raises(ReadingFailed, match="does not tell its memory"):
        reader.read(1.0)
    with pytest.raises(ReadingFailed, match=r"drives no card at 0000:03:00\.0"):
        open_sysfs(PCI, card.sysfs, card.proc)
    card.set(gone=False)
    assert read(card).own_bytes == 5 * GIB


def test_an_unnamed_card_is_the_only_one(card: SimulatedCard, tmp_path: Path) -> None:
    assert open_sysfs(None, card.sysfs, card.proc).read(0.0).own_bytes == 5 * GIB
    with pytest.raises(ReadingFailed, match=r"no card at an unnamed address \(it drives none\)"):
        open_sysfs(None, tmp_path / "none", card.proc)


def test_without_compute_there_is_a_reading_without_its_clocks(card: SimulatedCard, tmp_path: Path) -> None:
    (card.sysfs / "class/kfd").rename(tmp_path / "kfd")
    reading = read(card)
    assert (reading.own_bytes, reading.evicted_ms) == (5 * GIB, None)
    assert reading.holders == (Holder(1200, "kwin_wayland", 700 * MIB),)


def test_where_descriptors_tell_nothing_kfd_tells_what_we_asked_for(card: SimulatedCard) -> None:
    for number in (7, 9):
        path = card.proc / "self/fdinfo" / str(number)
        path.write_text(f"drm-pdev:\t{PCI}\ndrm-client-id:\t17\n")
    assert read(card).own_bytes == 5 * GIB


def test_where_nobody_tells_our_share_it_is_not_told(card: SimulatedCard, tmp_path: Path) -> None:
    (card.proc / "self").unlink()
    reading = read(card)
    assert (reading.own_bytes, reading.spilled_own_bytes) == (5 * GIB, 0)  # by KFD, under the number of this process
    (card.sysfs / "class/kfd").rename(tmp_path / "kfd")
    assert read(card).own_bytes is None


def test_an_apus_memory_is_gtt_and_never_spilled_there(apu: SimulatedCard) -> None:
    reading = read(apu)
    assert (reading.total_bytes, reading.own_bytes, reading.free_bytes) == (16 * GIB, 5 * GIB, 11 * GIB)
    assert (reading.unified, reading.spilled_own_bytes, reading.gtt_used_bytes) == (True, 0, 5 * GIB)


def test_an_apus_memory_is_what_main_memory_has_left(apu: SimulatedCard) -> None:
    apu.set(others=((4711, "game", 25 * GIB),), spilled_own_bytes=70 * MIB, major_faults=9)
    reading = read(apu)
    assert reading.free_bytes == 2 * GIB
    assert reading.others_bytes() == 9 * GIB
    assert (reading.spilled_own_bytes, reading.major_faults) == (70 * MIB, 9)


def test_what_others_hold_of_an_apu_is_gtt(apu: SimulatedCard) -> None:
    text = f"drm-pdev:\t{PCI}\ndrm-client-id:\t30\ndrm-memory-vram:\t64 MiB\ndrm-memory-gtt:\t2 GiB\n"
    for number in (7, 9):
        (apu.proc / "4711/fdinfo" / str(number)).write_text(text)
    assert read(apu).holders == (Holder(4711, "game", 2 * GIB),)


TOTALS = CardTotals(vram_total_bytes=4 * GIB, vram_used_bytes=GIB, gtt_total_bytes=16 * GIB, gtt_used_bytes=2 * GIB)
HOST = HostMemory(total_bytes=30 * GIB, available_bytes=20 * GIB)


@pytest.mark.parametrize(
    ("totals", "host", "use"),
    [
        (TOTALS, None, MemoryUse(4 * GIB, GIB, unified=False, in_gtt=False)),
        (TOTALS, HOST, MemoryUse(16 * GIB, 2 * GIB, unified=True, in_gtt=True)),
        (TOTALS, HostMemory(30 * GIB, 5 * GIB), MemoryUse(16 * GIB, 11 * GIB, unified=True, in_gtt=True)),
        (TOTALS, HostMemory(12 * GIB, 12 * GIB), MemoryUse(12 * GIB, 0, unified=True, in_gtt=True)),
        (CardTotals(96 * GIB, GIB, 16 * GIB, 0), HOST, MemoryUse(96 * GIB, GIB, unified=True, in_gtt=False)),
        (CardTotals(4 * GIB, 5 * GIB, None, None), HOST, MemoryUse(4 * GIB, 4 * GIB, unified=True, in_gtt=False)),
        (CardTotals(GIB, 0, 4 * GIB, 5 * GIB), HOST, MemoryUse(4 * GIB, 4 * GIB, unified=True, in_gtt=True)),
    ],
)
def test_the_memory_that_programs_get(totals: CardTotals, host: HostMemory | None, use: MemoryUse) -> None:
    assert memory_use(totals, host) == use


def test_a_few_processes_are_looked_at_each_time_until_all_were(card: SimulatedCard) -> None:
    card.set(others=tuple((5000 + i, f"p{i}", (i + 1) * MIB) for i in range(5)))
    clients = CardClients(card.proc, PCI, least_s=0.0, least=1)
    counts = [len(clients.look()) for _ in range(6)]
    assert counts == [1, 2, 3, 4, 5, 6]  # this process is one of them
    card.set(others=())
    for _ in range(6):
        last = clients.look()
    assert list(last) == [os.getpid()]


def test_a_process_that_has_just_started_is_looked_at_first(card: SimulatedCard) -> None:
    card.set(others=tuple((5000 + i, f"p{i}", MIB) for i in range(5)))
    clients = CardClients(card.proc, PCI, least_s=0.0, least=1)
    clients.look()
    card.set(others=(*card.state.others, (40, "new", MIB)))
    assert 40 in clients.look()


def test_a_process_that_gave_the_card_up_is_forgotten(card: SimulatedCard) -> None:
    clients = CardClients(card.proc, PCI, least_s=1.0)
    assert set(clients.look()) == {os.getpid(), 1200}
    card.set(others=((1200, "kwin_wayland", 0),))
    assert set(clients.look()) == {os.getpid()}


def test_names_are_looked_up_once_and_forgotten_with_their_process(card: SimulatedCard) -> None:
    names = Names(card.proc, lambda pid: "elsewhere" if pid == 77 else None)
    assert [names.of(pid) for pid in (1200, 77, 78)] == ["kwin_wayland", "elsewhere", "?"]
    card.set(others=((1200, "other", MIB),))
    assert names.of(1200) == "kwin_wayland"
    names.keep([77])
    assert names.of(1200) == "other"


def test_a_name_holds_nothing_that_a_terminal_obeys(tmp_path: Path) -> None:
    (tmp_path / "90").mkdir()
    (tmp_path / "90/comm").write_bytes(b"\x1b[2Jgame \xff\n")
    assert Names(tmp_path).of(90) == "?[2Jgame \ufffd"


def test_our_number_is_the_one_that_proc_has_for_us(card: SimulatedCard, tmp_path: Path) -> None:
    card.set(own_pid=31)
    assert own_pid(card.proc) == 31
    assert own_pid(tmp_path) == own_pid(Path("/proc")) == os.getpid()


def test_amds_library_comes_before_its_files() -> None:
    assert [source.name for source in sources_for(Watched("amd", PCI))] == ["amdsmi", "sysfs"]
    assert [source.name for source in sources_for(Watched("nvidia", PCI))] == ["nvml"]
    assert [source.name for source in sources_for(Watched("cpu"))] == ["host"]
