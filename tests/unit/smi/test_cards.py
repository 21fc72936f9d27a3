"""The bindings in the ways in which they fail before they reach a driver, and the torch that is installed."""

import sys
from importlib import metadata
from pathlib import Path

import pytest

from edgekv.smi.cards import Link, survey, survey_amd, survey_nvidia
from edgekv.smi.torch_build import read_torch_build


def fail_import(monkeypatch: pytest.MonkeyPatch, name: str, error: Exception) -> None:
    class Finder:
        def find_spec(self, asked: str, path: object, target: object = None) -> None:
            if asked == name:
                print("what its import prints")
                raise error

    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])


@pytest.mark.parametrize("error", [KeyError("libamd_smi.so"), ImportError("no"), OSError("gone")])
def test_amdsmi_without_its_library_is_no_card_and_no_fault(
    monkeypatch: pytest.MonkeyPatch, error: Exception, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    fail_import(monkeypatch, "amdsmi", error)
    found = survey_amd(tmp_path, tmp_path)
    assert (found.cards, found.absent) == ((), True)
    assert str(found.problem).startswith("amdsmi finds no library: ")
    assert capsys.readouterr().out == ""


def test_amdsmi_of_another_version_is_told_of_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fail_import(monkeypatch, "amdsmi", AttributeError("undefined symbol:\n  amdsmi_x"))
    found = survey_amd(tmp_path, tmp_path)
    assert found.problem == "amdsmi does not fit the installed ROCm library: undefined symbol: amdsmi_x"


def test_a_broken_pynvml_is_no_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fail_import(monkeypatch, "pynvml", SyntaxError("torn"))
    found = survey_nvidia(tmp_path, tmp_path)
    assert (found.cards, found.absent) == ((), True)
    assert "torn" in str(found.problem)


def test_this_machine_can_be_surveyed() -> None:
    for found in survey():
        assert found.cards or found.problem is not None


def test_a_link_is_written_as_people_write_it() -> None:
    assert str(Link(4, 16)) == "PCIe 4.0 x16"


def test_the_installed_torch_is_read_without_importing_it() -> None:
    build = read_torch_build()
    assert build is not None
    assert build.version == metadata.version("torch")
