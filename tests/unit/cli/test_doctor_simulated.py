"""`edgekv doctor` and `edgekv plan` over the real bindings, with simulated driver libraries of every kind of health."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgekv.smi.torch_build import read_torch_build
from tests.sim.build import LibraryBuild
from tests.sim.card import GIB, CardState, SimulatedCard, Vendor

ROOT = Path(__file__).parents[3]
PROGRAMS = ((4711, "/usr/bin/game", 8 * GIB), (4712, "/usr/lib/Xorg", GIB // 2))


SCRIPT = """
import json
from dataclasses import asdict
from edgekv.cli.doctor import examine
from edgekv.smi.device import choose_place
print(json.dumps([[asdict(finding) for finding in examine()], choose_place("auto", {}).kind]))
"""


def told(card: SimulatedCard, build: LibraryBuild) -> dict[str, dict[str, str]]:
    """The findings by subject. Where the installed torch drives no card, the model would go to the CPU."""
    environment = {**os.environ, **card.environment(build), "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=60
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    findings, kind = json.loads(ended.stdout)
    torch = read_torch_build()
    assert kind == "cpu" or (torch is not None and (torch.cuda or torch.hip))
    assert all("\n" not in finding["found"] for finding in findings)
    return {finding["subject"]: finding for finding in findings}


def test_a_geforce_is_seen_with_who_is_on_it(tmp_path: Path) -> None:
    state = CardState("nvidia", name="NVIDIA GeForce RTX 4090", total_bytes=24 * GIB, others=PROGRAMS)
    found = told(SimulatedCard(tmp_path / "card", state), "good")
    assert found["NVIDIA library"]["found"].startswith("NVML ")
    assert found["NVIDIA GeForce RTX 4090"]["found"].startswith("15.50 GiB free of 24.00 GiB, headroom 1.44 GiB")
    assert found["held by others"]["found"] == "game (4711) 8.00 GiB, Xorg (4712) 512.00 MiB"


def test_a_radeon_is_seen(tmp_path: Path) -> None:
    state = CardState("amd", name="Radeon RX 7900 XTX", total_bytes=24 * GIB, others=PROGRAMS)
    found = told(SimulatedCard(tmp_path / "card", state), "good")
    assert found["AMD library"]["found"].startswith("amdsmi ")
    assert found["Radeon RX 7900 XTX"]["found"].startswith("15.50 GiB free of 24.00 GiB, headroom 1.44 GiB")


@pytest.mark.parametrize(
    ("vendor", "build", "changes", "words"),
    [
        ("nvidia", "none", {}, "NVML is not installed"),
        ("nvidia", "skew", {}, "NVML is older than the pynvml module"),
        ("nvidia", "good", {"init_fails": True}, "NVML: NVIDIA's kernel driver is not loaded"),
        ("nvidia", "good", {"gone": True}, "NVML: GPU is lost"),
        ("amd", "none", {}, "amdsmi finds no library"),
        ("amd", "skew", {}, "amdsmi does not fit the installed ROCm library"),
        ("amd", "good", {"init_fails": True}, "amdsmi does not start: "),
        ("amd", "good", {"gone": True}, "amdsmi: "),
    ],
)
def test_a_library_that_is_not_well_is_one_line_and_the_cpu_serves(
    vendor: Vendor, build: LibraryBuild, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    card = SimulatedCard(tmp_path / "card", CardState(vendor, total_bytes=24 * GIB))
    card.set(**changes)
    maker = "NVIDIA" if vendor == "nvidia" else "AMD"
    lines = [finding["found"] for subject, finding in told(card, build).items() if subject.startswith(maker)]
    assert len(lines) == 1
    assert words in lines[0]
