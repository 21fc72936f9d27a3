"""A model split into several GGUF files is one, from whichever part it is opened; a part that is missing is named."""

from pathlib import Path

import pytest

from edgekv.errors import ModelError
from edgekv.formats.gguf_checkpoint import GgufCheckpoint
from tests.unit.formats import gguf_image as image
from tests.unit.formats.gguf_image import Image, Key, Tensor

NAMES = [f"m-0000{number}-of-00003.gguf" for number in (1, 2, 3)]


def split(folder: Path, number: int, *tensors: str, count: int = 3, total: int = 3, name: str | None = None) -> Path:
    """Part `number` from 0, as gguf-split writes it: all but the first have nothing but its keys."""
    keys = [
        Key("split.no", image.U16, number),
        Key("split.count", image.U16, count),
        Key("split.tensors.count", image.I32, total),
    ]
    if number == 0:
        keys.append(Key("general.name", image.STRING, "whole"))
    data = Image(keys, [Tensor(tensor, "f32", (number + 1,)) for tensor in tensors]).build()
    path = folder / (name or NAMES[number])
    path.write_bytes(data)
    return path


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    return [split(tmp_path, 0), split(tmp_path, 1, "a", "b"), split(tmp_path, 2, "c")]


def refusal(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        GgufCheckpoint(path)
    return str(caught.value)


@pytest.mark.parametrize("opened", [0, 1, 2])
def test_all_parts_are_one_model(parts: list[Path], opened: int) -> None:
    with GgufCheckpoint(parts[opened]) as checkpoint:
        assert checkpoint.source == parts[0]
        assert checkpoint.metadata.text("general.name") == "whole"
        places = {name: located.file.path for name, located in checkpoint.tensors.items()}
        assert places == {"a": parts[1], "b": parts[1], "c": parts[2]}
        located = checkpoint.tensors["c"]
        buffer = bytearray(12)
        located.file.read_into(located.info, 0, memoryview(buffer))
        assert bytes(buffer) == bytes(range(12))
    with pytest.raises(ValueError, match="closed"):
        located.file.read_into(located.info, 0, memoryview(buffer))
    assert checkpoint.metadata.text("general.name") == "whole"


def test_a_single_file_may_have_any_name(tmp_path: Path) -> None:
    for name in ("model.gguf", "m-00001-of-00001.gguf", "m-00000-of-00003.gguf", "m-00004-of-00003.gguf", "0ab4"):
        path = split(tmp_path, 0, "a", count=1, total=1, name=name)
        with GgufCheckpoint(path) as checkpoint:
            assert (checkpoint.source, list(checkpoint.tensors)) == (path, ["a"])


def test_files_that_were_merged_again_count_none(tmp_path: Path) -> None:
    with GgufCheckpoint(split(tmp_path, 0, "a", count=0, total=1, name="m.gguf")) as checkpoint:
        assert list(checkpoint.tensors) == ["a"]


def test_a_missing_part_is_named(parts: list[Path]) -> None:
    parts[1].unlink()
    assert refusal(parts[2]) == f"{parts[1]}: part 2 of 3 is missing: download it too"
    parts[0].unlink()
    assert refusal(parts[2]) == f"{parts[0]}: part 1 of 3 is missing: download it too"


def test_a_part_under_another_name_is_refused(tmp_path: Path, parts: list[Path]) -> None:
    alone = parts[0].rename(tmp_path / "model.gguf")
    assert "'split.count' at byte 69: is 3 in a file whose name makes it 1: give the parts their own" in refusal(alone)


def test_parts_in_each_others_place_are_refused(parts: list[Path]) -> None:
    parts[2].write_bytes(parts[1].read_bytes())
    message = refusal(parts[0])
    assert message.startswith(f"{parts[2]}: key 'split.no' at byte ")
    assert message.endswith("is 1 in a file whose name makes it 2: the parts were renamed")


def test_a_tensor_in_two_parts_is_refused(tmp_path: Path, parts: list[Path]) -> None:
    split(tmp_path, 2, "b")
    assert refusal(parts[0]) == f"{parts[2]}: tensor 'b': is in {NAMES[1]} too"


def test_tensors_that_are_missing_are_counted(tmp_path: Path, parts: list[Path]) -> None:
    split(tmp_path, 0, total=4)
    assert refusal(parts[0]).endswith("'split.tensors.count' at byte 102: is 4, but the files hold 3 tensors")


def test_a_number_of_parts_beyond_reason_is_no_split(tmp_path: Path) -> None:
    path = split(tmp_path, 0, "a", count=65535, total=1, name="m-00001-of-65535.gguf")
    assert "is 65535 in a file whose name makes it 1" in refusal(path)


def test_the_parts_before_a_bad_one_are_closed(parts: list[Path]) -> None:
    parts[2].write_bytes(b"GGUF")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        assert str(parts[2]) in refusal(parts[0])
    assert len(list(Path("/proc/self/fd").iterdir())) == before
