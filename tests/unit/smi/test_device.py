"""Which device a model goes to, what it is called by torch, and how much of it is free."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from edgekv.config.units import Share
from edgekv.core.reading import Reading
from edgekv.errors import ConfigError
from edgekv.smi import device
from edgekv.smi.cards import Card, Survey
from edgekv.smi.device import Match, Place, Watched, choose_place, refreshed
from edgekv.smi.device_order import Numbered, TorchNumber, settle_order, torch_number
from edgekv.smi.reader import Reader, ReadingFailed, Source
from edgekv.smi.torch_build import TorchBuild
from tests.sim import CardState, SimulatedCard

GIB = 1 << 30
ROCM = TorchBuild("2.13.0+rocm7", None, "7.0")
CUDA = TorchBuild("2.13.0+cu130", "13.0", None)
CPU = TorchBuild("2.13.0+cpu", None, None)

XTX = Card("amd", 0, "Radeon RX 7900 XTX", 24 * GIB, GIB, "6.12", pci_id="0000:03:00.0", uuid="GPU-43f2a9c30c1c9e01")
APU = Card("amd", 0, "Radeon 8060S", 64 * GIB, 0, "6.12", pci_id="0000:c3:00.0", unified=True)
SMALL = Card("nvidia", 0, "NVIDIA RTX 3060", 12 * GIB, 0, "580", pci_id="0000:01:00.0", uuid="GPU-aaaa-1")
LARGE = Card("nvidia", 1, "NVIDIA RTX 4090", 24 * GIB, 0, "580", pci_id="0000:41:00.0", uuid="GPU-bbbb-2")


@dataclass(frozen=True)
class Means:
    """The `match` of one of the configuration's devices."""

    vendor: str
    name: str | None = None
    index: int | None = None


@dataclass(frozen=True)
class Says:
    """One of the configuration's devices."""

    match: Match
    desktop_reserve_bytes: int | None = None
    vram_budget: int | Share | None = None


def says(vendor: str, name: str | None = None, index: int | None = None, **more: object) -> Says:
    return Says(Means(vendor, name, index), **more)  # type: ignore[arg-type]


