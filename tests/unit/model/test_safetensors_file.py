"""Safetensors headers: what is right is read, what lies is refused by name, and nothing else ever comes out."""

import gc
import json
import random
import re
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError, safe_open

from edgekv.errors import ModelError
from edgekv.model import safetensors_file
from edgekv.model.safetensors_file import MAX_HEADER_BYTES, SafetensorsFile, TensorEntry

GOOD: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b.weight": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "empty": {"dtype": "F32", "shape": [0, 5], "data_offsets": [32, 32]},
    "scalar": {"dtype": "I64", "shape": [], "data_offsets": [32, 40]},
}
DATA = bytes(range(40))


def packed(header: object, data: bytes = DATA, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def write(folder: Path, content: bytes) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(content)
    return path


def read_header(path: Path) -> dict[str, TensorEntry]:
    with SafetensorsFile(path) as file:
        return file.entries


def changed(name: str, **fields: Any) -> dict[str, Any]:
    return {**GOOD, name: {**GOOD[name], **fields}}


def test_a_good_file_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, packed(GOOD))
    start = len(packed(GOOD)) - 40
    with SafetensorsFile(path) as file:
        assert file.entries.keys() == GOOD.keys() - {"__metadata__"}
        entry = file.entries["b.weight"]
        assert entry == TensorEntry("b.weight", "BF16", (4,), start + 24, 8)
        buffer = bytearray(6)
        file.read_into(entry, 2, memoryview(buffer))
        assert bytes(buffer) == DATA[26:32]
        for start, count in ((2, 7), (-1, 2)):
            with pytest.raises(ValueError, match=f"{count} bytes asked"):
                file.read_into(entry, start, memoryview(bytearray(count)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated or not a safetensors file"),
        (b"\x08\x00\x00", "truncated or not"),
        (packed(GOOD, length=1 << 63), "truncated or not"),
        (packed(GOOD, length=10_000), "truncated or not"),
        (packed(GOOD)[:60], "truncated or not"),
        (packed(GOOD)[:-9], "tensor 'b.weight': the file is truncated, 9 bytes short"),
        (packed(GOOD)[:-1], "tensor 'scalar': the file is truncated, 1 bytes short"),
        (packed(GOOD, DATA + b"\0\0"), "2 bytes after the last tensor"),
        (packed(b"[]"), "expected a JSON object"),
        (packed(b"{"), "not usable JSON"),
        (packed(b"\xff\xfe{}"), "not usable JSON"),
        (packed(b"[" * 200_000), "nested too deeply"),
        (packed({**GOOD, "__metadata__": {"format": 1}}), "__metadata__"),
        (packed({**GOOD, "a.weight": 1}), "tensor 'a.weight': expected exactly"),
        (packed(changed("a.weight", extra=1)), "tensor 'a.weight': expected exactly"),
        (packed(changed("a.weight", dtype="F33")), "tensor 'a.weight': unknown dtype 'F33'"),
        (packed(changed("a.weight", dtype=["F32"])), "tensor 'a.weight': unknown dtype"),
        (packed(changed("a.weight", dtype="F16")), "tensor 'a.weight': F16 [2, 3] takes 12 bytes"),
        (packed(changed("a.weight", shape=[2, 4])), "takes 32 bytes, but its offsets give 24"),
        (packed(changed("a.weight", shape=[-2, -3])), "tensor 'a.weight': shape must be"),
        (packed(changed("a.weight", shape=[6.0])), "tensor 'a.weight': shape must be"),
        (packed(changed("a.weight", shape=[True, 6])), "tensor 'a.weight': shape must be"),
        (packed(changed("a.weight", shape=[1 << 62, 1 << 62])), "tensor 'a.weight': shape must be"),
        (packed(changed("a.weight", shape=[6] + [1] * 20)), "tensor 'a.weight': shape must be"),
        (packed(changed("a.weight", shape=6)), "tensor 'a.weight': shape must be"),
        (packed(changed("a.weight", data_offsets=[24, 0])), "tensor 'a.weight': data_offsets"),
        (packed(changed("a.weight", data_offsets=[-24, 0])), "tensor 'a.weight': data_offsets"),
        (packed(changed("a.weight", data_offsets=[0])), "tensor 'a.weight': data_offsets"),
        (packed(changed("b.weight", data_offsets=[20, 28])), "tensor 'b.weight': overlaps"),
        (packed(changed("scalar", data_offsets=[33, 41])), "tensor 'scalar': leaves a gap"),
        (packed(changed("scalar", data_offsets=[10**9, 10**9 + 8])), "tensor 'scalar': leaves a gap"),
        (packed(b'{"a": {"dtype": "U8", "shape": [40], "data_offsets": [0, 40]}, "a": {}}'), "'a' appears twice"),
    ],
    ids=range(32),
)
def test_a_lying_file_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, content)
    with pytest.raises(ModelError, match=rf"model\.safetensors.*{re.escape(message)}"):
        read_header(path)


def test_a_huge_header_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 1 << 30))
        file.truncate((1 << 30) + 8)  # sparse: the header is as long as it says
    with pytest.raises(ModelError, match=f"over the limit of {MAX_HEADER_BYTES:,}"):
        read_header(path)


