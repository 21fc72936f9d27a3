"""A model folder that is not what it says is refused before its weights are read, in one clear ModelError."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from edgekv.errors import ModelError
from edgekv.model.loader import load_model
from tests.model.tiny_models import edit_config, make_tiny

K_PROJ = "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama3", tmp_path_factory.mktemp("pristine"))


@pytest.fixture(scope="module")
def pristine_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama3", tmp_path_factory.mktemp("shards"), max_shard_size="60KB")


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "model")


@pytest.fixture
def shards(pristine_shards: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine_shards, tmp_path / "model")


def refusal(folder: Path) -> str:
    """The message of the ModelError, and proof that no weight was read before it."""
    stages: list[tuple[int, int, str]] = []
    with pytest.raises(ModelError) as caught:
        load_model(
            folder,
            dtype=torch.float32,
            device=torch.device("cpu"),
            progress=lambda done, total, stage: stages.append((done, total, stage)),
        )
    assert all(done == 0 for done, _, _ in stages)
    return str(caught.value)


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def edit_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_a_missing_tensor(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.__delitem__(K_PROJ))
    assert refusal(folder) == f"{folder}/model.safetensors: tensor '{K_PROJ}': is missing"


def test_a_wrong_shape(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({K_PROJ: torch.zeros(40, 47)}))
    assert refusal(folder) == (
        f"{folder}/model.safetensors: tensor '{K_PROJ}': has shape [40, 47], but config.json asks for [40, 48]"
    )


def test_a_transposed_matrix_is_a_wrong_shape(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({K_PROJ: tensors[K_PROJ].T.contiguous()}))
    assert "has shape [48, 40]" in refusal(folder)


def test_a_quantised_tensor(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({K_PROJ: tensors[K_PROJ].to(torch.int8)}))
    assert f"tensor '{K_PROJ}': dtype I8 is not supported" in refusal(folder)


def test_an_unexpected_tensor(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({"model.layers.1.self_attn.k_norm.weight": torch.zeros(20)}))
    assert "tensor 'model.layers.1.self_attn.k_norm.weight': is not part of the model" in refusal(folder)


def test_more_layers_than_the_config_says(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=2)
    assert re.search(r"tensor 'model\.layers\.2\..*': is not part of the model in config.json", refusal(folder))


def test_fewer_layers_than_the_config_says(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=1000)
    assert "tensor 'model.layers.3." in refusal(folder)


def test_harmless_leftovers_are_ignored(folder: Path) -> None:
    edit_tensors(
        folder,
        lambda tensors: tensors.update(
            {"lm_head.weight": torch.zeros(199, 48), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(10)}
        ),
    )
    load_model(folder, dtype=torch.float32, device=torch.device("cpu"))


def test_an_untied_model_needs_its_head(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=False)
    assert refusal(folder) == f"{folder}/model.safetensors: tensor 'lm_head.weight': is missing"


def test_a_truncated_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1000)
    assert re.search(r"model\.safetensors: tensor '.*': the file is truncated, 1,000 bytes short", refusal(folder))


def test_a_truncated_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    assert "truncated or not a safetensors file" in refusal(folder)


def test_an_empty_folder_says_what_is_needed(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "holds neither model.safetensors nor model.safetensors.index.json" in refusal(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "never loaded: convert them to safetensors" in refusal(folder)
    (folder / "tiny-Q8_0.gguf").write_bytes(b"GGUF")
    assert f"A GGUF file lies there: give the file itself: {folder}/tiny-Q8_0.gguf" in refusal(folder)


def test_code_named_by_auto_map_is_not_imported(folder: Path, tmp_path: Path) -> None:
    (folder / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    load_model(folder, dtype=torch.float32, device=torch.device("cpu"))
    assert not (tmp_path / "ran").exists()


def test_a_missing_shard(shards: Path) -> None:
    (shards / "model-00002-of-00008.safetensors").unlink()
    assert refusal(shards) == f"{shards}/model-00002-of-00008.safetensors: the shard is missing"


def test_a_shard_without_its_tensor(shards: Path) -> None:
    edit_index(shards, lambda weight_map: weight_map.update({"extra": "model-00001-of-00008.safetensors"}))
    assert "model-00001-of-00008.safetensors: tensor 'extra': is missing, though the index lists it" in refusal(shards)


def test_a_tensor_in_two_shards(shards: Path) -> None:
    paths = sorted(shards.glob("*.safetensors"))
    first, second = (load_file(path) for path in paths[:2])
    name = next(iter(first))
    save_file({**second, name: first[name]}, paths[1])
    assert f"tensor '{name}': the index does not list it here" in refusal(shards)


@pytest.mark.parametrize("shard", ["../evil.safetensors", "/etc/passwd", "a/b.safetensors", "weights.bin", "", 7, None])
def test_an_index_that_reaches_out(shards: Path, shard: object) -> None:
    edit_index(shards, lambda weight_map: weight_map.update({K_PROJ: shard}))  # type: ignore[dict-item]
    assert f"field 'weight_map.{K_PROJ}': expected " in refusal(shards)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"a": 1, "a": 2}'])
def test_a_bad_index(shards: Path, text: str) -> None:
    (shards / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in refusal(shards)
