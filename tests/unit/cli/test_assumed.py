"""A plan of a model whose weights are not there is useful, and says so."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from edgekv.cli.app import app
from edgekv.demo import draft_path, target_path
from tests.unit.cli.shapes import LLAMA_3_8B, write_shape
from tests.unit.model.test_quantised_config import AWQ

run = CliRunner().invoke


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_shape(tmp_path / "llama[1]", LLAMA_3_8B)


def printed(*arguments: object) -> str:
    result = run(app, ["plan", *map(str, arguments), "--vram", "24GiB"])
    assert result.exit_code == 0, "it fits all the same"
    return result.stdout


def as_json(*arguments: object) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(run(app, ["plan", *map(str, arguments), "--vram", "24GiB", "--json"]).stdout)
    return made


def test_what_is_assumed_is_told(llama: Path, tmp_path: Path) -> None:
    line = f"no weights: {llama} holds none that could be loaded; assumed are those that its config.json describes: "
    assert line + "bf16 14.96 GiB\n" in printed(llama)
    awq = write_shape(tmp_path / "awq", LLAMA_3_8B | {"torch_dtype": "float16", "quantization_config": AWQ})
    assert "config.json describes: int4/128 3.45 GiB, f16 1.96 GiB\n" in printed(awq)


def test_what_lies_there_instead_is_named(llama: Path) -> None:
    for name in ("m-Q4_K_M.gguf", "pytorch_model.bin"):
        (llama / name).touch()
    text = printed(llama)
    assert f" · A GGUF file lies there: give the file itself: edgekv plan {llama}/m-Q4_K_M.gguf\n" in text
    assert " · Pickled weights (.bin, .pt, .pth) can run code and are never loaded: convert them to saf" in text
    assert as_json(llama)["checkpoint"] == {
        "path": str(llama / "config.json"),
        "kinds": {"bf16": 2 * 8_030_261_248},
        "is_assumed": True,
        "instead": [line.removeprefix(" · ") for line in text.splitlines() if line.startswith(" · ")],
    }


def test_weights_that_are_there_are_not_assumed() -> None:
    assert "no weights" not in printed(target_path(), "--draft", draft_path())
    plan = as_json(target_path(), "--draft", draft_path())
    for checkpoint, folder in ((plan["checkpoint"], target_path()), (plan["draft"]["checkpoint"], draft_path())):
        assert (checkpoint["is_assumed"], checkpoint["instead"]) == (False, [])
        assert checkpoint["path"] == str(folder / "model.safetensors")


def test_a_draft_without_weights_is_told_too(tmp_path: Path) -> None:
    folder = shutil.copytree(draft_path(), tmp_path / "draft")
    (folder / "model.safetensors").unlink()
    assert f"no weights: {folder} holds none" in printed(target_path(), "--draft", folder)
    assert as_json(target_path(), "--draft", folder)["draft"]["checkpoint"]["is_assumed"]
