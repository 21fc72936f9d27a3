"""Where there is no card, what measures and tests one is run on fibers, so that it does not rot."""

import io
import json
import os
import re
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from bench.gpu.__main__ import RESULTS, main, plan
from bench.gpu.bench import Bench
from bench.gpu.rig import HostRig
from bench.gpu.sizes import ON_HOST

ROOT = Path(__file__).parents[3]
NO_FIGURES = re.compile(r"(\s+-){4}(\s+[<>]= [^-]+)?\s+ran$")  # median, p10, rate and share
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """What was printed and what was written."""
    file, printed = tmp_path_factory.mktemp("bench") / "found.json", io.StringIO()
    with redirect_stdout(printed):
        assert main(["--on-host", "--limit", "300", "--json", str(file)]) == 0
    return printed.getvalue(), json.loads(file.read_text())


def test_every_measurement_comes_to_its_rows(ran: tuple[str, dict[str, Any]]) -> None:
    found = {section["section"]: section["rows"] for section in ran[1]["sections"]}
    planned = plan(Bench(HostRig(), ON_HOST, 0.0))
    assert list(found) == list(planned)
    assert all(len(rows) >= len(planned[title]) for title, rows in found.items())
    missing = {row["name"]: row["reason"] for rows in found.values() for row in rows if "reason" in row}
    assert missing == {
        "2 x 40, FlashInfer": "needs a card",
        "tiny, q4_K, transformers": "transformers reads GGUF's formats by making them plain numbers",
    }


def test_no_figure_is_told_of_fibers(ran: tuple[str, dict[str, Any]]) -> None:
    printed, document = ran
    assert not document["has_times"]
    assert not any({"median_s", "share", "rate"} & row.keys() for each in document["sections"] for row in each["rows"])
    rows = [line for line in printed.splitlines() if line.endswith(" ran")]
    assert len(rows) > 80
    assert [line for line in rows if not NO_FIGURES.search(line)] == []


def test_nothing_is_written_down_of_fibers(capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(RESULTS.iterdir())
    with pytest.raises(SystemExit):
        main(["--on-host", "--out"])
    assert "nothing that could be written down" in capsys.readouterr().err
    assert sorted(RESULTS.iterdir()) == before


def test_the_tests_of_a_card_run_on_fibers() -> None:
    """The first case of each, as `make test-gpu` starts them: without the project's plugins and settings."""
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-c", "tests/gpu/alone.ini", "--rootdir", ".", "--confcutdir", "tests/gpu",
            "-q", "-p", "no:cacheprovider", "tests/gpu",
        ],
        env={**os.environ, "EDGEKV_GPU_TESTS": "host-once", "PYTEST_ADDOPTS": "", "PYTEST_XDIST_WORKER": ""},
        cwd=ROOT, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    skipped = re.findall(r"^SKIPPED \[\d+\] \S+ (.*)$", done.stdout, re.MULTILINE)
    assert set(skipped) == {"main memory is no card's"}
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) >= 25
