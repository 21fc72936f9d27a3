"""A GGUF file is read as the gguf package wrote it, and refused with place, numbers and a remedy where it lies."""

import errno
import os
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from edgekv.errors import ModelError
from edgekv.formats import gguf as reader
from edgekv.formats.gguf import GgufFile
from tests.unit.formats import fuzz_gguf
from tests.unit.formats import gguf_image as image
from tests.unit.formats.gguf_image import Image, Key, Tensor, value_of

LIE = 1 << 62
ONE = Tensor("one", "f32", (2, 8))
TWO = Tensor("two", "q8_0", (3, 32))


def write(folder: Path, data: bytes) -> Path:
    path = folder / "model.gguf"
    path.write_bytes(data)
    return path


def refusal(folder: Path, data: bytes | Image) -> str:
    """The message, less the path that it starts with."""
    path = write(folder, data if isinstance(data, bytes) else data.build())
    with pytest.raises(ModelError) as caught:
        GgufFile(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def edited(what: Image, mark: str, nth: int, value: int) -> bytes:
    """The file with the nth number of that kind made another."""
    data = bytearray(what.build())
    place = [found for found in what.marks if found.what == mark][nth]
    data[place.offset : place.offset + place.size] = value.to_bytes(place.size, "little")
    return bytes(data)


def contents(file: GgufFile, name: str) -> bytes:
    info = file.tensors[name]
    buffer = bytearray(info.num_bytes)
    file.read_into(info, 0, memoryview(buffer))
    return bytes(buffer)


@pytest.mark.parametrize("alignment", [None, 8, 64, 4096])
def test_what_the_gguf_package_wrote_is_read_back(tmp_path: Path, alignment: int | None) -> None:
    path, rng = tmp_path / "model.gguf", np.random.default_rng(0)
    plain = rng.normal(size=(3, 5)).astype(np.float32)
    blocks = gguf.quants.quantize(rng.normal(size=(4, 96)).astype(np.float32), gguf.GGMLQuantizationType.Q5_1)
    writer = gguf.GGUFWriter(path, "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_block_count(7)
    writer.add_tensor("plain", plain)
    writer.add_tensor("cube", np.zeros((2, 3, 4), np.float16))
    writer.add_tensor("blocks", blocks, raw_dtype=gguf.GGMLQuantizationType.Q5_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GgufFile(path) as file:
        assert file.alignment == (alignment or 32)
        assert file.metadata.integer("llama.block_count", 0, 10) == 7
        found = [(info.name, info.encoding.name, info.shape) for info in file.tensors.values()]
        assert found == [("plain", "f32", (3, 5)), ("cube", "f16", (2, 3, 4)), ("blocks", "q5_1", (4, 96))]
        assert contents(file, "plain") == plain.tobytes()
        assert contents(file, "blocks") == blocks.tobytes()


@pytest.mark.parametrize("version", [2, 3])
def test_both_versions_are_read(tmp_path: Path, version: int) -> None:
    with GgufFile(write(tmp_path, Image(tensors=[ONE, TWO], version=version).build())) as file:
        assert list(file.tensors) == ["one", "two"]


def test_a_part_of_a_tensor_is_read_from_where_it_is_asked(tmp_path: Path) -> None:
    data = bytes(range(64))
    with GgufFile(write(tmp_path, Image(tensors=[TWO, replace(ONE, data=data)]).build())) as file:
        buffer = bytearray(8)
        file.read_into(file.tensors["one"], 16, memoryview(buffer))
        assert bytes(buffer) == data[16:24]
        for start in (57, -1):
            with pytest.raises(ValueError, match="8 bytes asked of 64"):
                file.read_into(file.tensors["one"], start, memoryview(buffer))


def test_a_file_without_tensors_is_one(tmp_path: Path) -> None:
    with GgufFile(write(tmp_path, Image([Key("a", image.U8, 1)]).build())) as file:
        assert len(file.tensors) == 0


def test_the_last_tensor_needs_no_padding_but_may_have_it(tmp_path: Path) -> None:
    data = Image(tensors=[TWO]).build()
    for end in (b"", bytes(26)):
        with GgufFile(write(tmp_path, data + end)) as file:
            assert contents(file, "two") == data[-102:]


def test_a_file_cut_short_while_it_is_open_is_an_error_and_not_a_signal(tmp_path: Path) -> None:
    path = write(tmp_path, Image(tensors=[ONE]).build())
    with GgufFile(path) as file:
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(ModelError, match="tensor 'one': the file was cut short while it was read"):
            contents(file, "one")


def test_a_file_cut_short_while_its_header_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Image(tensors=[ONE]).build()
    monkeypatch.setattr(os, "pread", lambda fd, size, at: data[at : min(at + size, 40)])
    assert "header at byte 0: the file was cut short while it was read" in refusal(tmp_path, data)


def test_a_file_replaced_while_it_is_open_stays_the_one_that_was_checked(tmp_path: Path) -> None:
    path = write(tmp_path, Image(tensors=[replace(ONE, data=bytes(64))]).build())
    with GgufFile(path) as file:
        path.unlink()
        path.write_bytes(b"another")
        assert contents(file, "one") == bytes(64)


def test_a_long_read_goes_on_where_the_system_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: preadv(fd, [buffers[0][:7]], at))
    data = bytes(range(64))
    with GgufFile(write(tmp_path, Image(tensors=[replace(ONE, data=data)]).build())) as file:
        assert contents(file, "one") == data


def test_a_disk_that_fails_is_an_error_with_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    path = write(tmp_path, Image(tensors=[ONE]).build())
    with GgufFile(path) as file:
        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(ModelError, match="tensor 'one': cannot be read: Input/output error"):
            contents(file, "one")
    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(ModelError, match=r"model\.gguf: cannot be read: Input/output error"):
        GgufFile(path)


def test_a_refused_file_is_closed(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        refusal(tmp_path, b"GGUF")
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read: No such file"):
        GgufFile(tmp_path / "absent.gguf")
    with pytest.raises(ModelError, match="cannot be read: Is a directory"):
        GgufFile(tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a GGUF file: 0 bytes"),
        (b"GG", "not a GGUF file: 2 bytes"),
        (b"PK\3\4" + bytes(40), r"it begins with b'PK\x03\x04' instead of b'GGUF'"),
        (b"tjgg" + bytes(40), "before GGUF: convert the model again"),
        (b"version https://git-lfs.github.com/spec/v1", "a pointer that Git LFS put in the file's place"),
        (b"<!DOCTYPE html>", "a web page: download the file itself"),
        (b"GGUF\1\0\0\0" + bytes(40), "GGUF version 1 is not supported: convert the model again"),
        (b"GGUF\4\0\0\0" + bytes(40), "GGUF version 4 is not supported: this program reads versions 2 and 3"),
        (b"GGUF\0\0\0\3" + bytes(40), "a big-endian GGUF file, which is not supported"),
        (b"GGUF\3\0\0\0" + bytes(12), "header at byte 16: takes 8 bytes, but the file ends after 4: it is damaged"),
    ],
)
def test_what_is_no_gguf_file_of_ours(tmp_path: Path, data: bytes, message: str) -> None:
    assert message in refusal(tmp_path, data)


@pytest.mark.parametrize(
    ("mark", "nth", "value", "message"),
    [
        ("count", 0, LIE, "header at byte 8: 4,611,686,018,427,387,904 tensors are over the limit of 65,536"),
        ("count", 1, LIE, "header at byte 16: 4,611,686,018,427,387,904 metadata keys are over the limit of 65,536"),
        ("count", 0, 3, "tensor 3 of 3 at byte "),
        ("length", 0, 0, "tensor 1 of 2 at byte 24: a name of 0 bytes, which must be 1 to 64: the file is damaged"),
        ("length", 0, 65, "tensor 1 of 2 at byte 24: a name of 65 bytes, which must be 1 to 64: the file is damaged"),
        ("length", 0, LIE, "a name of 4,611,686,018,427,387,904 bytes"),
        ("count", 2, 0, "tensor 'one' at byte 35: 0 dimensions, which must be 1 to 4"),
        ("count", 2, 5, "tensor 'one' at byte 35: 5 dimensions, which must be 1 to 4"),
        ("extent", 0, 0, "tensor 'one' at byte 55: has the shape [2, 0], which is empty"),
        ("extent", 3, 0, "has the shape [0, 32], which is empty"),
        ("extent", 2, 33, "tensor 'two' at byte 98: q8_0 has blocks of 32 columns, but a row has 33"),
        (
            "extent",
            0,
            LIE,
            "f32 [2, 4611686018427387904] takes 36,893,488,147,419,103,232 bytes, but the file ends after",
        ),
        ("type", 0, 4, "tensor 'one' at byte 55: unknown type 4: the file is damaged or newer than this program"),
        ("type", 0, 10, "type q2_K is not supported: take a file of the same model in one of f32, f16, q4_0, q4_1,"),
        ("type", 0, 0xFFFFFFFF, "unknown type 4,294,967,295"),
        ("offset", 0, 16, "tensor 'one' at byte 144: is not aligned to 32 bytes"),
        ("offset", 0, 32, "tensor 'one' at byte 160: leaves a gap before it, which ends at 128"),
        ("offset", 1, 0, "overlaps the tensor before it, which ends at "),
        ("offset", 1, 32, "tensor 'two' at byte 160: overlaps the tensor before it, which ends at 192"),
        ("offset", 1, 1 << 20, "tensor 'two' at byte 1,048,704: leaves a gap before it, which ends at 192"),
    ],
)
def test_a_header_that_lies(tmp_path: Path, mark: str, nth: int, value: int, message: str) -> None:
    source = Image(tensors=[ONE, TWO])
    assert message in refusal(tmp_path, edited(source, mark, nth, value))


def test_a_product_of_extents_past_64_bits_is_no_small_number(tmp_path: Path) -> None:
    source = Image(tensors=[Tensor("t", "f32", (1, 1, 1, 1))])
    data = bytearray(source.build())
    for place in (mark for mark in source.marks if mark.what == "extent"):
        data[place.offset : place.offset + 8] = (1 << 32).to_bytes(8, "little")
    taken = 4 << 128
    assert f"takes {taken:,} bytes, but the file ends after" in refusal(tmp_path, bytes(data))


def test_names_appear_once(tmp_path: Path) -> None:
    assert "tensor 'one' at byte 75: appears twice" in refusal(tmp_path, Image(tensors=[ONE, ONE]))


def test_a_name_is_text(tmp_path: Path) -> None:
    data = Image(tensors=[ONE]).build().replace(b"one", b"o\xffe")
    assert "tensor 1 of 1 at byte 32: a name that is not UTF-8" in refusal(tmp_path, data)


def test_every_place_to_cut_a_file_short_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path, fuzz_gguf.llama().build())
    for end in range(path.stat().st_size - 1, -1, -1):
        os.truncate(path, end)
        with pytest.raises(ModelError, match="download it again"):
            GgufFile(path)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (Key("general.alignment", image.U32, 0), "expected an integer from 1 to 2,147,483,648, found 0"),
        (Key("general.alignment", image.U32, 48), "expected a power of two of type uint32, found 48 of UINT32"),
        (Key("general.alignment", image.U64, 64), "expected a power of two of type uint32, found 64 of UINT64"),
        (Key("general.alignment", image.STRING, "64"), "expected an integer, found string"),
    ],
)
def test_an_alignment_is_a_power_of_two(tmp_path: Path, key: Key, message: str) -> None:
    assert message in refusal(tmp_path, Image([key], [ONE]))


