"""What `edgekv doctor` says of a card's compiler, its driver and the kernels' cache, with libraries that are fakes."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from edgekv.cli import doctor_gpu_kernels
from edgekv.cli.doctor_cards import card_findings
from edgekv.cli.doctor_gpu_kernels import kernel_findings
from edgekv.cli.finding import Finding
from edgekv.kernels.rt import libraries
from edgekv.smi.cards import Card, Survey
from edgekv.smi.torch_build import TorchBuild
from tests.kernels.rt.fakes import install

GIB = 1 << 30
GEFORCE = Card("nvidia", 0, "RTX 4090", 24 * GIB, 0, "570", target="sm_89")
RADEON = Card("amd", 0, "RX 7900 XTX", 24 * GIB, 0, "6.12", target="gfx1100")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch's libraries, beside which this machine has none but perhaps a driver of its own."""
    monkeypatch.setattr(libraries, "_SYSTEM", ())
    monkeypatch.setattr(libraries, "_LOADED", tmp_path / "nothing")
    monkeypatch.setattr(libraries, "_wheel_folders", lambda: ())
    monkeypatch.setattr(doctor_gpu_kernels, "PREBUILT", tmp_path / "prebuilt")
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    monkeypatch.delenv("FAKE_FAIL", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "lib").mkdir()
    return tmp_path / "lib"


def found(card: Card, folder: Path, cuda: str | None = "12.8") -> dict[str, Finding]:
    hip = None if card.vendor == "nvidia" else "7.2"
    build = TorchBuild("2.13.0", cuda if hip is None else None, hip, libraries=folder)
    findings = list(kernel_findings(Survey(card.vendor, (card,)), build))
    assert all("\n" not in finding.found + finding.fix for finding in findings)
    assert all(bool(finding.fix) == (finding.verdict != "ok") for finding in findings)
    return {finding.subject: finding for finding in findings}


def test_what_an_amd_card_has(folder: Path, tmp_path: Path) -> None:
    install("hiprtc", folder)
    driver = install("hip", folder)
    told = {subject: (finding.verdict, finding.found) for subject, finding in found(RADEON, folder).items()}
    assert told == {
        "HIPRTC": ("ok", "9.0"),
        "HIP runtime": ("ok", f"7.2, {driver}"),
        "GPU kernels": ("ok", f"compiled when first needed, kept in {tmp_path}/cache/edgekv/gpu"),
    }
    assert not (tmp_path / "cache").exists(), "nothing is made to have a look"


def test_a_compiler_that_is_missing(folder: Path, tmp_path: Path) -> None:
    install("hip", folder)
    missing = found(RADEON, folder)["HIPRTC"]
    assert (missing.verdict, missing.found) == (
        "warn",
        "there is no HIPRTC; models run several times slower, through torch",
    )
    assert "install torch again, from its index for ROCm" in missing.fix
    (tmp_path / "prebuilt/gfx11-generic").mkdir(parents=True)
    told = found(RADEON, folder)["HIPRTC"]
    assert (told.verdict, told.found) == ("ok", "there is no HIPRTC; the kernels that came with edgekv are used")


def test_a_compiler_that_does_not_know_the_card(folder: Path) -> None:
    install("nvrtc", folder)
    assert found(GEFORCE, folder)["NVRTC"].found == "12.8"
    unknown = found(replace(GEFORCE, target="sm_110"), folder)["NVRTC"]
    assert (unknown.verdict, unknown.found) == (
        "warn",
        "12.8 does not compile for sm_110; models run several times slower, through torch",
    )


def test_a_card_that_is_too_old_for_the_kernels_is_one_line(folder: Path) -> None:
    assert [finding.found for finding in found(replace(GEFORCE, target="sm_61"), folder).values()] == [
        "none for sm_61, only from sm_75 and gfx1030 on; models run several times slower, through torch"
    ]


def test_a_driver_that_is_missing_or_does_not_answer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = found(RADEON, folder)["HIP runtime"]
    assert (missing.verdict, missing.found) == ("warn", "there is no HIP runtime")
    install("hip", folder)
    monkeypatch.setenv("FAKE_FAIL", "hipRuntimeGetVersion:100:0")
    silent = found(RADEON, folder)["HIP runtime"]
    assert silent.verdict == "warn"
    assert "HIP runtime does not load" in silent.found


@pytest.mark.parametrize(
    ("cuda", "verdict", "told"),
    [("12.9", "ok", "CUDA 12.8"), ("13.0", "warn", "it speaks CUDA 12.8, and torch was built with 13.0")],
)
def test_a_driver_that_is_too_old_for_torch(cuda: str, verdict: str, told: str, folder: Path) -> None:
    """In a process of its own, that finds the fake under the name of NVIDIA's."""
    install("cuda", folder)
    script = f"""
from pathlib import Path
from edgekv.cli.doctor_gpu_kernels import _driver
from edgekv.smi.torch_build import TorchBuild
finding = _driver("cuda", (), TorchBuild("2.13.0", {cuda!r}, None))
print(finding.verdict, finding.found, finding.fix, sep="|")
"""
    environment = {"LD_LIBRARY_PATH": str(folder), "PATH": ""}
    ended = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=Path(__file__).parents[3], capture_output=True, text=True
    )
    assert ended.stdout.strip() == f"{verdict}|{told}|" + (
        "update NVIDIA's driver, or install a torch for CUDA 12" if verdict == "warn" else ""
    ), ended.stderr


def test_a_cache_that_others_may_write_to(folder: Path, tmp_path: Path) -> None:
    install("hiprtc", folder)
    cache = tmp_path / "cache/edgekv/gpu"
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    finding = found(RADEON, folder)["GPU kernels"]
    assert (finding.verdict, finding.fix) == ("warn", "set XDG_CACHE_HOME to a folder that is yours alone")
    assert finding.found == f"made anew at every start: others may write to {cache}"


def test_nothing_is_said_of_kernels_for_cards_that_torch_does_not_drive(folder: Path, tmp_path: Path) -> None:
    cpu = TorchBuild("2.13.0+cpu", None, None)
    subjects = [finding.subject for finding in card_findings(Survey("nvidia", (GEFORCE,)), cpu, tmp_path)]
    assert subjects == ["NVIDIA library", "RTX 4090"]


def test_torch_is_not_imported_to_have_a_look() -> None:
    script = "import sys, edgekv.cli.doctor_cards; print('torch' in sys.modules)"
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[3], capture_output=True, text=True, check=True
    )
    assert ended.stdout.strip() == "False"
