"""What `edgekv doctor` says about cards: one clear line for each thing, with a way out where something is amiss."""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgekv.cli import doctor as doctor_module
from edgekv.cli import doctor_cards
from edgekv.cli.app import app
from edgekv.cli.doctor_cards import card_findings
from edgekv.cli.finding import Finding
from edgekv.core.reading import Holder
from edgekv.smi.cards import Card, Link, Survey
from edgekv.smi.torch_build import TorchBuild

GIB = 1 << 30
CPU, CUDA, ROCM = (
    TorchBuild("2.13.0+cpu", None, None),
    TorchBuild("2.13.0+cu130", "13.0", None),
    TorchBuild("2.13.0+rocm7", None, "7.0"),
)
HOLDERS = (Holder(11, "Xorg", GIB // 4), Holder(12, "mystery", None), Holder(13, "game", 4 * GIB))
RADEON = Card(
    "amd", 0, "Radeon RX 7900 XTX", 24 * GIB, 5 * GIB, "Linux 6.12", pci_id="0000:03:00.0", link=Link(4, 16),
    bandwidth_bytes_per_s=960_000_000_000, holders=HOLDERS,
)  # fmt: skip
GEFORCE = Card("nvidia", 0, "NVIDIA GeForce RTX 4090", 24 * GIB, 1 * GIB, "570.86")


@pytest.fixture
def dev(tmp_path: Path) -> Path:
    (tmp_path / "dri").mkdir()
    for name in ("kfd", "dri/renderD128"):
        (tmp_path / name).write_text("")
    return tmp_path


@pytest.fixture(autouse=True)
def _no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said of those has tests of its own."""
    monkeypatch.setattr(doctor_cards, "kernel_findings", lambda survey, build: iter(()))


def findings(survey: Survey, build: TorchBuild | None, dev: Path) -> dict[str, Finding]:
    found = list(card_findings(survey, build, dev))
    assert all("\n" not in finding.found + finding.fix for finding in found)
    assert all(bool(finding.fix) == (finding.verdict != "ok") for finding in found)
    return {finding.subject: finding for finding in found}


def test_a_card_is_told_with_all_that_matters(dev: Path) -> None:
    found = findings(Survey("amd", (RADEON,), library="amdsmi 26.0.0"), ROCM, dev)
    assert found["AMD library"].found == "amdsmi 26.0.0"
    assert found["Radeon RX 7900 XTX"].found == (
        "19.00 GiB free of 24.00 GiB, headroom 1.44 GiB, driver Linux 6.12, PCIe 4.0 x16, 960 GB/s, at 0000:03:00.0"
    )
    assert all(finding.verdict == "ok" for finding in found.values())


def test_who_holds_memory_is_told_biggest_first(dev: Path) -> None:
    found = findings(Survey("amd", (RADEON,)), ROCM, dev)["held by others"].found
    assert found == "game (13) 4.00 GiB, Xorg (11) 256.00 MiB, mystery (12) ?"


@pytest.mark.parametrize(
    ("card", "build", "told", "fix"),
    [
        (RADEON, CUDA, "torch 2.13.0+cu130 is built for NVIDIA's cards", "install torch's ROCm build"),
        (RADEON, CPU, "torch 2.13.0+cpu has no HIP", "install torch's ROCm build"),
        (GEFORCE, CPU, "torch 2.13.0+cpu has no CUDA", "install torch's CUDA build"),
        (GEFORCE, ROCM, "torch 2.13.0+rocm7 has no CUDA", "install torch's CUDA build"),
        (GEFORCE, None, "there is no torch to drive it", "pip install torch"),
    ],
)
def test_a_torch_of_another_make_is_named(card: Card, build: TorchBuild | None, told: str, fix: str, dev: Path) -> None:
    finding = findings(Survey(card.vendor, (card,)), build, dev)[card.name]
    assert (finding.verdict, told in finding.found, fix in finding.fix) == ("warn", True, True)


@pytest.mark.parametrize(
    ("card", "build", "told", "fix"),
    [
        (
            replace(GEFORCE, target="sm_61"),
            replace(CUDA, targets=("sm_75", "sm_86")),
            "sm_61; torch 2.13.0+cu130 has code for sm_75, sm_86 and none for sm_61",
            "CUDA 12.6 is the last with it: pip install 'torch<2.15'",
        ),
        (
            replace(RADEON, target="gfx1103"),
            replace(ROCM, targets=("gfx1030", "gfx1100")),
            "gfx1103, at 0000:03:00.0; torch 2.13.0+rocm7 has code for gfx1030, gfx1100 and none for gfx1103",
            "torch[device-gfx1103]",
        ),
    ],
)
def test_a_torch_without_code_for_the_card_is_named(
    card: Card, build: TorchBuild, told: str, fix: str, dev: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HSA_OVERRIDE_GFX_VERSION", raising=False)
    finding = findings(Survey(card.vendor, (card,)), build, dev)[card.name]
    assert (finding.verdict, told in finding.found, fix in finding.fix) == ("warn", True, True)
    fitting = replace(build, targets=(str(card.target),))
    assert findings(Survey(card.vendor, (card,)), fitting, dev)[card.name].verdict == "ok"
    assert findings(Survey(card.vendor, (card,)), replace(build, targets=()), dev)[card.name].verdict == "ok"


def test_what_amds_runtime_is_told_of_a_card_counts(dev: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HSA_OVERRIDE_GFX_VERSION", "10.3.0")
    card, build = replace(RADEON, target="gfx1031"), replace(ROCM, targets=("gfx1030",))
    assert findings(Survey("amd", (card,)), build, dev)[card.name].verdict == "ok"


def test_a_card_with_less_free_than_its_headroom_is_warned_of(dev: Path) -> None:
    full = Card("nvidia", 0, "RTX", 24 * GIB, 23 * GIB, "570")
    finding = findings(Survey("nvidia", (full,)), CUDA, dev)["RTX"]
    assert (finding.verdict, finding.fix) == ("warn", "close what holds it: less than the headroom is free")


@pytest.mark.parametrize(
    ("survey", "subject", "verdict", "told"),
    [
        (Survey("nvidia", problem="NVML is not installed", absent=True), "NVIDIA cards", "ok", "none: NVML is not"),
        (Survey("nvidia", problem="NVML lacks nvmlX"), "NVIDIA library", "warn", "NVML lacks nvmlX"),
        (Survey("nvidia", library="NVML 12.570"), "NVIDIA cards", "ok", "none (NVML 12.570)"),
        (Survey("amd", problem="version skew: amdsmi_x"), "AMD library", "warn", "version skew: amdsmi_x"),
        (Survey("amd", (RADEON,), "amdsmi: no library", True), "AMD library", "ok", "amdgpu (amdsmi: no library)"),
        (Survey("amd", (RADEON,), "amdsmi does not fit"), "AMD library", "warn", "amdsmi does not fit"),
    ],
)
def test_a_library_that_cannot_be_asked_is_one_line(
    survey: Survey, subject: str, verdict: str, told: str, dev: Path
) -> None:
    finding = findings(survey, ROCM, dev)[subject]
    assert (finding.verdict, told in finding.found) == (verdict, True)


def closed(path: Path) -> None:
    path.chmod(0o000)


@pytest.mark.skipif(os.name != "posix" or sys.platform != "linux", reason="device nodes are Linux's")
@pytest.mark.parametrize(
    ("change", "verdict", "told"),
    [
        (lambda dev: None, "ok", "kfd and 1 render nodes can be used"),
        (lambda dev: (dev / "kfd").unlink(), "warn", "kfd is not there"),
        (lambda dev: closed(dev / "kfd"), "warn", "kfd: no permission to read and write"),
        (lambda dev: closed(dev / "dri/renderD128"), "warn", "renderD128: no permission to read and write"),
    ],
)
def test_amds_compute_devices_must_be_open_to_this_user(
    change: Callable[[Path], None], verdict: str, told: str, dev: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(dev)
    # Root may open anything; a person's access is what the mode says.
    monkeypatch.setattr(os, "access", lambda node, mode: bool(Path(node).stat().st_mode & 0o600))
    finding = findings(Survey("amd", (RADEON,)), ROCM, dev)["AMD compute"]
    assert (finding.verdict, told in finding.found) == (verdict, True)
    if "permission" in told:
        assert "usermod -aG render,video $USER" in finding.fix


def test_without_amds_hardware_nothing_is_said_of_compute(tmp_path: Path) -> None:
    assert "AMD compute" not in findings(Survey("amd", problem="no library", absent=True), ROCM, tmp_path)


@pytest.mark.parametrize(
    ("total", "used", "verdict", "told"),
    [(0, 0, "ok", "none"), (8 * GIB, GIB, "ok", "1.00 GiB used of 8.00 GiB"), (8 * GIB, 5 * GIB, "warn", "5.00 GiB")],
)
def test_swap_is_told_and_warned_of_where_it_is_full(total: int, used: int, verdict: str, told: str) -> None:
    finding = doctor_module._swap(total, used)
    assert (finding.verdict, told in finding.found) == (verdict, True)


def test_record_writes_a_recording_instead(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    result = CliRunner().invoke(app, ["doctor", "--record", str(file), "--seconds", "0.3"])
    assert result.exit_code == 0, result.output
    assert file.is_file()
    assert "demo model" not in result.stdout
