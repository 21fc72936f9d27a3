"""What `edgekv doctor` says of the CPU kernels."""

from pathlib import Path

import pytest

from edgekv.cli import doctor
from edgekv.kernels.cpu.library import VARIABLE, load_library


def test_kernels_that_load_are_named_with_their_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    library = load_library()
    monkeypatch.setenv(VARIABLE, str(library.path))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    finding = doctor._kernels()
    assert (finding.verdict, finding.subject, finding.found) == ("ok", "cpu kernels", f"{library.tiers[0]}, 3 threads")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert doctor._kernels().found.endswith(", 1 thread")


def test_a_number_of_threads_that_cannot_be_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(load_library().path))
    monkeypatch.setenv("OMP_NUM_THREADS", "5000")
    finding = doctor._kernels()
    assert finding.verdict == "warn"
    assert "OMP_NUM_THREADS=5000 is ignored: it must be a whole number from 1 to 1024" in finding.found
    assert "OMP_NUM_THREADS" in finding.fix


def test_without_kernels_it_says_what_is_lost_and_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "off")
    finding = doctor._kernels()
    assert finding.verdict == "warn"
    assert "several times slower" in finding.found
    assert VARIABLE in finding.fix


def test_nothing_is_compiled_to_have_a_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "auto")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    finding = doctor._kernels()
    assert (finding.verdict, finding.fix) == ("ok", "")
    assert "compiled when first needed" in finding.found
    assert not (tmp_path / "cache").exists()
