"""The typed values in front of a GGUF file's tensors: walked over with every length checked, decoded when asked for.

Runs in: anywhere (no torch); owns: the header's bytes. Format: docs/gguf.md of github.com/ggml-org/ggml.

    string  | u64 length | UTF-8 |
    array   | u32 element type | u64 count | elements |
    key     | string | u32 type | value |

A vocabulary of 128k tokens and 280k merges is half a million strings. Walking over them takes their lengths alone, so
whoever does not want the tokenizer does not pay for it, and nothing of the file's size is kept but its bytes. Objects
take up to 16 times a header's bytes: type and count are checked before any are made.
"""

import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from edgekv.errors import ModelError

# The largest known header, of a vocabulary of 262k tokens with 514k merges, takes about 15 MB.
MAX_HEADER_BYTES = 64 << 20
MAX_ARRAYS = 1 << 16  # of arrays in arrays there is none in any known file
MAX_TEXT_BYTES = 4 << 20  # a chat template of a million characters
_MAX_KEY_BYTES = 65535  # the format's own limit
_MAX_DEPTH = 4
_FIRST_BYTES = 1 << 20
_U64 = struct.Struct("<Q")


class ValueType(IntEnum):
    """The format's numbers for the types of values."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


_CODES = {
    ValueType.UINT8: "B",
    ValueType.INT8: "b",
    ValueType.UINT16: "H",
    ValueType.INT16: "h",
    ValueType.UINT32: "I",
    ValueType.INT32: "i",
    ValueType.FLOAT32: "f",
    ValueType.BOOL: "?",
    ValueType.UINT64: "Q",
    ValueType.INT64: "q",
    ValueType.FLOAT64: "d",
}
_SIZES = {kind: struct.calcsize("<" + code) for kind, code in _CODES.items()}
# What one element takes at least: an empty string is its length, an empty array its type and count.
_LEAST_BYTES = {**_SIZES, ValueType.STRING: 8, ValueType.ARRAY: 12}
_FLOATS = (ValueType.FLOAT32, ValueType.FLOAT64)
_INTEGERS = tuple(kind for kind in _CODES if kind not in _FLOATS and kind != ValueType.BOOL)


class Cursor:
    """A place in a file's first bytes, which are read as far as they are needed and never past MAX_HEADER_BYTES.

    Invariant: nothing is read or allocated for a length that the file does not hold. `what` is spoken of in errors.
    """

    def __init__(self, path: Path, descriptor: int, file_bytes: int) -> None:
        self.path, self.at, self.what = path, 0, "header"
        self.file_bytes = file_bytes
        self.data = bytearray()
        self.num_arrays = 0
        self._descriptor, self._last = descriptor, 0

    def fault(self, message: str) -> ModelError:
        """The error to raise about what was read or asked for last."""
        return ModelError(f"{self.path}: {self.what} at byte {self._last:,}: {message}")

    def u32(self) -> int:
        """The next four bytes."""
        return self._integer(4)

    def u64(self) -> int:
        """The next eight bytes."""
        return self._integer(8)

    def text(self, most_bytes: int) -> str:
        """The next string, of 1 to `most_bytes` bytes."""
        length = self.u64()
        if not 1 <= length <= most_bytes:
            raise self.fault(f"a name of {length:,} bytes, which must be 1 to {most_bytes:,}: the file is damaged")
        start = self.at
        self.skip(length)
        try:
            return self.data[start : self.at].decode()
        except UnicodeDecodeError:
            raise self.fault("a name that is not UTF-8: the file is damaged") from None

    def skip(self, num_bytes: int) -> None:
        """Go on over bytes that the file must hold."""
        self._last = self.at
        self.load(self.at + num_bytes)
        self.at += num_bytes

    def load(self, end: int) -> None:
        """Have all bytes before `end` in `data`."""
        if end <= len(self.data):
            return
        if end > self.file_bytes:
            raise self.fault(
                f"takes {end - self.at:,} bytes, but the file ends after {self.file_bytes - self.at:,}: "
                "it is damaged or was cut short; download it again"
            )
        if end > MAX_HEADER_BYTES:
            raise self.fault(
                f"takes {end - self.at:,} bytes, and metadata is over the limit of {MAX_HEADER_BYTES:,} that no real "
                "file comes near: the file is damaged; download it again"
            )
        ahead = min(max(end, _FIRST_BYTES, 2 * len(self.data)), self.file_bytes, MAX_HEADER_BYTES)
        while len(self.data) < ahead:
            piece = os.pread(self._descriptor, ahead - len(self.data), len(self.data))
            if not piece:
                raise self.fault("the file was cut short while it was read")
            self.data += piece

    def end(self) -> None:
        """Forget what was read ahead."""
        del self.data[self.at :]

    def _integer(self, size: int) -> int:
        start = self.at
        self.skip(size)
        return int.from_bytes(self.data[start : self.at], "little")


@dataclass(frozen=True, slots=True)
class Field:
    """Where a value lies: at `offset`, of an array its first element, and then `element` and `count` say of what."""

    kind: ValueType
    offset: int
    element: ValueType | None = None
    count: int = 0


def read_metadata(cursor: Cursor, num_keys: int) -> "Metadata":
    """Walk over `num_keys` keys and their values; raises ModelError where one reaches out of the file or is no value.

    The cursor's `data` must not change any more once the result is asked for values.
    """
    fields: dict[str, Field] = {}
    for index in range(num_keys):
        cursor.what = f"key {index + 1:,} of {num_keys:,}"
        key = cursor.text(_MAX_KEY_BYTES)
        cursor.what = f"key {key!r:.100}"
        if key in fields:
            raise cursor.fault("appears twice: the file is damaged or was edited badly; download it again")
        fields[key] = _walk_value(cursor, _value_type(cursor), depth=0)
    return Metadata(cursor.path, cursor.data, fields)


def _value_type(cursor: Cursor) -> ValueType:
    number = cursor.u32()
    try:
        return ValueType(number)
    except ValueError:
        raise cursor.fault(f"unknown value type {number:,}: the file is damaged or newer than this program") from None


def _walk_value(cursor: Cursor, kind: ValueType, depth: int) -> Field:
    start = cursor.at
    if kind == ValueType.STRING:
        cursor.skip(cursor.u64())
    elif kind == ValueType.ARRAY:
        return _walk_array(cursor, depth)
    else:
        cursor.skip(_SIZES[kind])
    return Field(kind, start)


def _walk_array(cursor: Cursor, depth: int) -> Field:
    cursor.num_arrays += 1
    if depth == _MAX_DEPTH or cursor.num_arrays > MAX_ARRAYS:
        raise cursor.fault(
            f"arrays nested more than {_MAX_DEPTH} deep, or more than {MAX_ARRAYS:,} of them: it is damaged"
        )
    element, count = _value_type(cursor), cursor.u64()
    left = cursor.file_bytes - cursor.at
    if count * _LEAST_BYTES[element] > left:
        raise cursor.fault(
            f"an array of {count:,} takes at least {count * _LEAST_BYTES[element]:,} bytes, but the file ends after "
            f"{left:,}: it is damaged or was cut short; download it again"
        )
    field = Field(ValueType.ARRAY, cursor.at, element, count)
    if element == ValueType.STRING:
        _walk_strings(cursor, count)
    elif element == ValueType.ARRAY:
        for _ in range(count):
            _walk_array(cursor, depth + 1)
    else:
        cursor.skip(count * _SIZES[element])
    return field


def _walk_strings(cursor: Cursor, count: int) -> None:
    """What `count` times skip(u64()) does, at a tenth of the time."""
    data, unpack, at = cursor.data, _U64.unpack_from, cursor.at
    loaded = len(data)
    for _ in range(count):
        if at + 8 > loaded:
            cursor.load(at + 8)
            loaded = len(data)
        at += 8 + unpack(data, at)[0]
    cursor.skip(at - cursor.at)


class Metadata:
    """A file's keys and values.

    Each accessor wants one type and a range, and raises ModelError with file, key and byte where the value is another.
    The `optional_` ones answer None where the key is absent.
    """

    def __init__(self, path: Path, data: bytes | bytearray, fields: dict[str, Field]) -> None:
        """`data` are the file's first bytes; all `fields` were proved to lie in them."""
        self.path = path
        self._data, self._fields = data, fields

    def __contains__(self, key: str) -> bool:
        return key in self._fields

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def fault(self, key: str, message: str) -> ModelError:
        """The error to raise about a key."""
        field = self._fields.get(key)
        place = f" at byte {field.offset:,}" if field else ""
        return ModelError(f"{self.path}: key {key!r:.100}{place}: {message}")

    def field(self, key: str) -> Field | None:
        """Type and place of a value."""
        return self._fields.get(key)

    def is_array(self, key: str) -> bool:
        """Whether the key is there and holds an array."""
        field = self._fields.get(key)
        return field is not None and field.kind == ValueType.ARRAY

    def check_count(self, key: str, low: int, high: int, of: str) -> None:
        """Raise ModelError for an array without `low` to `high` elements; that it is one, its accessor says."""
        field = self._fields.get(key)
        if field is None or field.element is None or low <= field.count <= high:
            return
        if low == high:
            raise self.fault(key, f"has {field.count:,} entries for {low:,} {of}")
        raise self.fault(key, f"{field.count:,} {of}, which must be {low:,} to {high:,}")

    def is_one_of(self, key: str, values: tuple[object, ...]) -> bool:
        """Whether the key holds one of these, none of which is an array."""
        field = self._required(key)
        return field.element is None and self._scalar(key, field) in values

    def shown(self, key: str) -> str:
        """The value as errors show it: an array's length and type, of all others at most 80 characters."""
        field = self._required(key)
        return self._type(field) if field.element is not None else f"{self._scalar(key, field)!r:.80}"

    def optional_text(self, key: str) -> str | None:
        """A string."""
        return self.text(key) if key in self._fields else None

    def text(self, key: str) -> str:
        """A string of at most `MAX_TEXT_BYTES`."""
        return str(self._scalar(key, self._typed(key, (ValueType.STRING,), "a string")))

    def optional_integer(self, key: str, low: int, high: int) -> int | None:
        """An integer of any width from `low` to `high`."""
        return self.integer(key, low, high) if key in self._fields else None

    def integer(self, key: str, low: int, high: int) -> int:
        """An integer of any width from `low` to `high`."""
        value = int(self._scalar(key, self._typed(key, _INTEGERS, "an integer")))
        if not low <= value <= high:
            raise self.fault(key, f"expected an integer from {low:,} to {high:,}, found {value:,}")
        return value

    def optional_number(self, key: str, low: float, high: float) -> float | None:
        """A finite number from `low` to `high`."""
        return self.number(key, low, high) if key in self._fields else None

    def number(self, key: str, low: float, high: float) -> float:
        """A finite number from `low` to `high`."""
        value = float(self._scalar(key, self._typed(key, (*_INTEGERS, *_FLOATS), "a number")))
        if not low <= value <= high or not math.isfinite(value):
            raise self.fault(key, f"expected a number from {low:g} to {high:g}, found {value:g}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """True or false; `default` where the key is absent."""
        if key not in self._fields:
            return default
        return bool(self._scalar(key, self._typed(key, (ValueType.BOOL,), "true or false")))

    def texts(self, key: str) -> list[str]:
        """An array of strings."""
        field = self._array(key, (ValueType.STRING,), "an array of strings")
        return self._strings(key, field.count, field.offset)

    def flags(self, key: str) -> tuple[bool, ...]:
        """An array of true and false, or of integers that are 0 or 1."""
        values = self._numbers(self._array(key, (ValueType.BOOL, *_INTEGERS), "an array of true and false"))
        if any(value not in (0, 1) for value in values):
            raise self.fault(key, "expected an array of true and false, found other numbers")
        return tuple(map(bool, values))

    def integers(self, key: str, low: int, high: int) -> tuple[int, ...]:
        """An array of integers from `low` to `high`."""
        values = self._numbers(self._array(key, _INTEGERS, "an array of integers"))
        if values and not low <= min(values) <= max(values) <= high:
            raise self.fault(
                key, f"expected integers from {low:,} to {high:,}, found {min(values):,} to {max(values):,}"
            )
        return values

    def numbers(self, key: str) -> tuple[float, ...]:
        """An array of floating-point numbers, which may be infinite or NaN."""
        return self._numbers(self._array(key, _FLOATS, "an array of floating-point numbers"))

    def _required(self, key: str) -> Field:
        field = self._fields.get(key)
        if field is None:
            raise self.fault(key, "is missing")
        return field

    def _typed(self, key: str, kinds: tuple[ValueType, ...], expected: str) -> Field:
        field = self._required(key)
        if field.kind not in kinds:
            raise self.fault(key, f"expected {expected}, found {self._type(field)}")
        return field

    def _array(self, key: str, elements: tuple[ValueType, ...], expected: str) -> Field:
        field = self._required(key)
        if field.element not in elements:
            raise self.fault(key, f"expected {expected}, found {self._type(field)}")
        return field

    @staticmethod
    def _type(field: Field) -> str:
        if field.element is None:
            return field.kind.name.lower()
        return f"an array of {field.count:,} {field.element.name.lower()}"

    def _scalar(self, key: str, field: Field) -> bool | int | float | str:
        """The value of a field that is no array."""
        if field.kind == ValueType.STRING:
            (num_bytes,) = _U64.unpack_from(self._data, field.offset)
            if num_bytes > MAX_TEXT_BYTES:
                raise self.fault(key, f"a string of {num_bytes:,} bytes is over the limit of {MAX_TEXT_BYTES:,}")
            return self._strings(key, 1, field.offset)[0]
        (value,) = struct.unpack_from("<" + _CODES[field.kind], self._data, field.offset)
        return value  # type: ignore[no-any-return]

    def _numbers(self, field: Field) -> tuple[Any, ...]:
        """The elements of an array of plain values."""
        assert field.element is not None
        return struct.unpack_from(f"<{field.count}{_CODES[field.element]}", self._data, field.offset)

    def _strings(self, key: str, count: int, at: int) -> list[str]:
        """The strings from byte `at` on."""
        data, unpack, found = self._data, _U64.unpack_from, []
        try:
            for _ in range(count):
                start = at + 8
                at = start + unpack(data, at)[0]
                found.append(data[start:at].decode())
        except UnicodeDecodeError:
            raise self.fault(key, f"the string that ends at byte {at:,} is not UTF-8") from None
        return found
