"""YAML text to plain data that remembers where each key and value stood. Runs in: anywhere; owns: nothing.

A configuration needs only a small, unsurprising part of YAML. Scalars follow YAML 1.2's core schema, not PyYAML's 1.1:
`no` and `on` are text, `010` is ten and `1_000` is text. Anchors, aliases, tags, merge keys, duplicate keys and several
documents in one file are refused, as are files too large or nested too deeply to be a configuration.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

MAX_BYTES = 256 * 1024
MAX_DEPTH = 32

_Mark = Any  # yaml.Mark; the C reader has one of its own

Path = tuple[str | int, ...]
Value = None | bool | int | float | str | list["Value"] | dict[str, "Value"]

_INT = re.compile(r"[-+]?[0-9]+")
_OCT = re.compile(r"0o[0-7]+")
_HEX = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: dict[str, bool | None] = {
    "": None, "~": None, "null": None, "Null": None, "NULL": None,
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Place:
    """Where something was written: a file with line and column (from 1), or the name of a command-line setting."""

    source: str
    line: int | None = None
    column: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}:{self.column}"


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong, and where. `path` is empty for faults of the text itself."""

    place: Place
    path: Path
    message: str

    def __str__(self) -> str:
        path = dotted(self.path)
        return f"{self.place}: error: {path + ': ' if path else ''}{self.message}"


@dataclass(slots=True)
class Document:
    """The data of one file, the place of every key and value, and which plain scalars may be interpolated as data."""

    source: str
    data: dict[str, Value] = field(default_factory=dict)
    keys: dict[Path, Place] = field(default_factory=dict)
    values: dict[Path, Place] = field(default_factory=dict)
    plain: set[Path] = field(default_factory=set)
    faults: list[Fault] = field(default_factory=list)

    def place_of(self, path: Path, *, key: bool = False) -> Place:
        """The place of `path`, or of the nearest thing around it that was written."""
        for length in range(len(path), 0, -1):
            tables = (self.keys, self.values) if key or length < len(path) else (self.values, self.keys)
            for table in tables:
                if path[:length] in table:
                    return table[path[:length]]
        return Place(self.source, 1, 1) if self.values else Place(self.source)


def dotted(path: Path) -> str:
    """`("server", "api_keys", 0, "key")` as `server.api_keys[0].key`; names that hold a dot are quoted."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            name = f'"{part}"' if "." in part or not part else part
            text += f".{name}" if text else name
    return text


def parse_scalar(text: str) -> Value:
    """The value of an unquoted scalar, after YAML 1.2's core schema (§10.3.2)."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text) if len(text) < 32 else text
    if _OCT.fullmatch(text):
        return int(text[2:], 8)
    if _HEX.fullmatch(text):
        return int(text[2:], 16)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


def parse_document(text: str, source: str) -> Document:
    """Read `text`; faults of the text are in the result's `faults`, together with all the data that could be read."""
    document = Document(source)
    if len(text.encode("utf-8", "replace")) > MAX_BYTES:
        document.faults.append(Fault(Place(source), (), f"larger than {MAX_BYTES // 1024} KiB: not a configuration"))
        return document
    try:
        _Builder(document, _checked(text)).build()
    except _Refused as refusal:
        document.faults.append(Fault(_place(source, refusal.mark), (), refusal.message))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = ", ".join(part for part in (error.context, error.problem) if part)
        document.faults.append(Fault(_place(source, mark), (), f"not valid YAML: {what}"))
    except yaml.YAMLError as error:
        document.faults.append(Fault(Place(source), (), f"not valid YAML: {str(error).splitlines()[0]}"))
    return document


class _Refused(Exception):
    def __init__(self, mark: _Mark, message: str) -> None:
        self.mark, self.message = mark, message


def _place(source: str, mark: _Mark) -> Place:
    if mark is None:
        return Place(source)
    return Place(source, mark.line + 1, mark.column + 1)


def _checked(text: str) -> Iterator[yaml.Event]:
    depth = 0
    documents = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise _Refused(event.start_mark, f"aliases (*{event.anchor}) are not supported: write the value out")
        if getattr(event, "anchor", None):
            raise _Refused(event.start_mark, "anchors (&name) are not supported: write the value out where it is used")
        tag = getattr(event, "tag", None)
        if tag is not None and tag != "!":
            raise _Refused(event.start_mark, "tags (!type) are not supported: put text in quotes instead")
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise _Refused(event.start_mark, "more than one document in the file: remove the '---'")
        if isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise _Refused(event.start_mark, f"nested more than {MAX_DEPTH} deep")
        elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            depth -= 1
        yield event


class _Builder:
    def __init__(self, document: Document, events: Iterator[yaml.Event]) -> None:
        self._document, self._events = document, events

    def build(self) -> None:
        for event in self._events:
            if isinstance(event, yaml.StreamStartEvent | yaml.DocumentStartEvent):
                continue
            if isinstance(event, yaml.StreamEndEvent):
                return
            value = self._value(event, ())
            break
        for _ in self._events:
            pass
        if isinstance(value, dict):
            self._document.data = value
        elif value is not None:
            place = self._document.values[()]
            self._document.faults.append(Fault(place, (), "expected 'name: value' pairs at the top level"))

    def _value(self, event: yaml.Event, path: Path) -> Value:
        self._document.values[path] = _place(self._document.source, event.start_mark)
        if isinstance(event, yaml.MappingStartEvent):
            return self._mapping(path)
        if isinstance(event, yaml.SequenceStartEvent):
            items: list[Value] = []
            while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
                items.append(self._value(event, (*path, len(items))))
            return items
        assert isinstance(event, yaml.ScalarEvent)
        if event.style is None:
            self._document.plain.add(path)
            return parse_scalar(event.value)
        return str(event.value)

    def _mapping(self, path: Path) -> dict[str, Value]:
        mapping: dict[str, Value] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            place = _place(self._document.source, event.start_mark)
            if not isinstance(event, yaml.ScalarEvent):
                raise _Refused(event.start_mark, "a key must be plain text")
            name = str(event.value)
            if name == "<<":
                raise _Refused(event.start_mark, "merge keys (<<) are not supported: write the values out")
            value_event = next(self._events)
            if name in mapping:
                first = self._document.keys[(*path, name)]
                message = f"duplicate key: first given on line {first.line}"
                self._document.faults.append(Fault(place, (*path, name), message))
                _Builder(Document(self._document.source), self._events)._value(value_event, path)
                continue
            self._document.keys[(*path, name)] = place
            mapping[name] = self._value(value_event, (*path, name))
        return mapping
