"""The files of amdgpu and amdkfd under /sys, and the ones that are not as they should be."""

from pathlib import Path

import pytest

from edgekv.smi.amdgpu_sysfs import card_folders, link_of, name_of, read_totals, shares_main_memory, uuid_of
from edgekv.smi.kfd import KfdNode, KfdUse, gfx_target, read_evicted_ms, read_nodes, read_uses
from edgekv.smi.pci import parse_pci_address
from edgekv.smi.reader import ReadingFailed
from edgekv.smi.small_files import parse_number, read_line, read_number
from tests.sim import CardState, SimulatedCard

GIB = 1 << 30
PCI = "0000:03:00.0"


@pytest.fixture
def card(tmp_path: Path) -> SimulatedCard:
    state = CardState(
        "amd", total_bytes=16 * GIB, own_bytes=GIB, gtt_total_bytes=8 * GIB, gtt_used_bytes=77, card_number=1
    )
    return SimulatedCard(tmp_path / "card", state)


def folder_with(tmp_path: Path, **files: object) -> Path:
    for name, text in files.items():
        (tmp_path / name).write_text(f"{text}\n")
    return tmp_path


def test_cards_are_found_by_their_pci_address_and_others_makers_are_not(card: SimulatedCard) -> None:
    assert list(card_folders(card.sysfs)) == [PCI]  # card0 is Intel's, card1-DP-1 a socket


def test_without_any_card_there_is_none(tmp_path: Path) -> None:
    assert card_folders(tmp_path) == {}
    assert read_nodes(tmp_path) == ()
    assert read_uses(tmp_path, KfdNode(1, 1, PCI)) == []


def test_totals_are_read(card: SimulatedCard) -> None:
    totals = read_totals(card_folders(card.sysfs)[PCI])
    assert (totals.vram_total_bytes, totals.vram_used_bytes) == (16 * GIB, GIB)
    assert (totals.gtt_total_bytes, totals.gtt_used_bytes) == (8 * GIB, 77)


@pytest.mark.parametrize("text", ["", "-1", "garbage", "12 34", "9" * 40, "0x10"])
def test_totals_that_make_no_sense_are_no_reading(tmp_path: Path, text: str) -> None:
    folder = folder_with(tmp_path, mem_info_vram_total=16, mem_info_vram_used=text)
    with pytest.raises(ReadingFailed, match="does not tell its memory"):
        read_totals(folder)


def test_a_card_without_gtt_files_has_none_told(tmp_path: Path) -> None:
    totals = read_totals(folder_with(tmp_path, mem_info_vram_total=16, mem_info_vram_used=1, mem_info_gtt_used="x"))
    assert (totals.gtt_total_bytes, totals.gtt_used_bytes) == (None, None)


@pytest.mark.parametrize(
    ("files", "apu"),
    [
        ({"board_info": "type : cem", "mem_info_vram_vendor": "unknown"}, False),
        ({"board_info": "type : cem", "mem_info_vram_total": 4 << 20, "mem_info_gtt_total": 16 * GIB}, False),
        ({"uma": ""}, True),
        ({"mem_info_vram_vendor": "samsung", "mem_info_vram_total": 1, "mem_info_gtt_total": 2}, False),
        ({"mem_info_vram_total": 512 << 20, "mem_info_gtt_total": 16 * GIB}, True),
        ({"mem_info_vram_total": 96 * GIB, "mem_info_gtt_total": 16 * GIB}, True),  # most set aside by the firmware
        ({"mem_info_vram_vendor": "unknown", "mem_info_vram_total": 512 << 20, "mem_info_gtt_total": 16 * GIB}, True),
        ({"mem_info_vram_vendor": "unknown", "mem_info_vram_total": 16 * GIB, "mem_info_gtt_total": 32 * GIB}, False),
        ({}, False),
    ],
)
def test_an_apu_is_told_from_a_card(tmp_path: Path, files: dict[str, object], apu: bool) -> None:
    assert shares_main_memory(folder_with(tmp_path, **files)) is apu


def test_the_link_is_as_fast_as_it_can_be_and_as_wide_as_it_is(tmp_path: Path) -> None:
    files = {"max_link_speed": "16.0 GT/s PCIe", "current_link_speed": "2.5 GT/s PCIe", "max_link_width": 16}
    assert link_of(folder_with(tmp_path, **files, current_link_width=4)) == (4, 4)
    assert link_of(folder_with(tmp_path, max_link_speed="Unknown", current_link_width=16)) is None
    assert link_of(folder_with(tmp_path, max_link_speed="16.0 GT/s PCIe", current_link_width=0)) is None


