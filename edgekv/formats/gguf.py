"""One GGUF file: its header, checked before a byte of it is believed, and its tensors' bytes, read where wanted.

Runs in: anywhere (no torch); owns: an open file. Format: docs/gguf.md of github.com/ggml-org/ggml.

    | "GGUF" | u32 version | u64 tensors | u64 keys | keys and values | tensor infos | padding | tensors, each padded |
    tensor info | string name | u32 dimensions | u64 each, columns first | u32 type | u64 offset from the first tensor |

Nothing is mapped. A file that is cut short or replaced while it is mapped ends the process with SIGBUS, a fault that
no check before can rule out; a read of the same bytes is an error with a name. A mapping would not save memory either:
weights are packed into panels as they are read, so the file's pages would be a second copy. One descriptor serves
header and data: what was checked is what is read, whatever the path names by then.
"""

import math
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

from edgekv.errors import ModelError
from edgekv.formats.gguf_values import Cursor, Metadata, ValueType, read_metadata
from edgekv.kernels.quant.encodings import ENCODINGS, Encoding

MAX_TENSORS = 1 << 16
MAX_KEYS = 1 << 16
_MAX_NAME_BYTES = 64  # the format's own limit, as that of the dimensions
_MAX_DIMENSIONS = 4
_DEFAULT_ALIGNMENT = 32
# ggml's numbers: enum ggml_type of ggml/include/ggml.h.
_TYPES = {
    0: "f32", 1: "f16", 2: "q4_0", 3: "q4_1", 6: "q5_0", 7: "q5_1", 8: "q8_0", 9: "q8_1", 10: "q2_K", 11: "q3_K",
    12: "q4_K", 13: "q5_K", 14: "q6_K", 15: "q8_K", 16: "iq2_xxs", 17: "iq2_xs", 18: "iq3_xxs", 19: "iq1_s",
    20: "iq4_nl", 21: "iq3_s", 22: "iq2_s", 23: "iq4_xs", 24: "i8", 25: "i16", 26: "i32", 27: "i64", 28: "f64",
    29: "iq1_m", 30: "bf16", 34: "tq1_0", 35: "tq2_0", 39: "mxfp4", 40: "nvfp4", 41: "q1_0",
}  # fmt: skip
_READABLE = [name for name in _TYPES.values() if name in ENCODINGS]
_OTHER_FILES = {
    b"ggml": "a file of llama.cpp's format before GGUF: convert the model again",
    b"ggmf": "a file of llama.cpp's format before GGUF: convert the model again",
    b"ggjt": "a file of llama.cpp's format before GGUF: convert the model again",
    b"lmgg": "a file of llama.cpp's format before GGUF: convert the model again",
    b"fmgg": "a file of llama.cpp's format before GGUF: convert the model again",
    b"tjgg": "a file of llama.cpp's format before GGUF: convert the model again",
    b"vers": "a pointer that Git LFS put in the file's place: run 'git lfs pull'",
    b"<!DO": "a web page: download the file itself",
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: `num_bytes` at `offset` from the file's start, row-major, rows of `shape[-1]` columns."""

    name: str
    encoding: Encoding
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class GgufFile:
    """A file with a checked header, open for reading; a context manager. Its methods may be called from any thread.

    Invariant: every tensor lies inside the file, aligned, none overlaps another, and its bytes are what type and shape
    ask for.
    """

    def __init__(self, path: Path) -> None:
        """Raises ModelError naming the file and the key or tensor, with the byte where it lies."""
        self.path = path
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as fault:
            raise ModelError(f"{path}: cannot be read: {fault.strerror or fault}") from None
        with ExitStack() as opening:
            opening.callback(self._file.close)
            try:
                self._read_header()
            except OSError as fault:
                raise ModelError(f"{path}: cannot be read: {fault.strerror or fault}") from None
            opening.pop_all()

    def _read_header(self) -> None:
        cursor = Cursor(self.path, self._file.fileno(), os.fstat(self._file.fileno()).st_size)
        num_tensors, num_keys = _read_counts(cursor)
        self.metadata = read_metadata(cursor, num_keys)
        self.alignment = _alignment(self.metadata)
        tensors = _read_tensors(cursor, num_tensors, self.alignment)
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(tensors)
        cursor.end()

    def read_into(self, info: TensorInfo, start: int, buffer: memoryview) -> None:
        """Fill `buffer` (of bytes) with the tensor's bytes from `start`; raises ModelError where the file ends."""
        if start < 0 or start + len(buffer) > info.num_bytes:
            raise ValueError(f"{info.name}: {start} + {len(buffer)} bytes asked of {info.num_bytes}")
        done = 0
        try:
            while done < len(buffer):
                count = os.preadv(self._file.fileno(), [buffer[done:]], info.offset + start + done)
                if not count:
                    raise ModelError(f"{self.path}: tensor '{info.name}': the file was cut short while it was read")
                done += count
        except OSError as fault:
            raise ModelError(f"{self.path}: tensor '{info.name}': cannot be read: {fault.strerror}") from None

    def close(self) -> None:
        """Close the file; may be called again. The metadata stays readable."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _read_counts(cursor: Cursor) -> tuple[int, int]:
    """Tensors and keys, of a file that is one of ours."""
    if cursor.file_bytes < 4:
        raise ModelError(f"{cursor.path}: not a GGUF file: {cursor.file_bytes} bytes; download it again")
    magic = cursor.u32().to_bytes(4, "little")
    if magic != b"GGUF":
        what = _OTHER_FILES.get(magic, f"it begins with {magic!r} instead of b'GGUF'")
        raise ModelError(f"{cursor.path}: not a GGUF file: {what}")
    version = cursor.u32()
    if version & 0xFFFF == 0:
        raise ModelError(f"{cursor.path}: a big-endian GGUF file, which is not supported: download a little-endian one")
    if version not in (2, 3):
        age = "convert the model again" if version < 2 else "this program reads versions 2 and 3"
        raise ModelError(f"{cursor.path}: GGUF version {version:,} is not supported: {age}")
    return _read_count(cursor, "tensors", MAX_TENSORS), _read_count(cursor, "metadata keys", MAX_KEYS)


def _read_count(cursor: Cursor, what: str, limit: int) -> int:
    count = cursor.u64()
    if count > limit:
        raise cursor.fault(
            f"{count:,} {what} are over the limit of {limit:,} that no real file comes near: it is damaged"
        )
    return count


def _alignment(metadata: Metadata) -> int:
    key = "general.alignment"
    field = metadata.field(key)
    if field is None:
        return _DEFAULT_ALIGNMENT
    alignment = metadata.integer(key, 1, 1 << 31)
    if field.kind != ValueType.UINT32 or alignment & (alignment - 1):
        raise metadata.fault(key, f"expected a power of two of type uint32, found {alignment:,} of {field.kind.name}")
    return alignment


def _read_tensors(cursor: Cursor, num_tensors: int, alignment: int) -> dict[str, TensorInfo]:
    relative: dict[str, TensorInfo] = {}
    for index in range(num_tensors):
        cursor.what = f"tensor {index + 1:,} of {num_tensors:,}"
        name = cursor.text(_MAX_NAME_BYTES)
        cursor.what = f"tensor {name!r}"
        if name in relative:
            raise cursor.fault("appears twice: the file is damaged or was edited badly; download it again")
        relative[name] = _read_info(cursor, name)
    return _place(cursor, relative, alignment)


def _read_info(cursor: Cursor, name: str) -> TensorInfo:
    """With an offset from the first tensor."""
    num_dimensions = cursor.u32()
    if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
        raise cursor.fault(f"{num_dimensions:,} dimensions, which must be 1 to {_MAX_DIMENSIONS}: the file is damaged")
    shape = tuple(cursor.u64() for _ in range(num_dimensions))[::-1]
    number = cursor.u32()
    if number not in _TYPES:
        raise cursor.fault(f"unknown type {number:,}: the file is damaged or newer than this program")
    encoding = ENCODINGS.get(_TYPES[number])
    if encoding is None:
        raise cursor.fault(
            f"type {_TYPES[number]} is not supported: take a file of the same model in one of {', '.join(_READABLE)}"
        )
    if 0 in shape:
        raise cursor.fault(f"has the shape {list(shape)}, which is empty: the file is damaged")
    if shape[-1] % encoding.block_cols:
        raise cursor.fault(f"{encoding.name} has blocks of {encoding.block_cols} columns, but a row has {shape[-1]:,}")
    num_bytes = math.prod(shape[:-1]) * encoding.row_bytes(shape[-1])
    return TensorInfo(name, encoding, shape, offset=cursor.u64(), num_bytes=num_bytes)


def _place(cursor: Cursor, relative: dict[str, TensorInfo], alignment: int) -> dict[str, TensorInfo]:
    """The same tensors with offsets from the file's start, proved to lie one after the other inside of it."""
    data_start = end = -(-cursor.at // alignment) * alignment
    placed = dict(relative)  # keeps the file's order
    for info in sorted(relative.values(), key=lambda info: info.offset):
        offset = data_start + info.offset
        expected = -(-end // alignment) * alignment

        def fault(message: str, info: TensorInfo = info, offset: int = offset) -> ModelError:
            return ModelError(f"{cursor.path}: tensor {info.name!r} at byte {offset:,}: {message}")

        if info.offset % alignment:
            raise fault(f"is not aligned to {alignment:,} bytes: the file is damaged; download it again")
        if offset != expected:
            what = "overlaps the tensor before it" if offset < expected else "leaves a gap before it"
            raise fault(f"{what}, which ends at {end:,}: the file is damaged; download it again")
        end = offset + info.num_bytes
        if end > cursor.file_bytes:
            raise fault(
                f"{info.encoding.name} {list(info.shape)} takes {info.num_bytes:,} bytes, but the file ends after "
                f"{max(0, cursor.file_bytes - offset):,}: it was cut short; download it again"
            )
        placed[info.name] = TensorInfo(info.name, info.encoding, info.shape, offset, info.num_bytes)
    return placed
