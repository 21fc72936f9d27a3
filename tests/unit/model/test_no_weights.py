"""Folders without weights that could be loaded, and what is said of what lies there instead."""

import json
from pathlib import Path

import pytest

from edgekv.errors import ModelError
from edgekv.model.no_weights import INDEX, SINGLE, has_weights, instead_of_weights, no_weights
from edgekv.model.open_weights import open_weights


def holding(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in ("config.json", *names):
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ((), []),
        (("m-Q8_0.gguf",), ["A GGUF file lies there: give the file itself: run {}/m-Q8_0.gguf"]),
        (
            ("b.gguf", "a-00001-of-00002.gguf", "a-00002-of-00002.gguf"),
            ["GGUF files lie there (a-00001-of-00002.gguf, b.gguf): give the file itself: run {}/a-00001-of-0000"],
        ),
        (
            tuple(f"{name}.gguf" for name in "abcdef"),
            ["GGUF files lie there (a.gguf, b.gguf, c.gguf, d.gguf and 2 more): give the file itself: run {}/a.gguf"],
        ),
        (
            ("consolidated.00.pth",),
            ["Pickled weights (.bin, .pt, .pth) can run code and are never loaded: convert them to safetensors"],
        ),
        (
            ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
            ["Shards lie there without their index: download model.safetensors.index.json too"],
        ),
        (
            ("adapter_model.safetensors",),
            ["adapter_model.safetensors: not a name that weights have here, which is model.safetensors"],
        ),
        (("pytorch_model.bin", "x.gguf"), ["A GGUF", "Pickled"]),
    ],
)
def test_what_lies_there_instead(names: tuple[str, ...], told: list[str], tmp_path: Path) -> None:
    folder = holding(tmp_path / "model", *names)
    assert not has_weights(folder)
    found = instead_of_weights(folder, "run ")
    assert len(found) == len(told)
    for sentence, words in zip(found, told, strict=True):
        assert sentence.startswith(words.format(folder))
    with pytest.raises(ModelError) as caught:
        open_weights(folder)
    assert str(caught.value) == str(no_weights(folder))
    assert str(caught.value).startswith(f"{folder}: holds neither {SINGLE} nor {INDEX}")
    for sentence in instead_of_weights(folder):
        assert f". {sentence}" in str(caught.value)


def test_an_index_alone_names_files_that_are_not_there(tmp_path: Path) -> None:
    folder = holding(tmp_path / "model")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}))
    assert not has_weights(folder)
    assert str(no_weights(folder)) == f"{folder / INDEX}: none of the files that it names is there"
    (folder / "model-00001-of-00001.safetensors").touch()
    assert has_weights(folder)


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": 7}'])
def test_a_bad_index_is_for_a_load_to_find_fault_with(index: str, tmp_path: Path) -> None:
    folder = holding(tmp_path / "model")
    (folder / INDEX).write_text(index)
    assert has_weights(folder)
