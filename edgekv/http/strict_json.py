"""JSON as RFC 8259 means it, with bounds. Runs in: anywhere; owns: nothing.

Python's parser takes the last of two equal keys, reads NaN, Infinity and 1e999, makes integers of any length and
passes unpaired surrogates on to whoever encodes them later. All are refused here, and the message names the field.
"""

import json
import math
import re
from typing import Any

MAX_DEPTH = 32
MAX_CONTAINERS = 50_000
MAX_MEMBERS = 2_048
MAX_DIGITS = 1_000
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1

# One pass over the text before it is parsed: whole strings are skipped, brackets counted, and runs of digits that
# could pass 64 bits looked at. A string that never ends matches no alternative and is left to the parser.
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*+"|[\[{]|[\]}]|[0-9]{19,}', re.DOTALL)
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile("[\ud800-\udfff]")


class StrictJsonError(ValueError):
    """The text is not JSON that we take; `param` is the path of the offending value where it is known."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class _NonFinite:
    """Stands where a number was that is no finite double, until its path is known."""


def parse(body: bytes) -> Any:
    """The value that `body` holds. Raises `StrictJsonError`; the work is linear in the size of `body`."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise StrictJsonError(f"The body is not valid UTF-8 (byte {error.start}).") from None
    suspicious = _check_bounds(text) or _SURROGATE_ESCAPE.search(text) is not None

    def non_finite(_: str) -> _NonFinite:
        nonlocal suspicious
        suspicious = True
        return _NonFinite()

    def real(literal: str) -> float | _NonFinite:
        number = float(literal)
        return number if math.isfinite(number) else non_finite(literal)

    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_float=real, parse_constant=non_finite)
    except json.JSONDecodeError as error:
        raise StrictJsonError(
            f"The body is not valid JSON: {error.msg} (line {error.lineno}, column {error.colno})."
        ) from None
    if suspicious:  # only then is every value looked at once more, to name the one at fault
        _check_values(value, "")
    return value


def _check_bounds(text: str) -> bool:
    """Whether there is a number long enough to pass 64 bits. Raises `StrictJsonError` for too much of anything."""
    depth = containers = 0
    has_long_number = False
    for match in _TOKEN.finditer(text):
        first = text[match.start()]
        if first == '"':
            continue
        if first in "[{":
            depth += 1
            containers += 1
            if depth > MAX_DEPTH:
                raise StrictJsonError(f"The body nests deeper than {MAX_DEPTH} levels.")
            if containers > MAX_CONTAINERS:
                raise StrictJsonError(f"The body has more than {MAX_CONTAINERS:,} arrays and objects.")
        elif first in "]}":
            depth -= 1
        elif match.end() - match.start() > MAX_DIGITS:
            raise StrictJsonError(
                f"The body has a number of more than {MAX_DIGITS} digits (character {match.start()})."
            )
        else:
            has_long_number = True
    return has_long_number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_MEMBERS:
        raise StrictJsonError(f"The body has an object of more than {MAX_MEMBERS:,} members.")
    members = dict(pairs)
    if len(members) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                name = _SURROGATE.sub("\ufffd", key[:64])
                raise StrictJsonError(f"The key '{name}' appears twice in one object.", name)
            seen.add(key)
    return members


def _check_values(value: Any, path: str) -> None:
    if isinstance(value, dict):
        for key, member in value.items():
            if _SURROGATE.search(key):
                raise StrictJsonError("A key holds an unpaired surrogate.", path or None)
            _check_values(member, f"{path}.{key[:64]}" if path else key[:64])
    elif isinstance(value, list):
        for index, member in enumerate(value):
            _check_values(member, f"{path}[{index}]")
    elif isinstance(value, _NonFinite):
        raise StrictJsonError(
            f"'{path}' must be a finite number." if path else "The body must be a JSON object.", path or None
        )
    elif isinstance(value, int) and not INT64_MIN <= value <= INT64_MAX:
        raise StrictJsonError(f"'{path}' must be an integer of 64 bits.", path or None)
    elif isinstance(value, str) and _SURROGATE.search(value):
        raise StrictJsonError(f"'{path}' holds an unpaired surrogate.", path or None)
