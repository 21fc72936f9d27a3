"""Asking the cards' libraries, in all the ways in which these fail."""

import sys
from importlib import metadata
from types import SimpleNamespace

import pytest

from edgekv.errors import ConfigError
from edgekv.smi import device
from edgekv.smi.cards import Card, Survey, survey_amd, survey_nvidia
from edgekv.smi.device import choose_place
from edgekv.smi.host import read_memory, read_processor
from edgekv.smi.torch_build import TorchBuild, read_torch_build


def fail_import(monkeypatch: pytest.MonkeyPatch, name: str, error: Exception) -> None:
    class Finder:
        def find_spec(self, asked: str, path: object, target: object = None) -> None:
            if asked == name:
                raise error

    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])


@pytest.mark.parametrize("error", [KeyError("libamd_smi.so"), ImportError("no"), OSError("gone")])
def test_amdsmi_without_its_library_is_no_card_and_no_fault(
    monkeypatch: pytest.MonkeyPatch, error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_import(monkeypatch, "amdsmi", error)
    survey = survey_amd()
    assert (survey.cards, survey.absent) == ((), True)
    assert capsys.readouterr().out == ""


def test_amdsmi_of_another_version_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_import(monkeypatch, "amdsmi", AttributeError("undefined symbol"))
    assert not survey_amd().absent
    assert "does not fit" in str(survey_amd().problem)


def test_amd_cards_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fake = SimpleNamespace(
        amdsmi_init=lambda: calls.append("init"),
        amdsmi_shut_down=lambda: calls.append("shut down"),
        amdsmi_get_processor_handles=lambda: ["h"],
        amdsmi_get_gpu_asic_info=lambda handle: {"market_name": "Radeon RX 7900 XTX"},
        amdsmi_get_gpu_vram_usage=lambda handle: {"vram_total": 24560, "vram_used": 560},
        amdsmi_get_gpu_driver_info=lambda handle: {"driver_version": "6.12"},
    )
    monkeypatch.setitem(sys.modules, "amdsmi", fake)
    assert survey_amd().cards == (Card("amd", 0, "Radeon RX 7900 XTX", 24560 << 20, 560 << 20, "6.12"),)
    assert calls == ["init", "shut down"]


def test_nvidia_cards_are_read_with_what_the_driver_reserves(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlSystemGetDriverVersion", lambda: b"580.1")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 1)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetName", lambda handle: "NVIDIA RTX 4090")
    memory = SimpleNamespace(total=24 << 30, used=1 << 30, reserved=1 << 28)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda handle, version: memory)
    [card] = survey_nvidia().cards
    assert (card.name, card.free_bytes, card.driver) == ("NVIDIA RTX 4090", (24 << 30) - (1 << 30) - (1 << 28), "580.1")


@pytest.mark.parametrize(("name", "absent"), [("NVMLError_LibraryNotFound", True), ("NVMLError_Unknown", False)])
def test_nvml_that_does_not_start(monkeypatch: pytest.MonkeyPatch, name: str, absent: bool) -> None:
    import pynvml

    def fail() -> None:
        raise getattr(pynvml, name)()

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    survey = survey_nvidia()
    assert (survey.cards, survey.absent) == ((), absent)
    assert survey.problem


XTX = Card("amd", 0, "Radeon RX 7900 XTX", 24 << 30, 1 << 30, "6.12")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(device, "survey_nvidia", lambda: Survey("nvidia"))
    monkeypatch.setattr(device, "survey_amd", lambda: Survey("amd", (XTX,)))
    monkeypatch.setattr(device, "read_torch_build", lambda: TorchBuild("2.13.0+rocm7", None, "7.0"))
    return monkeypatch


def test_auto_is_the_first_card_that_torch_can_drive(machine: pytest.MonkeyPatch) -> None:
    place = choose_place("auto", {})
    assert (place.kind, place.torch_name, place.free_bytes) == ("card", "cuda:0", 23 << 30)


def test_auto_without_a_usable_card_is_the_cpu_and_says_why(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(device, "read_torch_build", lambda: TorchBuild("2.13.0+cpu", None, None))
    place = choose_place("auto", {})
    assert (place.kind, place.torch_name) == ("cpu", "cpu")
    assert place.note == "Radeon RX 7900 XTX is idle: the installed torch (2.13.0+cpu) is a CPU build"


def test_a_named_card_must_be_there(machine: pytest.MonkeyPatch) -> None:
    def wanted(name: str, vendor: str = "amd", index: int | None = None) -> dict[str, SimpleNamespace]:
        return {"mine": SimpleNamespace(vendor=vendor, name=name, index=index)}

    assert choose_place("mine", wanted("7900 xtx")).title == "Radeon RX 7900 XTX"  # type: ignore[arg-type]
    assert choose_place("mine", wanted("any", "cpu")).kind == "cpu"  # type: ignore[arg-type]
    for devices in (wanted("W7900"), wanted("7900", index=1), wanted("RTX", "nvidia")):
        with pytest.raises(ConfigError, match=r"devices\.mine: no such card here"):
            choose_place("mine", devices)  # type: ignore[arg-type]
    machine.setattr(device, "read_torch_build", lambda: TorchBuild("2.13.0+cpu", None, None))
    with pytest.raises(ConfigError, match="was not built for this card"):
        choose_place("mine", wanted("7900"))  # type: ignore[arg-type]


def test_the_installed_torch_is_read_without_importing_it() -> None:
    build = read_torch_build()
    assert build is not None
    assert build.version == metadata.version("torch")


def test_the_host_has_memory_and_cores() -> None:
    memory = read_memory()
    assert 0 < memory.available_bytes <= memory.total_bytes
    assert read_processor().cores >= 1


def test_a_control_groups_limit_is_the_memory(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    from edgekv.smi.host import _group_limit

    (tmp_path / "memory.max").write_text("4294967296\n")
    (tmp_path / "memory.current").write_text("3000000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 1000000\n")
    assert _group_limit(tmp_path) == (4 << 30, 2_000_000)
    (tmp_path / "memory.max").write_text("max\n")
    assert _group_limit(tmp_path) == (None, 0)
    assert _group_limit(tmp_path / "none") == (None, 0)
