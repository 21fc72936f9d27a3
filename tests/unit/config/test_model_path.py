"""What a model's path stands for."""

from pathlib import Path

import pytest

from edgekv.config.model_path import gguf_at, gguf_files
from edgekv.errors import ModelError


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"GGUF")
    return folder


def test_a_file_stands_for_itself(tmp_path: Path) -> None:
    touch(tmp_path, "a.gguf", "blob")
    assert gguf_at(tmp_path / "a.gguf") == tmp_path / "a.gguf"
    assert gguf_at(tmp_path / "blob") == tmp_path / "blob", "whatever it is called"
    assert gguf_at(tmp_path / "missing.gguf") == tmp_path / "missing.gguf", "so that its reader says what is wrong"
    assert gguf_at(tmp_path / "missing") is None


def test_a_folder_stands_for_the_one_file_in_it(tmp_path: Path) -> None:
    assert gguf_at(touch(tmp_path / "empty", "README.md")) is None
    assert gguf_at(touch(tmp_path / "one", "README.md", "a.gguf")) == tmp_path / "one" / "a.gguf"
    assert gguf_at(touch(tmp_path / "both", "config.json", "a.gguf", "b.gguf")) is None
    with pytest.raises(ModelError, match=r"two: holds several GGUF files, name one: a\.gguf, b\.gguf"):
        gguf_at(touch(tmp_path / "two", "b.gguf", "a.gguf"))


def test_the_parts_of_a_split_file_are_one(tmp_path: Path) -> None:
    parts = [f"m-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    assert gguf_at(touch(tmp_path / "whole", *parts)) == tmp_path / "whole" / parts[0]
    assert gguf_at(touch(tmp_path / "headless", *parts[1:])) == tmp_path / "headless" / parts[1]
    with pytest.raises(ModelError, match=r"name one: m-00001-of-00003\.gguf, n\.gguf"):
        gguf_at(touch(tmp_path / "whole", "n.gguf"))


def test_a_folder_that_is_called_like_a_file(tmp_path: Path) -> None:
    assert gguf_at(touch(tmp_path / "folder.gguf", "config.json")) is None


def test_the_files_of_a_folder_that_has_a_configuration_too(tmp_path: Path) -> None:
    names = ("b.gguf", "config.json", "m-00002-of-00002.gguf", "m-00001-of-00002.gguf")
    found = gguf_files(touch(tmp_path / "folder", *names))
    assert [file.name for file in found] == ["b.gguf", "m-00001-of-00002.gguf"]
    assert gguf_files(touch(tmp_path / "empty")) == []
