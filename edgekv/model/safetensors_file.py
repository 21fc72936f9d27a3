"""One safetensors file: its header, checked before a byte of it is believed, and its bytes, read where they are wanted.

Runs in: anywhere (no torch); owns: an open file. The bytes are read, not mapped: a file that is cut short or replaced
while it is mapped ends the process with SIGBUS, and a mapped weight would change under a running model. One descriptor
serves header and data: what was checked is what is read, whatever the path names by then.

    | 8 bytes: header length n, little-endian | n bytes: JSON {name: {dtype, shape, data_offsets}} | data |
"""

import math
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from edgekv.errors import ModelError
from edgekv.model.json_fields import parse_object

# A 60 MB header costs 4 s and 900 MB to parse; real ones, at about 100 bytes a tensor, stay under 1 MB.
MAX_HEADER_BYTES = 16 << 20
_MAX_DIMENSIONS = 16
_MAX_EXTENT = 1 << 48
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: `num_bytes` at `offset` from the file's start, row-major; `dtype` in the file's words."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class SafetensorsFile:
    """A file with a checked header, open for reading; a context manager. Its methods may be called from any thread.

    Invariant: every tensor lies inside the file, none overlaps another, no byte is unaccounted for, and shape and dtype
    ask for exactly the bytes given. `entries` are the tensors by name.
    """

    def __init__(self, path: Path) -> None:
        """Raises ModelError naming the file and, where there is one, the tensor."""
        self.path = path
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as fault:
            raise ModelError(f"{path}: cannot be read: {fault.strerror or fault}") from None
        with ExitStack() as opening:
            opening.callback(self._file.close)
            self.entries = self._read_header()
            opening.pop_all()

    def _read_header(self) -> dict[str, TensorEntry]:
        path, prefix = self.path, bytearray(8)
        file_bytes = os.fstat(self._file.fileno()).st_size
        if file_bytes >= 8:
            self._fill(0, memoryview(prefix), "header")
        length = int.from_bytes(prefix, "little")
        if file_bytes < 8 or length > file_bytes - 8:
            raise ModelError(f"{path}: truncated or not a safetensors file: {file_bytes:,} bytes, header of {length:,}")
        if length > MAX_HEADER_BYTES:
            raise ModelError(f"{path}: header of {length:,} bytes is over the limit of {MAX_HEADER_BYTES:,}")
        text = bytearray(length)
        self._fill(8, memoryview(text), "header")
        entries = _entries(path, parse_object(text, f"{path}: header"), data_start=8 + length)
        _check_layout(path, entries, data_start=8 + length, file_bytes=file_bytes)
        return {entry.name: entry for entry in entries}

    def read_into(self, entry: TensorEntry, start: int, buffer: memoryview) -> None:
        """Fill `buffer` (of bytes) with the tensor's bytes from `start`; raises ModelError where the file ends."""
        if start < 0 or start + len(buffer) > entry.num_bytes:
            raise ValueError(f"{entry.name}: {start} + {len(buffer)} bytes asked of {entry.num_bytes}")
        self._fill(entry.offset + start, buffer, f"tensor '{entry.name}'")

    def _fill(self, offset: int, buffer: memoryview, what: str) -> None:
        done = 0
        try:
            while done < len(buffer):
                count = os.preadv(self._file.fileno(), [buffer[done:]], offset + done)
                if not count:
                    raise ModelError(f"{self.path}: {what}: the file was cut short while it was read")
                done += count
        except OSError as fault:
            raise ModelError(f"{self.path}: {what}: cannot be read: {fault.strerror}") from None

    def close(self) -> None:
        """Close the file; may be called again."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _entries(path: Path, header: dict[str, object], data_start: int) -> list[TensorEntry]:
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ModelError(f"{path}: header: __metadata__ must map strings to strings")
    return [_entry(path, name, value, data_start) for name, value in header.items()]


def _entry(path: Path, name: str, value: object, data_start: int) -> TensorEntry:
    def fault(message: str) -> ModelError:
        return ModelError(f"{path}: tensor {name!r:.200}: {message}")

    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise fault("expected exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise fault(f"unknown dtype {dtype!r:.80}")
    if not _naturals(shape) or len(shape) > _MAX_DIMENSIONS:
        raise fault(f"shape must be at most {_MAX_DIMENSIONS} natural numbers, found {shape!r:.80}")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise fault(f"data_offsets must be a begin and an end, found {offsets!r:.80}")
    begin, end = offsets
    bits = math.prod(shape) * _BITS[dtype]
    if bits != (end - begin) * 8:
        raise fault(f"{dtype} {shape} takes {bits // 8:,} bytes, but its offsets give {end - begin:,}")
    return TensorEntry(name, dtype, tuple(shape), data_start + begin, end - begin)


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < _MAX_EXTENT for item in value)


def _check_layout(path: Path, entries: list[TensorEntry], data_start: int, file_bytes: int) -> None:
    end, cut = data_start, None
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.num_bytes)):
        if entry.offset != end:
            what = "overlaps the tensor before it" if entry.offset < end else "leaves a gap before it"
            raise ModelError(f"{path}: tensor '{entry.name}': {what}")
        end += entry.num_bytes
        if end > file_bytes and cut is None:
            cut = entry.name
    if cut is not None:
        raise ModelError(f"{path}: tensor '{cut}': the file is truncated, {end - file_bytes:,} bytes short")
    if end != file_bytes:
        raise ModelError(f"{path}: {file_bytes - end:,} bytes after the last tensor belong to nothing")
