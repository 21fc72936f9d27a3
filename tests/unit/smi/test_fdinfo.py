"""What a process's descriptors say of its memory on a card, in the words of several kernels."""

import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edgekv.smi.fdinfo import NOTHING, Client, ClientMemory, memory_of, parse_fdinfo, parse_size

PCI = "0000:03:00.0"
MIB = 1 << 20
HEAD = f"pos:\t0\nflags:\t02100002\ndrm-driver:\tamdgpu\ndrm-pdev:\t{PCI}\ndrm-client-id:\t17\npasid:\t32771\n"


def client(text: str) -> ClientMemory:
    found = parse_fdinfo(text.encode())
    assert found is not None
    assert (found.pci_id, found.number) == (PCI, 17)
    return found.memory


def test_linux_6_tells_what_lies_where_and_what_was_evicted() -> None:
    places = "drm-memory-vram:\t2048 KiB\ndrm-memory-gtt: \t1024 KiB\n"
    assert client(f"{HEAD}{places}amd-evicted-vram:\t512 KiB\namd-requested-vram:\t9 KiB\n") == ClientMemory(
        2 * MIB, MIB, MIB // 2
    )


def test_linux_7_tells_what_is_resident() -> None:
    text = "drm-total-vram:\t8 MiB\ndrm-resident-vram:\t5 MiB\ndrm-total-gtt:\t0\ndrm-resident-gtt:\t3 MiB\n"
    assert client(HEAD + text + "amd-evicted-vram:\t3072 KiB\n") == ClientMemory(5 * MIB, 3 * MIB, 3 * MIB)


@pytest.mark.parametrize("wanted", ["amd-requested-vram", "drm-total-vram"])
def test_without_the_evicted_bytes_spilled_is_what_is_wanted_and_not_there(wanted: str) -> None:
    assert client(f"{HEAD}{wanted}:\t8 MiB\ndrm-resident-vram:\t5 MiB\n").spilled_bytes == 3 * MIB
    assert client(f"{HEAD}{wanted}:\t4 MiB\ndrm-resident-vram:\t5 MiB\n").spilled_bytes == 0


def test_what_a_kernel_does_not_tell_is_not_made_up() -> None:
    assert client(HEAD) == ClientMemory(None, None, None)
    assert client(HEAD + "drm-memory-vram:\t5 MiB\n") == ClientMemory(5 * MIB, None, None)


@pytest.mark.parametrize("value", ["", "-5 KiB", "5 kB", "5 KiB KiB", "0x10", "1e9", "5,0 MiB", "9" * 30, "９", "\x00"])
def test_odd_sizes_are_no_sizes(value: str) -> None:
    assert parse_size(value.encode()) is None
    assert client(f"{HEAD}drm-memory-vram:\t{value}\n").vram_bytes is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "pos:\t0\n",
        "drm-client-id:\t17\n",
        f"drm-pdev:\t{PCI}\n",
        HEAD.replace("17", "-1"),
        HEAD.replace(PCI, "card0"),
    ],
)
def test_other_descriptors_are_no_clients(text: str) -> None:
    assert parse_fdinfo(text.encode()) is None


@given(st.binary(max_size=400))
@example(b"drm-client-id:")
@example(b"drm-client-id: 1\ndrm-pdev: 0:0:0.0\ndrm-memory-vram: \xff KiB")
def test_no_bytes_make_the_parser_fail(raw: bytes) -> None:
    for text in (raw, HEAD.encode() + raw):
        found = parse_fdinfo(text)
        assert found is None or isinstance(found, Client)


@given(
    st.lists(st.sampled_from(["drm-memory-vram:", "drm-client-id:", "7", "\t", " KiB", "\n", "drm-pdev:", PCI, "-"]))
)
def test_no_heap_of_the_right_words_makes_the_parser_fail(words: list[str]) -> None:
    found = parse_fdinfo("".join(words).encode())
    assert found is None or (found.memory.vram_bytes or 0) >= 0


def descriptor(process: Path, number: int, text: str, target: str | None = "/dev/dri/renderD128") -> Path:
    path = process / "fdinfo" / str(number)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    if target is not None:
        (process / "fd").mkdir(exist_ok=True)
        (process / "fd" / str(number)).symlink_to(target)
    return path


def text_of(number: int, vram_mib: int, pci_id: str = PCI) -> str:
    return f"drm-client-id:\t{number}\ndrm-pdev:\t{pci_id}\ndrm-memory-vram:\t{vram_mib} MiB\ndrm-memory-gtt:\t0\n"


def test_each_client_counts_once_and_only_on_the_card_asked_for(tmp_path: Path) -> None:
    descriptor(tmp_path, 7, text_of(1, 5))
    descriptor(tmp_path, 9, text_of(1, 5))  # a duplicate
    descriptor(tmp_path, 11, text_of(2, 3))
    descriptor(tmp_path, 12, text_of(3, 100, "0000:0a:00.0"))
    memory = memory_of(tmp_path, PCI)
    assert memory is not None
    assert memory.vram_bytes == 8 * MIB


def test_sums_hold_nothing_where_one_part_is_not_told() -> None:
    told, untold = ClientMemory(5, 4, 3), ClientMemory(1, None, None)
    assert told + untold == ClientMemory(6, None, None)
    assert told + NOTHING == told


def test_descriptors_of_other_files_are_not_read(tmp_path: Path) -> None:
    descriptor(tmp_path, 3, text_of(1, 5), target="socket:[4711]")
    descriptor(tmp_path, 4, text_of(2, 1), target=None)  # whose link cannot be read may be a card's
    memory = memory_of(tmp_path, PCI)
    assert memory is not None
    assert memory.vram_bytes == MIB


def test_descriptors_may_vanish_or_be_unreadable_while_they_are_looked_at(tmp_path: Path) -> None:
    descriptor(tmp_path, 3, text_of(1, 5))
    (tmp_path / "fdinfo" / "4").symlink_to("gone")
    (tmp_path / "fdinfo" / "5").mkdir()
    descriptor(tmp_path, 6, "\0\xff" * 5000)
    memory = memory_of(tmp_path, PCI)
    assert memory is not None
    assert memory.vram_bytes == 5 * MIB


def test_a_process_that_is_gone_or_not_ours_is_not_told(tmp_path: Path) -> None:
    assert memory_of(tmp_path / "4711", PCI) is None
    (tmp_path / "fdinfo").write_text("no folder")
    assert memory_of(tmp_path, PCI) is None


def test_a_process_without_the_card_has_nothing_on_it() -> None:
    assert memory_of(Path("/proc") / str(os.getpid()), PCI) == NOTHING