def test_a_card_is_called_what_it_is_sold_as(tmp_path: Path) -> None:
    ids = tmp_path / "amdgpu.ids"
    ids.write_text("1.0.0\n# comment\n744C,\tC8,\tAMD Radeon RX 7900 XTX\n744C,\tCC,\tAMD Radeon RX 7900 XT\n", "utf-8")
    folder = folder_with(tmp_path, device="0x744c", revision="0xcc", unique_id="43f2a9c30c1c9e01")
    assert name_of(folder, ids) == "AMD Radeon RX 7900 XT"
    assert name_of(folder, tmp_path / "none") == "AMD card 1002:744c"
    assert uuid_of(folder) == "GPU-43f2a9c30c1c9e01"
    assert name_of(folder_with(tmp_path, product_name="Instinct MI210"), ids) == "Instinct MI210"


def test_kfd_numbers_cards_and_counts_their_processes(card: SimulatedCard) -> None:
    card.set(
        others=((4711, "game", 2 * GIB), (4712, "render", 3 * GIB)), both_lists=(4712,), evicted_ms=250, own_pid=99
    )
    [node] = read_nodes(card.sysfs)
    assert node == KfdNode(1, card.state.gpu_id, PCI, "gfx1100")
    assert sorted(read_uses(card.sysfs, node), key=lambda use: use.pid) == [KfdUse(99, GIB), KfdUse(4712, 3 * GIB)]
    assert read_evicted_ms(card.sysfs, node, 99) == 250
    assert read_evicted_ms(card.sysfs, node, 4711) is None


def test_kfds_version_of_a_chip_is_what_compilers_call_it() -> None:
    names = {
        90010: "gfx90a",
        90402: "gfx942",
        100300: "gfx1030",
        110000: "gfx1100",
        110501: "gfx1151",
        120001: "gfx1201",
    }
    assert {version: gfx_target(version) for version in names} == names


def kfd_node(sysfs: Path, name: str, gpu_id: object, properties: str) -> None:
    folder = sysfs / "class/kfd/kfd/topology/nodes" / name
    folder.mkdir(parents=True)
    folder_with(folder, gpu_id=gpu_id, properties=properties)


def test_kfd_nodes_come_in_the_topologys_order_and_odd_ones_are_left_out(tmp_path: Path) -> None:
    kfd_node(tmp_path, "10", 7, f"location_id {0xC300}\ndomain 1\n")
    kfd_node(tmp_path, "2", 5, f"simd_count 64\nlocation_id {0x0A00 | 3 << 3 | 1}\n")  # before 5.6: no domain
    for number in (7, 12, 9, 6, 11, 8):
        kfd_node(tmp_path, str(number), 70 + number, f"location_id {number << 8}\n")
    kfd_node(tmp_path, "0", 0, "cpu_cores_count 16\nlocation_id 0\n")
    kfd_node(tmp_path, "3", "garbage", "location_id 9\n")
    kfd_node(tmp_path, "4", 6, "location_id -9\n")
    kfd_node(tmp_path, "gone", 6, "location_id 9\n")
    nodes = read_nodes(tmp_path)
    assert [node.number for node in nodes] == [2, 6, 7, 8, 9, 10, 11, 12]
    assert (nodes[0], nodes[5]) == (KfdNode(2, 5, "0000:0a:03.1"), KfdNode(10, 7, "0001:c3:00.0"))


def test_kfd_processes_that_end_while_they_are_looked_at_are_left_out(tmp_path: Path) -> None:
    processes = tmp_path / "class/kfd/kfd/proc"
    for name, vram in (("11", "5"), ("12", "-5"), ("13", ""), ("x", "5")):
        (processes / name).mkdir(parents=True)
        (processes / name / "vram_7").write_text(vram)
    (processes / "14").mkdir()
    (processes / "15").write_text("no folder")
    assert read_uses(tmp_path, KfdNode(1, 7, PCI)) == [KfdUse(11, 5)]


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("00000000:03:00.0", PCI), (PCI, PCI), ("03:00.0", PCI), ("0001:C3:1F.7", "0001:c3:1f.7"),
        ("10000:E1:00.0", "10000:e1:00.0"), ("0000:03:20.0", None), ("0000:03:00.8", None), ("card0", None), ("", None),
    ],
)  # fmt: skip
def test_every_way_to_write_a_pci_address(text: str, address: str | None) -> None:
    assert parse_pci_address(text) == address


def test_numbers_are_decimal_and_from_zero_up() -> None:
    assert parse_number(b" 12\n") == 12
    for raw in (b"", b"-1", b"1 2", b"1_000", b"+5", b"0x1", "٣".encode(), b"9" * 20):
        assert parse_number(raw) is None


def test_files_that_cannot_be_read_say_nothing(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none", "/proc/self/mem", "a\0b"):
        assert (read_number(path), read_line(path)) == (None, None)
    (tmp_path / "odd").write_bytes(b"\n \xff\n")
    assert read_line(tmp_path / "odd") is None
