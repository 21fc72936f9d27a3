"""Readers and surveys over the real pynvml and amdsmi, which load a simulated driver in a process of their own."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.sim import CardState, SimulatedCard
from tests.sim.build import LibraryBuild
from tests.sim.probe import Probe, Raised, probe

MIB = 1 << 20
GIB = 1 << 30
PCI = "0000:03:00.0"
GAME = (4711, "/opt/game", 6 * GIB)
DESKTOP = (1200, "/usr/lib/Xorg", 700 * MIB)

Start = Callable[..., tuple[SimulatedCard, Probe]]

_SETUP = """
from dataclasses import asdict
from pathlib import Path
from edgekv.smi.cards import survey_amd, survey_nvidia
from edgekv.smi.reader import Watched
from edgekv.smi.sources import sources_for
sysfs, proc = Path({sysfs!r}), Path({proc!r})
sources = {{source.name: source for source in sources_for(Watched({vendor!r}, {pci!r}), sysfs=sysfs, proc=proc)}}
def read(reader, at=0.0):
    return asdict(reader.read(at))
def open_and_read(name):
    reader = sources[name].open()
    try:
        return read(reader)
    finally:
        reader.close()
def survey(of):
    return asdict(of(sysfs, proc))
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Make a card, and a process that has its driver."""
    with ExitStack() as stack:

        def make(state: CardState, build: LibraryBuild = "good") -> tuple[SimulatedCard, Probe]:
            card = SimulatedCard(tmp_path / "card", state)
            process = stack.enter_context(probe(card.environment(build)))
            vendor = "nvidia" if state.vendor == "nvidia" else "amd"
            setup = _SETUP.format(sysfs=str(card.sysfs), proc=str(card.proc), vendor=vendor, pci=state.pci_id)
            process.ask(setup)
            return card, process

        yield make


def nvidia(**changes: Any) -> CardState:
    return CardState("nvidia", "NVIDIA RTX 4090", total_bytes=24 * GIB, reserved_bytes=300 * MIB, **changes)


def amd(**changes: Any) -> CardState:
    return CardState("amd", "Radeon RX 7900 XTX", total_bytes=24 * GIB, gtt_total_bytes=16 * GIB, **changes)


def test_nvml_tells_use_with_what_the_driver_reserves_and_each_process_once(start: Start) -> None:
    card, process = start(nvidia(others=(GAME, DESKTOP), both_lists=(GAME[0],)))
    card.set(own_pid=process.pid, own_bytes=9 * GIB)
    process.ask("reader = sources['nvml'].open()")
    reading = process.ask("read(reader, 3.5)")
    assert (reading["total_bytes"], reading["own_bytes"]) == (24 * GIB, 9 * GIB)
    assert reading["used_bytes"] == 15 * GIB + 1000 * MIB
    assert reading["holders"] == [
        {"pid": 4711, "name": "game", "num_bytes": 6 * GIB},
        {"pid": 1200, "name": "Xorg", "num_bytes": 700 * MIB},
    ]
    assert (reading["spilled_own_bytes"], reading["unified"], reading["at"]) == (0, False, 3.5)
    assert reading["source"] == "nvml"

    card.set(others=(), own_bytes=GIB)
    reading = process.ask("read(reader)")
    assert (reading["used_bytes"], reading["own_bytes"], reading["holders"]) == (GIB + 300 * MIB, GIB, [])


def test_our_share_is_not_told_where_nvml_does_not_list_us(start: Start) -> None:
    card, process = start(nvidia(own_pid=999_999, own_bytes=9 * GIB))  # as a container's host would number us
    process.ask("reader = sources['nvml'].open()")
    assert process.ask("read(reader)")["own_bytes"] is None
    card.set(own_pid=process.pid)
    assert process.ask("read(reader)")["own_bytes"] == 9 * GIB
    card.set(pids_known=False)  # Windows' driver model lists us without a number
    reading = process.ask("read(reader)")
    assert (reading["own_bytes"], reading["used_bytes"]) == (None, 9 * GIB + 300 * MIB)


def test_processes_that_only_nvml_can_name_are_named_by_it(start: Start) -> None:
    _, process = start(nvidia(others=(GAME,)))
    process.ask("import shutil; shutil.rmtree(proc / '4711')")
    holders = process.ask("open_and_read('nvml')")["holders"]
    assert [holder["name"] for holder in holders if holder["pid"] == 4711] == ["game"]


def test_a_lost_card_is_one_line_and_comes_back_when_it_is_opened_again(start: Start) -> None:
    card, process = start(nvidia())
    process.ask("reader = sources['nvml'].open()")
    card.set(gone=True)
    for expression in ("read(reader)", "open_and_read('nvml')"):
        with pytest.raises(Raised, match=r"^ReadingFailed: NVML: [^\n]+$"):
            process.ask(expression)
    process.ask("reader.close()")
    with pytest.raises(Raised, match="ReadingFailed: NVML: Uninitialized"):
        process.ask("read(reader)")
    card.set(gone=False)
    process.ask("reader = sources['nvml'].open()")
    assert process.ask("read(reader)")["total_bytes"] == 24 * GIB


def test_another_cards_address_is_no_card(start: Start) -> None:
    _, process = start(nvidia())
    with pytest.raises(Raised, match="ReadingFailed: NVML knows no card at 0000:0a"):
        process.ask("sources_for(Watched('nvidia', '0000:0a:00.0'))[0].open()")
    assert process.ask("sources_for(Watched('nvidia'), proc=proc)[0].open().read(0.0).total_bytes") == 24 * GIB


def test_an_older_nvml_is_read_by_its_first_version_and_told_of(start: Start) -> None:
    _, process = start(nvidia(others=(GAME,)), build="skew")
    assert process.ask("open_and_read('nvml')")["used_bytes"] == 6 * GIB + 300 * MIB
    survey = process.ask("survey(survey_nvidia)")
    assert [card["used_bytes"] for card in survey["cards"]] == [6 * GIB + 300 * MIB]
    assert "older than the pynvml module" in survey["problem"]
    assert not survey["absent"]


def test_nvidias_cards_are_surveyed(start: Start) -> None:
    _, process = start(nvidia(others=(GAME,), pcie_generation=3, pcie_width=8))
    survey = process.ask("survey(survey_nvidia)")
    assert (survey["problem"], survey["absent"]) == (None, False)
    assert survey["library"].startswith("NVML ")
    [card] = survey["cards"]
    assert (card["vendor"], card["index"], card["name"], card["pci_id"]) == ("nvidia", 0, "NVIDIA RTX 4090", PCI)
    assert (card["total_bytes"], card["used_bytes"]) == (24 * GIB, 6 * GIB + 300 * MIB)
    assert card["link"] == {"generation": 3, "width": 8}
    assert card["target"] == "sm_89"
    assert [holder["name"] for holder in card["holders"] if holder["pid"] == 4711] == ["game"]
    assert card["driver"] == "570.86.15"


def test_a_lost_card_is_named_in_the_survey(start: Start) -> None:
    card, process = start(nvidia())
    card.set(gone=True)
    survey = process.ask("survey(survey_nvidia)")
    assert survey["cards"] == []
    assert survey["problem"] == "card 0: NVML: GPU is lost"
    assert not survey["absent"]


def test_a_lost_card_does_not_hide_the_others(start: Start) -> None:
    _, process = start(nvidia())
    process.ask(
        "import pynvml\n"
        "real = pynvml.nvmlDeviceGetHandleByIndex\n"
        "pynvml.nvmlDeviceGetCount = lambda: 2\n"
        "def by_index(index):\n"
        "    if index == 0:\n"
        "        raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)\n"
        "    return real(0)\n"
        "pynvml.nvmlDeviceGetHandleByIndex = by_index\n"
    )
    survey = process.ask("survey(survey_nvidia)")
    assert [(card["index"], card["pci_id"]) for card in survey["cards"]] == [(1, PCI)]
    assert survey["problem"] == "card 0: NVML: GPU is lost"
    assert not survey["absent"]


def test_a_machine_without_nvidias_driver(start: Start) -> None:
    _, process = start(nvidia(), build="none")
    missing = "NVML is not installed (libnvidia-ml.so.1, part of NVIDIA's driver)"
    driver = f"(sysfs / 'bus/pci/devices/{PCI}/driver')"
    for name, told in (("nvidia", ", driven by nvidia"), ("nouveau", ", driven by nouveau"), ("", "")):
        process.ask(f"{driver}.unlink()")
        process.ask(f"{driver}.symlink_to('drivers/{name}') if '{name}' else None")
        survey = process.ask("survey(survey_nvidia)")
        assert (survey["cards"], survey["absent"]) == ([], False)
        assert survey["problem"] == f"an NVIDIA card is there ({PCI}{told}), but {missing}"
    process.ask(f"{driver}.symlink_to('drivers/vfio-pci')")  # a virtual machine has it
    survey = process.ask("survey(survey_nvidia)")
    assert (survey["problem"], survey["absent"]) == (missing, True)
    process.ask(f"(sysfs / 'bus/pci/devices/{PCI}').unlink()")
    survey = process.ask("survey(survey_nvidia)")
    assert (survey["problem"], survey["absent"]) == (missing, True)
    with pytest.raises(Raised, match="NoLibrary: NVML is not installed"):
        process.ask("open_and_read('nvml')")


def test_a_driver_that_is_not_loaded_is_a_fault_where_a_card_waits_for_it(start: Start) -> None:
    _, process = start(nvidia(init_fails=True))
    survey = process.ask("survey(survey_nvidia)")
    assert (survey["problem"], survey["absent"]) == ("NVML: NVIDIA's kernel driver is not loaded", True)
    process.ask(f"(sysfs / 'bus/pci/devices/{PCI}/driver').unlink()")
    survey = process.ask("survey(survey_nvidia)")
    assert not survey["absent"]
    assert survey["problem"] == f"an NVIDIA card is there ({PCI}), but NVIDIA's kernel driver is not loaded"
    process.ask(f"(sysfs / 'bus/pci/devices/{PCI}/driver').symlink_to('drivers/nouveau')")
    survey = process.ask("survey(survey_nvidia)")
    assert f"({PCI}, driven by nouveau), but NVIDIA's kernel driver is not loaded" in survey["problem"]
    assert not survey["absent"]


def test_amdsmi_tells_totals_and_the_files_tell_the_rest(start: Start) -> None:
    card, process = start(amd(others=(GAME, DESKTOP), both_lists=(GAME[0],)))
    card.set(own_pid=process.pid, own_bytes=5 * GIB, spilled_own_bytes=64 * MIB, gtt_used_bytes=99 * MIB, evicted_ms=70)
    process.ask("reader = sources['amdsmi'].open()")
    reading = process.ask("read(reader, 1.0)")
    assert (reading["source"], reading["total_bytes"], reading["own_bytes"]) == ("amdsmi", 24 * GIB, 5 * GIB)
    assert reading["used_bytes"] == 11 * GIB + 700 * MIB
    assert (reading["spilled_own_bytes"], reading["evicted_ms"]) == (64 * MIB, 70)
    assert reading["gtt_used_bytes"] == 99 * MIB
    assert [holder["name"] for holder in reading["holders"]] == ["game", "Xorg"]
    by_files = process.ask("open_and_read('sysfs')")
    assert by_files == {**reading, "source": "sysfs", "at": 0.0}


def test_amds_cards_are_surveyed(start: Start) -> None:
    _, process = start(amd(others=(GAME,)))
    survey = process.ask("survey(survey_amd)")
    assert (survey["problem"], survey["absent"]) == (None, False)
    assert survey["library"].startswith("amdsmi ")
    [card] = survey["cards"]
    assert (card["vendor"], card["index"], card["name"], card["pci_id"]) == ("amd", 0, "Radeon RX 7900 XTX", PCI)
    assert (card["total_bytes"], card["used_bytes"], card["unified"]) == (24 * GIB, 6 * GIB, False)
    assert card["link"] == {"generation": 4, "width": 16}
    assert card["target"] == "gfx1100"
    assert card["holders"] == [{"pid": 4711, "name": "game", "num_bytes": 6 * GIB}]


def test_an_apu_is_surveyed_as_main_memory(start: Start) -> None:
    state = CardState("amd-apu", "Radeon 8060S", total_bytes=64 * GIB, gtt_total_bytes=32 * GIB, gtt_used_bytes=GIB)
    _, process = start(state)
    [card] = process.ask("survey(survey_amd)")["cards"]
    assert (card["total_bytes"], card["used_bytes"], card["unified"]) == (32 * GIB, GIB, True)
    assert card["link"] is None


def test_without_amds_library_a_card_is_still_found(start: Start) -> None:
    _, process = start(amd(others=(GAME,)), build="none")
    survey = process.ask("survey(survey_amd)")
    assert (survey["problem"], survey["absent"], survey["library"]) == (None, False, "amdgpu's files in /sys")
    [card] = survey["cards"]
    assert (card["total_bytes"], card["used_bytes"], card["pci_id"]) == (24 * GIB, 6 * GIB, PCI)
    with pytest.raises(Raised, match="NoLibrary: amdsmi finds no library"):
        process.ask("open_and_read('amdsmi')")
    assert process.ask("open_and_read('sysfs')")["total_bytes"] == 24 * GIB


def test_amds_library_of_another_version_is_told_of_and_the_card_still_found(start: Start) -> None:
    _, process = start(amd(), build="skew")
    survey = process.ask("survey(survey_amd)")
    assert [card["total_bytes"] for card in survey["cards"]] == [24 * GIB]
    assert "does not fit the installed ROCm library" in survey["problem"]
    assert "\n" not in survey["problem"]
    assert not survey["absent"]
    with pytest.raises(Raised, match=r"^OtherVersion: amdsmi does not fit [^\n]+$"):
        process.ask("open_and_read('amdsmi')")


def test_an_amdsmi_that_does_not_start_is_one_line(start: Start) -> None:
    card, process = start(amd(init_fails=True))
    with pytest.raises(Raised, match=r"^ReadingFailed: amdsmi does not start: [^\n]+$"):
        process.ask("open_and_read('amdsmi')")
    card.set(gone=True)
    survey = process.ask("survey(survey_amd)")
    assert (survey["cards"], survey["absent"]) == ([], True)  # nothing on the bus for it
    assert survey["problem"].startswith("amdsmi does not start: ")


def test_a_card_that_amdgpu_does_not_drive_is_a_fault(start: Start) -> None:
    _, process = start(amd(init_fails=True))
    process.ask(f"(sysfs / 'bus/pci/devices/{PCI}/driver').unlink()")
    process.ask(f"[file.unlink() for file in (sysfs / 'bus/pci/devices/{PCI}/').glob('mem_info_*')]")
    survey = process.ask("survey(survey_amd)")
    assert not survey["absent"]
    assert survey["problem"] == f"an AMD card is there ({PCI}), but its kernel driver (amdgpu) does not drive it"


def test_a_card_that_amdsmi_loses_is_no_reading_and_comes_back(start: Start) -> None:
    card, process = start(amd())
    process.ask("reader = sources['amdsmi'].open()")
    card.set(gone=True)
    with pytest.raises(Raised, match=r"^ReadingFailed: amdsmi: [^\n]+$"):
        process.ask("read(reader)")
    process.ask("reader.close()")
    card.set(gone=False)
    assert process.ask("open_and_read('amdsmi')")["total_bytes"] == 24 * GIB


def test_the_import_of_amdsmi_prints_nothing(start: Start) -> None:
    _, process = start(amd(), build="none")
    printed = (
        "import io, contextlib\nout = io.StringIO()\nwith contextlib.redirect_stdout(out):\n    survey(survey_amd)"
    )
    process.ask(printed)
    assert process.ask("out.getvalue()") == ""
