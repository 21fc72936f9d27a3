"""`edgekv check`: what could never be served is told with file, line and field."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgekv.cli.app import app
from edgekv.demo import draft_path, target_path
from edgekv.engine.kernel_needs import NotServedHere
from edgekv.errors import ConfigError
from edgekv.kernels.cpu.library import VARIABLE

run = CliRunner().invoke


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(
        f"kv:\n  block_size: 8\n  dtype: int8\nmodels:\n  m:\n    path: {target_path()}\n    device: cpu\n"
        "    weights: int4\n"
    )
    return path


def faults(file: Path, *settings: str) -> list[str]:
    options = [option for setting in settings for option in ("--set", setting)]
    checked = run(app, ["check", str(file), *options])
    assert checked.exit_code == 1
    assert isinstance(checked.exception, ConfigError)
    return checked.exception.faults


def test_faults_have_their_places(file: Path) -> None:
    kv, weights = faults(file)
    assert kv.startswith(f"{file}:3:10: error: kv.dtype: int8 needs the native CPU kernels, but they cannot run this")
    assert weights.startswith(f"{file}:8:14: error: models.m.weights: int4 needs the native CPU kernels")
    made = json.loads(run(app, ["check", str(file), "--json"]).stdout)
    assert (made["ok"], made["faults"]) == (False, [kv, weights])
    [only] = faults(file, "models.m.weights=auto", "models.m.kv.dtype=int8")
    assert only.startswith("--set models.m.kv.dtype: error: models.m.kv.dtype: int8 needs")


def test_the_variable_is_a_cause_and_no_unknown_setting(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "off")
    assert "switched off by EDGEKV_CPU_KERNELS=off. Unset EDGEKV" in faults(file, "kv.block_size=16")[0]
    fine = run(app, ["check", str(file), "--set", "kv.dtype=auto", "--set", "models.m.weights=auto"])
    assert (fine.exit_code, fine.stderr) == (0, "")
    assert "is fine: serves m on" in fine.stdout


def test_a_draft_that_could_not_be_served_is_a_fault_too(file: Path, tmp_path: Path) -> None:
    (tmp_path / "draft").mkdir()
    (tmp_path / "draft" / "config.json").write_text((draft_path() / "config.json").read_text())
    fine = ["kv.dtype=auto", "kv.block_size=16", "models.m.weights=auto"]
    drafts = [f"models.m.draft.path={draft_path()}", "models.m.draft.kv.dtype=fp8"]
    [told] = faults(file, *fine, *drafts)
    assert told.startswith(
        "--set models.m.draft.kv.dtype: error: models.m.draft.kv.dtype: fp8 needs a card's kernels, "
    )
    assert told.endswith("Set draft.kv.dtype to int8; or set draft.kv.dtype to auto")
    [told] = faults(file, *fine, "models.m.draft.path=draft")
    assert told.startswith("--set models.m.draft.path: error: models.m.draft.path: ")
    assert "holds neither model.safetensors nor" in told
    options = [part for setting in (*fine, *drafts[:1]) for part in ("--set", setting)]
    assert run(app, ["check", str(file), *options]).exit_code == 0


def test_a_draft_is_told_with_its_place_and_its_folder(tmp_path: Path) -> None:
    file, draft = tmp_path / "c.yaml", shutil.copytree(draft_path(), tmp_path / "draft")
    file.write_text("models:\n  m:\n    path: demo\n    device: cpu\n    draft: {path: draft, kv: {budget: 20KiB}}\n")
    [pool] = faults(file)
    assert pool.startswith(f"{file}:5:39: error: models.m.draft.kv.budget: 20.00 KiB holds 16 tokens of the draft")
    (draft / "tokenizer.json").write_text("{}")
    [tokens] = faults(file)
    assert tokens.startswith(f"{file}:5:19: error: models.m.draft.path: the draft model: {draft}/tokenizer.json: not ")
    assert run(app, ["check", str(file), "--set", "models.m.draft=off"]).exit_code == 0


def test_formats_of_cards_are_refused_where_the_model_goes_to_the_cpu(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    for dtype in ("fp8", "int4"):
        file.write_text(f"models: {{m: {{path: {target_path()}, device: cpu, kv: {{dtype: {dtype}}}}}}}\n")
        needs = f"{dtype} needs a card's kernels, but this model runs on the CPU. Set kv.dtype to int8; or set "
        [told] = faults(file)
        assert f"error: models.m.kv.dtype: {needs}" in told
        served = run(app, ["serve", str(file), "--port", "0"])
        assert (served.exit_code, isinstance(served.exception, NotServedHere)) == (1, True)
        assert str(served.exception).startswith(f"kv.dtype: {needs}")


def test_a_model_without_weights_is_a_fault(file: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text((target_path() / "config.json").read_text())
    [told] = faults(file, "models.m.path=model")
    assert "models.m.path: " in told
    assert "holds neither model.safetensors nor" in told
