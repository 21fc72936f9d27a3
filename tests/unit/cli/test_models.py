"""What the commands take for a model, and what they call it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgekv.cli.app import app
from edgekv.cli.models import is_model, resolve_draft, resolve_model
from edgekv.cli.serve import served_model
from edgekv.config.model_path import model_name
from edgekv.config.settings import Config
from edgekv.demo import draft_path, target_path
from edgekv.engine.draft_settings import drafter_name
from edgekv.errors import ModelError
from tests.model.gguf_files import make_gguf
from tests.model.tiny_models import make_tiny

run = CliRunner().invoke


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A GGUF file alone in its folder."""
    folder = tmp_path / "tiny-qwen"
    folder.mkdir()
    return make_gguf(make_tiny("qwen3", tmp_path / "made"), folder / "tiny-qwen-Q8_0.gguf")


def test_a_path_may_be_a_folder_its_config_or_a_gguf_file(file: Path) -> None:
    assert resolve_model("demo") == target_path()
    assert resolve_model(str(target_path() / "config.json")) == target_path()
    assert resolve_model(str(file)) == file
    assert resolve_model(str(file.parent)) == file


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nothing", "no such folder; give a folder in Hugging Face's layout or a .gguf file, or 'demo'"),
        ("nothing.gguf", "no such file; give a folder in Hugging Face's layout or a .gguf file, or 'demo'"),
        ("model.safetensors", "is a part of a model; give the folder it lies in, "),
        ("two", "holds several GGUF files, name one: a.gguf, b.gguf"),
    ],
)
def test_what_is_no_model_is_told(name: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    for path in ("model.safetensors", "two/a.gguf", "two/b.gguf"):
        (tmp_path / path).touch()
    with pytest.raises(ModelError) as caught:
        resolve_model(str(tmp_path / name))
    assert told in str(caught.value)


def test_a_draft_is_called_as_models_are(file: Path, tmp_path: Path) -> None:
    assert resolve_draft("demo") == draft_path()
    assert resolve_draft(str(file)) == file
    with pytest.raises(ModelError) as caught:
        resolve_draft(str(tmp_path / "ngrams"))
    told = "no such folder; give a folder in Hugging Face's layout or a .gguf file, or 'demo', 'ngram', 'off'"
    assert str(caught.value) == f"--draft {tmp_path / 'ngrams'}: {told}"


def test_a_model_without_a_name_is_called_after_its_file(file: Path) -> None:
    assert model_name(file) == "tiny-qwen-Q8_0"
    assert model_name(file.parent) == "tiny-qwen"
    part = file.rename(file.with_name("tiny-Q4_K_M-00001-of-00002.gguf"))
    assert model_name(part) == "tiny-Q4_K_M"


def test_a_draft_model_is_called_as_models_are_but_for_the_demos(file: Path) -> None:
    assert drafter_name(draft_path()) == "demo"
    assert drafter_name(target_path()) == "target"
    assert drafter_name(file) == "tiny-qwen-Q8_0"


def test_a_gguf_file_is_served(file: Path) -> None:
    name, aliases, settings = served_model(Config(), str(file))
    assert (name, aliases, settings.folder) == ("tiny-qwen-Q8_0", (), file)


def test_serve_tells_a_model_from_a_configuration(file: Path, tmp_path: Path) -> None:
    assert is_model(str(file))
    assert is_model(str(file.parent))
    assert is_model("demo")
    assert not is_model(str(tmp_path / "demo"))
    assert not is_model(str(tmp_path / "config.yaml"))
    result = run(app, ["serve", str(file), "--model", "demo"])
    assert result.exit_code == 2
    assert "is a model, and --model names another" in " ".join(result.stderr.split()).replace("│ ", "")
    result = run(app, ["serve", str(tmp_path / "nothing.gguf")])
    assert result.exit_code == 1
    assert "no such file" in str(result.exception)


def test_plan_reads_a_gguf_file(file: Path) -> None:
    for path in (file, file.parent):
        result = run(app, ["plan", str(path), "--vram", "8GiB", "--json"])
        assert result.exit_code == 0, result.output
        made = json.loads(result.stdout)
        assert made["kv"]["bytes_per_token"] == 2 * 3 * 3 * 16 * 4  # K and V of 3 layers with 3 heads, in float32