def test_a_folder_or_nothing_is_a_model_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.safetensors"):
        with pytest.raises(ModelError, match="cannot be read"):
            read_header(path)


def test_a_file_cut_short_while_open_is_a_model_error(tmp_path: Path) -> None:
    path = write(tmp_path, packed(GOOD))
    with SafetensorsFile(path) as file:
        path.write_bytes(packed(GOOD)[:-30])
        with pytest.raises(ModelError, match=r"tensor 'b\.weight': the file was cut short"):
            file.read_into(file.entries["b.weight"], 0, memoryview(bytearray(8)))


def test_what_was_checked_is_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another file takes the name of one that is open, or is just being opened."""
    path, other = write(tmp_path, packed(GOOD)), tmp_path / "other"
    check = safetensors_file._check_layout

    def replaced(*args: Any, **kwargs: Any) -> None:
        check(*args, **kwargs)
        other.write_bytes(packed(GOOD, bytes(40)))
        other.replace(path)

    monkeypatch.setattr(safetensors_file, "_check_layout", replaced)
    with SafetensorsFile(path) as file:
        buffer = bytearray(24)
        file.read_into(file.entries["a.weight"], 0, memoryview(buffer))
        assert bytes(buffer) == DATA[:24]


def test_a_file_that_is_refused_is_closed(tmp_path: Path) -> None:
    path = write(tmp_path, packed(b"[]"))
    with pytest.raises(ModelError):
        SafetensorsFile(path)
    gc.collect()  # a file left open is a ResourceWarning, which is an error here


def test_threads_read_one_file(tmp_path: Path) -> None:
    path = write(tmp_path, packed(GOOD))
    with SafetensorsFile(path) as file, ThreadPoolExecutor(4) as pool:

        def read(start: int) -> bytes:
            buffer = bytearray(1)
            file.read_into(file.entries["a.weight"], start, memoryview(buffer))
            return bytes(buffer)

        assert b"".join(pool.map(read, list(range(24)) * 200)) == DATA[:24] * 200


def accepted(path: Path) -> dict[str, TensorEntry] | None:
    try:
        return read_header(path)
    except ModelError as fault:
        if str(path) not in str(fault):
            raise
        return None


def check(path: Path, entries: dict[str, TensorEntry]) -> None:
    """What was accepted is sound, and the reference implementation accepts it too."""
    end = 0
    for entry in sorted(entries.values(), key=lambda entry: (entry.offset, entry.num_bytes)):
        assert entry.offset >= end
        end = entry.offset + entry.num_bytes
    assert end in (0, path.stat().st_size)
    try:
        with safe_open(path, framework="numpy") as reference:
            assert set(reference.keys()) == entries.keys()
            for name, entry in entries.items():
                assert tuple(reference.get_slice(name).get_shape()) == entry.shape
    except SafetensorError as fault:
        pytest.fail(f"accepted what safetensors refuses: {fault}: {path.read_bytes()!r}")


def test_mutated_bytes_never_raise_anything_else(tmp_path: Path) -> None:
    rng, good, outcomes = random.Random(1), packed(GOOD), {True: 0, False: 0}
    for _ in range(2000):
        content = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(content))
            match rng.randrange(5):
                case 0:
                    content[at] = rng.randrange(256)
                case 1:
                    content[at] ^= 1 << rng.randrange(8)
                case 2:
                    content[at:at] = rng.randbytes(rng.randint(1, 8))
                case 3:
                    del content[at : at + rng.randint(1, 8)]
                case _:
                    content[at] = rng.choice(b'0123456789-eE.{}[]",:tnu\\ ')
            if len(content) < 2:
                break
        path = write(tmp_path, bytes(content))
        entries = accepted(path)
        outcomes[entries is not None] += 1
        if entries is not None:
            check(path, entries)
    assert outcomes[True] > 30
    assert outcomes[False] > 1000


def test_mutated_fields_never_raise_anything_else(tmp_path: Path) -> None:
    rng, outcomes = random.Random(2), {True: 0, False: 0}
    odd: list[Any] = [
        None,
        -1,
        0,
        1,
        2,
        8,
        24,
        32,
        40,
        41,
        1 << 31,
        1 << 63,
        10**30,
        1.5,
        "F16",
        "U8",
        "",
        [],
        [0],
        {},
        True,
    ]
    for _ in range(1500):
        header = json.loads(json.dumps(GOOD))
        for _ in range(rng.randint(1, 2)):
            name = rng.choice(list(GOOD))
            field = rng.choice(["dtype", "shape", "data_offsets", "whole"])
            if field == "whole" or name == "__metadata__" or not isinstance(header[name], dict):
                header[name] = rng.choice(odd)
            elif field == "dtype":
                header[name][field] = rng.choice(odd)
            else:
                header[name][field] = [rng.choice(odd) for _ in range(rng.randrange(4))]
        path = write(tmp_path, packed(header))
        entries = accepted(path)
        outcomes[entries is not None] += 1
        if entries is not None:
            check(path, entries)
    assert min(outcomes.values()) > 5