def test_too_many_tensors_are_refused_before_the_first_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_TENSORS", 1)
    assert "2 tensors are over the limit of 1" in refusal(tmp_path, Image(tensors=[ONE, TWO]))


def test_tensors_may_lie_in_another_order_than_they_are_named(tmp_path: Path) -> None:
    source = Image(tensors=[replace(TWO, offset=64), replace(ONE, offset=0)])
    assert "overlaps" in refusal(tmp_path, replace(source, tensors=[replace(TWO, offset=32), replace(ONE, offset=0)]))
    with GgufFile(write(tmp_path, source.build())) as file:
        assert list(file.tensors) == ["two", "one"]
        assert file.tensors["one"].offset + 64 == file.tensors["two"].offset


@pytest.mark.parametrize("seed", fuzz_gguf.SEEDS[1:], ids=lambda seed: seed.tensors[0].name if seed.tensors else "none")
def test_what_the_fuzzer_damages_is_good(tmp_path: Path, seed: Image) -> None:
    fuzz_gguf.read_with_ours(write(tmp_path, seed.build()))


def test_the_gguf_package_reads_the_same_files(tmp_path: Path) -> None:
    path = write(tmp_path, fuzz_gguf.llama().build())
    theirs = gguf.GGUFReader(path)
    with GgufFile(path) as ours:
        for tensor in theirs.tensors:
            assert contents(ours, tensor.name) == tensor.data.tobytes()
            assert ours.tensors[tensor.name].shape == tuple(reversed(tensor.shape.tolist()))
        for key in ours.metadata:
            assert value_of(ours.metadata, key) == theirs.fields[key].contents()
