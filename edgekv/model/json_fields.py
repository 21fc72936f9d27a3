"""JSON of a model folder, read strictly: size-capped, no duplicate keys, every field typed and bounded.

Runs in: anywhere; owns: nothing. Every fault is a ModelError that names the file and the field.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from edgekv.errors import ModelError

T = TypeVar("T")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the name {name[:80]!r} appears twice")
            seen.add(name)
    return found


def _no_constant(text: str) -> object:
    raise ValueError(f"{text} is not JSON")


def parse_object(text: bytes | bytearray, origin: str) -> dict[str, object]:
    """The JSON object in `text`; raises ModelError that starts with `origin`."""
    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise ModelError(f"{origin}: not usable JSON: nested too deeply") from None
    except ValueError as fault:  # covers UnicodeDecodeError, JSONDecodeError and integers of too many digits
        raise ModelError(f"{origin}: not usable JSON: {fault}") from None
    if not isinstance(found, dict):
        raise ModelError(f"{origin}: expected a JSON object, found {type(found).__name__}")
    return found


def read_object(path: Path, max_bytes: int) -> dict[str, object]:
    """The JSON object in the file; raises ModelError where it is missing, unreadable, too large or no object."""
    try:
        with path.open("rb") as file:
            text = file.read(max_bytes + 1)
    except OSError as fault:
        raise ModelError(f"{path}: cannot be read: {fault.strerror or fault}") from None
    if len(text) > max_bytes:
        raise ModelError(f"{path}: larger than {max_bytes:,} bytes, which no real one is")
    return parse_object(text, str(path))


class Fields:
    """The fields of one JSON object.

    `integer`, `number`, `text` want the field; the `optional_` forms answer None where it is absent or null.
    """

    def __init__(self, origin: str, values: dict[str, object], path: str = "") -> None:
        """`origin` is the file, `path` the place of this object in it ("rope_scaling.")."""
        self.origin, self.values, self._path = origin, values, path

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def fault(self, name: str, message: str) -> ModelError:
        """The error to raise about a field."""
        return ModelError(f"{self.origin}: field '{self._path}{name}': {message}")

    def _required(self, name: str, value: T | None) -> T:
        if value is None:
            raise self.fault(name, "is null" if name in self.values else "is missing")
        return value

    def optional_integer(self, name: str, low: int, high: int) -> int | None:
        """An integer from `low` to `high`."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.fault(name, f"expected an integer from {low:,} to {high:,}, found {value!r:.80}")
        return value

    def integer(self, name: str, low: int, high: int) -> int:
        """An integer from `low` to `high`."""
        return self._required(name, self.optional_integer(name, low, high))

    def optional_number(self, name: str, low: float, high: float) -> float | None:
        """A finite number from `low` to `high`."""
        value = self.values.get(name)
        if value is None:
            return None
        fits = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
        if not fits or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.fault(name, f"expected a number from {low:g} to {high:g}, found {value!r:.80}")
        return float(value)

    def number(self, name: str, low: float, high: float) -> float:
        """A finite number from `low` to `high`."""
        return self._required(name, self.optional_number(name, low, high))

    def flag(self, name: str, default: bool) -> bool:
        """True or false; `default` where absent or null."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fault(name, f"expected true or false, found {value!r:.80}")
        return value

    def optional_text(self, name: str) -> str | None:
        """A string."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, str):
            raise self.fault(name, f"expected a string, found {value!r:.80}")
        return value

    def texts(self, name: str) -> list[str]:
        """A list of strings."""
        value = self._required(name, self.values.get(name))
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.fault(name, f"expected a list of strings, found {value!r:.80}")
        return value

    def optional_object(self, name: str) -> "Fields | None":
        """A nested object."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.fault(name, f"expected an object, found {value!r:.80}")
        return Fields(self.origin, value, f"{self._path}{name}.")

    def only(self, known: Iterable[str]) -> None:
        """Refuses fields that are not `known`: for objects where an ignored field would change the result."""
        for name in self.values.keys() - set(known):
            raise self.fault(name, "is not supported")
