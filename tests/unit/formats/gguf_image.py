"""GGUF files written byte by byte, so that tests can write wrong ones; where each number lies is remembered."""

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from edgekv.formats.gguf_values import Metadata, ValueType

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
CODES = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}
TENSOR_TYPES = {
    "f32": (0, 1, 4), "f16": (1, 1, 2), "q4_0": (2, 32, 18), "q8_0": (8, 32, 34), "q4_K": (12, 256, 144),
    "q6_K": (14, 256, 210), "bf16": (30, 1, 2), "mxfp4": (39, 32, 17),
}  # fmt: skip


@dataclass(frozen=True)
class Key:
    """A key; the elements of an array are of type `element`."""

    name: str
    kind: int
    value: object
    element: int = U32


@dataclass(frozen=True)
class Tensor:
    """`shape` is rows first; `offset` None is where it belongs."""

    name: str
    type: str
    shape: tuple[int, ...]
    data: bytes | None = None
    offset: int | None = None

    @property
    def num_bytes(self) -> int:
        _, cols, size = TENSOR_TYPES[self.type]
        total = size
        for extent in self.shape:
            total *= extent
        return total // cols


@dataclass(frozen=True)
class Mark:
    """A number of the header: `what` is count, length, type, extent, offset, version or magic."""

    offset: int
    size: int
    what: str


@dataclass
class Image:
    """What a file holds; `build` writes it."""

    keys: Sequence[Key] = ()
    tensors: Sequence[Tensor] = ()
    version: int = 3
    alignment: int = 32
    num_keys: int | None = None
    num_tensors: int | None = None
    padding: bytes = b"\0"
    marks: list[Mark] = field(default_factory=list)
    records: list[tuple[int, int]] = field(default_factory=list)
    _bytes: bytearray = field(default_factory=bytearray)

    def build(self) -> bytes:
        self._bytes.clear()
        self.marks.clear()
        self.records.clear()
        self._bytes += b"GGUF"
        self.marks.append(Mark(0, 4, "magic"))
        self._number("version", 4, self.version)
        self._number("count", 8, len(self.tensors) if self.num_tensors is None else self.num_tensors)
        self._number("count", 8, len(self.keys) if self.num_keys is None else self.num_keys)
        for key in self.keys:
            self._record(lambda key=key: self._key(key))
        offset = 0
        for tensor in self.tensors:
            placed = replace(tensor, offset=offset if tensor.offset is None else tensor.offset)
            self._record(lambda placed=placed: self._info(placed))
            offset += -(-tensor.num_bytes // self.alignment) * self.alignment
        for tensor in self.tensors:
            self._pad()
            data = tensor.data
            self._bytes += (
                data if data is not None else (bytes(range(256)) * (tensor.num_bytes // 256 + 1))[: tensor.num_bytes]
            )
        return bytes(self._bytes)

    def _record(self, write: Callable[[], None]) -> None:
        start = len(self._bytes)
        write()
        self.records.append((start, len(self._bytes)))

    def _number(self, what: str, size: int, value: int) -> None:
        self.marks.append(Mark(len(self._bytes), size, what))
        self._bytes += value.to_bytes(size, "little")

    def _text(self, text: str | bytes) -> None:
        raw = text.encode() if isinstance(text, str) else text
        self._number("length", 8, len(raw))
        self._bytes += raw

    def _key(self, key: Key) -> None:
        self._text(key.name)
        self._number("type", 4, key.kind)
        self._value(key.kind, key.element, key.value)

    def _value(self, kind: int, element: int, value: object) -> None:
        if kind == STRING:
            assert isinstance(value, str | bytes)
            self._text(value)
        elif kind == ARRAY:
            assert isinstance(value, list)
            inner = ARRAY if value and isinstance(value[0], list) else element
            self._number("type", 4, inner)
            self._number("count", 8, len(value))
            for item in value:
                self._value(inner, element, item)
        else:
            self._bytes += struct.pack("<" + CODES[kind], value)

    def _info(self, tensor: Tensor) -> None:
        self._text(tensor.name)
        self._number("count", 4, len(tensor.shape))
        for extent in reversed(tensor.shape):
            self._number("extent", 8, extent)
        self._number("type", 4, TENSOR_TYPES[tensor.type][0])
        assert tensor.offset is not None
        self._number("offset", 8, tensor.offset)

    def _pad(self) -> None:
        self._bytes += self.padding * (-len(self._bytes) % self.alignment)


def value_of(metadata: Metadata, key: str) -> object:
    """What a key holds, by the accessor of its type; of arrays in arrays, which have none, how many."""
    field = metadata.field(key)
    assert field is not None
    wide = -(1 << 63), (1 << 64) - 1
    match field.kind if field.element is None else field.element:
        case ValueType.ARRAY:
            return field.count
        case ValueType.STRING:
            return metadata.texts(key) if field.element is not None else metadata.text(key)
        case ValueType.BOOL:
            return list(metadata.flags(key)) if field.element is not None else metadata.flag(key, False)
        case ValueType.FLOAT32 | ValueType.FLOAT64 if field.element is not None:
            return list(metadata.numbers(key))
        case ValueType.FLOAT32 | ValueType.FLOAT64:
            return metadata.number(key, -math.inf, math.inf)
    return list(metadata.integers(key, *wide)) if field.element is not None else metadata.integer(key, *wide)