@pytest.fixture
def has(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Say what torch and which cards the machine has."""

    def set_up(build: TorchBuild | None, *cards: Card) -> None:
        for vendor in ("nvidia", "amd"):
            its = tuple(card for card in cards if card.vendor == vendor)
            monkeypatch.setattr(device, f"survey_{vendor}", lambda v=vendor, c=its: Survey(v, c))
        monkeypatch.setattr(device, "read_torch_build", lambda: build)

    return set_up


def test_auto_is_the_first_card_that_torch_can_drive(has) -> None:  # type: ignore[no-untyped-def]
    has(ROCM, SMALL, XTX)
    place = choose_place("auto", {}, {})
    assert (place.kind, place.torch_name, place.title) == ("card", "cuda:0", "Radeon RX 7900 XTX")
    assert (place.free_bytes, place.total_bytes) == (23 * GIB, 24 * GIB)
    assert place.watched == Watched("amd", "0000:03:00.0")
    assert (place.reserve_bytes, place.most_bytes) == (None, None)


def test_auto_takes_an_apu_only_where_there_is_no_card(has) -> None:  # type: ignore[no-untyped-def]
    has(ROCM, APU, replace(XTX, index=1))
    place = choose_place("auto", {}, {})
    assert (place.title, place.torch_name) == ("Radeon RX 7900 XTX", "cuda:1")
    has(ROCM, APU)
    assert choose_place("auto", {}, {}).title == "Radeon 8060S"


def test_auto_without_a_usable_card_is_the_cpu_and_says_why(has) -> None:  # type: ignore[no-untyped-def]
    has(CPU, XTX)
    place = choose_place("auto", {}, {})
    assert (place.kind, place.torch_name, place.watched) == ("cpu", "cpu", Watched("cpu"))
    assert place.note == "Radeon RX 7900 XTX is idle: the installed torch (2.13.0+cpu) is a CPU build"
    assert 0 < place.free_bytes < place.total_bytes
    has(None)
    assert choose_place("auto", {}, {}).note == ""


def test_a_card_that_torch_has_no_code_for_is_not_taken(has) -> None:  # type: ignore[no-untyped-def]
    old = replace(SMALL, name="NVIDIA GTX 1080", target="sm_61")
    build = replace(CUDA, targets=("sm_75", "sm_86", "compute_120"))
    has(build, old)
    place = choose_place("auto", {}, {})
    idle = "NVIDIA GTX 1080 is idle: the installed torch (2.13.0+cu130) has no code for it (edgekv doctor)"
    assert (place.kind, place.note) == ("cpu", idle)
    with pytest.raises(ConfigError) as refused:
        choose_place("mine", {"mine": says("nvidia")}, {})
    assert str(refused.value) == (
        "error: devices.mine: the installed torch has code for sm_75, sm_86, compute_120 and none for sm_61; CUDA 12.6 "
        "is the last with it: pip install 'torch<2.15' --index-url https://download.pytorch.org/whl/cu126"
    )
    # The number is still among all cards.
    has(build, old, replace(LARGE, target="sm_89"))
    place = choose_place("auto", {}, {})
    assert (place.title, place.torch_name, place.target) == ("NVIDIA RTX 4090", "cuda:1", "sm_89")
    has(CUDA, old)  # a build that does not say what it is for
    assert choose_place("auto", {}, {}).title == "NVIDIA GTX 1080"


def test_amds_runtime_may_be_told_that_a_card_is_another(has) -> None:  # type: ignore[no-untyped-def]
    has(replace(ROCM, targets=("gfx1030", "gfx1100")), replace(XTX, name="Radeon RX 6700 XT", target="gfx1031"))
    assert choose_place("auto", {}, {}).kind == "cpu"
    told = choose_place("auto", {}, {"HSA_OVERRIDE_GFX_VERSION": "10.3.0"})
    assert (told.title, told.target) == ("Radeon RX 6700 XT", "gfx1030")


def test_a_card_that_the_environment_hides_is_not_taken(has) -> None:  # type: ignore[no-untyped-def]
    has(CUDA, SMALL)
    place = choose_place("auto", {}, {"CUDA_VISIBLE_DEVICES": ""})
    assert (place.kind, place.note) == ("cpu", "NVIDIA RTX 3060 is idle: the environment hides it from torch")
    with pytest.raises(ConfigError, match=r"devices\.mine: the environment hides this card"):
        choose_place("mine", {"mine": says("nvidia")}, {"CUDA_VISIBLE_DEVICES": ""})


def test_a_named_card_must_be_there(has) -> None:  # type: ignore[no-untyped-def]
    has(ROCM, XTX)
    assert choose_place("mine", {"mine": says("amd", "7900 xtx")}, {}).title == "Radeon RX 7900 XTX"
    assert choose_place("mine", {"mine": says("cpu", "any")}, {}).kind == "cpu"
    for wanted in (says("amd", "W7900"), says("amd", "7900", index=1), says("nvidia", "RTX")):
        with pytest.raises(ConfigError, match=r"devices\.mine: no such card here"):
            choose_place("mine", {"mine": wanted}, {})
    has(CPU, XTX)
    with pytest.raises(ConfigError, match="was not built for this card"):
        choose_place("mine", {"mine": says("amd", "7900")}, {})


def test_a_device_sets_its_reserve_and_its_budget(has) -> None:  # type: ignore[no-untyped-def]
    has(ROCM, XTX)
    devices = {
        "other": says("amd", "W7900", desktop_reserve_bytes=1),
        "mine": says("amd", "7900", desktop_reserve_bytes=3 * GIB, vram_budget=10 * GIB),
        "again": says("amd", vram_budget=Share(0.5)),
        "host": says("cpu", desktop_reserve_bytes=2 * GIB, vram_budget=Share(0.25)),
    }
    for name in ("auto", "mine"):
        place = choose_place(name, devices, {})
        assert (place.reserve_bytes, place.most_bytes) == (3 * GIB, 10 * GIB)
    place = choose_place("again", devices, {})
    assert (place.reserve_bytes, place.most_bytes) == (None, 12 * GIB)
    for name in ("cpu", "host"):
        place = choose_place(name, devices, {})
        assert (place.reserve_bytes, place.most_bytes) == (2 * GIB, place.total_bytes // 4)
    has(CPU)
    assert choose_place("auto", devices, {}).reserve_bytes == 2 * GIB


def test_cards_that_differ_are_counted_by_their_address(has) -> None:  # type: ignore[no-untyped-def]
    has(CUDA, SMALL, LARGE)
    environ: dict[str, str] = {}
    place = choose_place("big", {"big": says("nvidia", "4090")}, environ)
    assert (place.torch_name, place.note) == ("cuda:1", "")
    assert environ == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def numbered(*cards: Card) -> list[Numbered]:
    return [Numbered(card.pci_id or "", card.name, card.uuid) for card in cards]


@pytest.mark.parametrize(
    ("environ", "number"),
    [
        ({}, 1),
        ({"CUDA_VISIBLE_DEVICES": "1"}, 0),
        ({"CUDA_VISIBLE_DEVICES": "1,0"}, 0),
        ({"CUDA_VISIBLE_DEVICES": " 0 , 1 "}, 1),
        ({"CUDA_VISIBLE_DEVICES": "0"}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,7,1"}, None),  # what follows a number that is no card's counts for nothing
        ({"CUDA_VISIBLE_DEVICES": "0,-1,1"}, None),
        ({"CUDA_VISIBLE_DEVICES": "GPU-bbbb"}, 0),
        ({"CUDA_VISIBLE_DEVICES": "GPU-"}, None),  # the beginning of both
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, None),
        ({"HIP_VISIBLE_DEVICES": "0"}, 1),
    ],
)
def test_the_environment_says_which_cards_cuda_counts(environ: dict[str, str], number: int | None) -> None:
    found = torch_number(
        "nvidia", numbered(SMALL, LARGE), LARGE.pci_id or "", {**environ, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    )
    assert found == (None if number is None else TorchNumber(number))


@pytest.mark.parametrize(
    ("environ", "number"),
    [
        ({}, 1),
        ({"HIP_VISIBLE_DEVICES": "1"}, 0),
        ({"CUDA_VISIBLE_DEVICES": "1"}, 0),
        ({"HIP_VISIBLE_DEVICES": "0,1", "CUDA_VISIBLE_DEVICES": "1"}, 1),
        ({"ROCR_VISIBLE_DEVICES": "1", "HIP_VISIBLE_DEVICES": "0"}, 0),
        ({"ROCR_VISIBLE_DEVICES": "GPU-43f2a9c30c1c9e01"}, 0),
        ({"ROCR_VISIBLE_DEVICES": "0"}, None),
    ],
)
def test_the_environment_says_which_cards_hip_counts(environ: dict[str, str], number: int | None) -> None:
    found = torch_number("amd", numbered(APU, XTX), XTX.pci_id or "", environ)
    assert found == (None if number is None else TorchNumber(number))


def test_the_order_of_cards_that_differ_is_doubtful_until_it_is_by_address() -> None:
    cards = numbered(SMALL, LARGE)
    found = torch_number("nvidia", cards, SMALL.pci_id or "", {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"})
    assert found is not None
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in found.doubt
    same = torch_number("nvidia", numbered(SMALL, SMALL), SMALL.pci_id or "", {})
    assert same == TorchNumber(0)


@pytest.mark.parametrize(
    ("environ", "settled"),
    [
        ({}, True),
        ({"CUDA_VISIBLE_DEVICES": "GPU-bbbb"}, True),
        ({"CUDA_VISIBLE_DEVICES": "1,GPU-aaaa"}, False),  # meant in CUDA's own order
        ({"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}, False),
    ],
)
def test_the_order_is_settled_only_where_nobody_has_said_anything(environ: dict[str, str], settled: bool) -> None:
    after = dict(environ)
    settle_order("nvidia", numbered(SMALL, LARGE), after)
    assert after == ({**environ, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"} if settled else environ)
    for vendor, cards in (("nvidia", (SMALL, SMALL)), ("amd", (XTX, APU))):
        after = dict(environ)
        settle_order(vendor, numbered(*cards), after)
        assert after == environ


class Shows:
    """A source that shows one reading."""

    def __init__(self, reading: Reading | None) -> None:
        self.reading, self.closed = reading, False

    def read(self, at: float) -> Reading:
        if self.reading is None:
            raise ReadingFailed("lost")
        return self.reading

    def close(self) -> None:
        self.closed = True


def no_library() -> Reader:
    raise ReadingFailed("none")


PLACE = Place("card", "cuda:0", "a card", 20 * GIB, total_bytes=24 * GIB, watched=Watched("nvidia", "0000:01:00.0"))


def test_a_refreshed_place_has_what_is_free_now_by_the_first_source_that_answers() -> None:
    lost, good = Shows(None), Shows(Reading(24 * GIB, 9 * GIB, None, "x", 0.0))
    sources = [Source("a", no_library), Source("b", lambda: lost), Source("c", lambda: good)]
    assert refreshed(PLACE, sources) == replace(PLACE, free_bytes=15 * GIB)
    assert (lost.closed, good.closed) == (True, True)


def test_files_are_read_before_a_library_is_opened_a_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    files, library = (Shows(Reading(24 * GIB, num, None, "x", 0.0)) for num in (9 * GIB, 0))
    sources = (Source("amdsmi", lambda: library), Source("sysfs", lambda: files))
    monkeypatch.setattr(device, "sources_for", lambda watched: sources if watched == PLACE.watched else ())
    assert refreshed(PLACE).free_bytes == 15 * GIB
    assert not library.closed


def test_a_place_that_cannot_be_read_stays_as_it_was() -> None:
    assert refreshed(PLACE, [Source("a", no_library)]) == PLACE
    imagined = Place("card", "cuda:0", "a card", 16 * GIB)
    assert refreshed(imagined) == imagined


def test_main_memory_is_refreshed_from_where_it_is_watched(tmp_path: Path) -> None:
    before = Place("cpu", "cpu", "CPU", free_bytes=1, note="n", reserve_bytes=5)
    now = refreshed(before)
    assert (now.note, now.reserve_bytes) == ("n", 5)
    assert GIB // 64 < now.free_bytes < now.total_bytes
    machine = SimulatedCard(tmp_path / "machine", CardState("cpu", total_bytes=8 * GIB, own_bytes=GIB))
    from edgekv.smi.sources import sources_for

    sources = sources_for(Watched("cpu"), sysfs=machine.sysfs, proc=machine.proc)
    assert refreshed(before, sources).free_bytes == 8 * GIB, "what is our own is not others'"
