"""From a file, the environment and the command line to a `Config`, or every fault. Runs in: anywhere; owns: nothing."""

import copy
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from edgekv.config.checks import cross_checks, take_out_unavailable
from edgekv.config.document import MAX_DEPTH, Document, Fault, parse_document
from edgekv.config.document import Path as Where
from edgekv.config.overrides import apply_environment, apply_settings, interpolate
from edgekv.config.settings import Config, section_of
from edgekv.errors import ConfigError


def load_config(
    path: Path | None,
    overrides: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    *,
    warn: Callable[[str], None] | None = None,
    check_files: bool = True,
    further: Callable[[Config], Iterable[tuple[Where, str]]] | None = None,
) -> Config:
    """The configuration in `path` (None: all defaults) under `environ` under `overrides` (`server.port=9000`).

    Relative paths are relative to the file's folder. `warn` hears of what has no effect. `further` knows more than a
    configuration tells, and finds faults (where, and what) in one that is sound by itself. Raises ConfigError with
    every fault there is.
    """
    document = _read(path)
    apply_settings(document, list(overrides))
    warnings = apply_environment(document, _without(environ or {}, document))
    interpolate(document, environ or {})
    take_out_unavailable(document)
    config = _validate(document, path.parent.absolute() if path else Path.cwd(), check_files=check_files)
    if further is not None and not document.faults:
        document.faults += [Fault(document.place_of(where), where, message) for where, message in further(config)]
    if document.faults:
        ordered = sorted(document.faults, key=lambda fault: (fault.place.line or 0, fault.place.column or 0))
        raise ConfigError(list(dict.fromkeys(str(fault) for fault in ordered)))
    for warning in warnings:
        if warn is not None:
            warn(warning)
    return config


def json_schema() -> dict[str, Any]:
    """The JSON schema of a configuration file, for editors."""
    schema = Config.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "edgekv configuration"}


def _read(path: Path | None) -> Document:
    if path is None:
        return Document("defaults")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError([f"{path}: error: cannot be read: {error.strerror or error}"]) from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError([f"{path}:{line}:1: error: not UTF-8 text"]) from None
    return parse_document(text, str(path))


def _without(environ: Mapping[str, str], document: Document) -> Mapping[str, str]:
    """The variables that no `--set` overrides: the command line wins."""
    given = {str(place) for place in document.values.values()}
    settled = {"EDGEKV_" + source[6:].replace(".", "__").upper() for source in given if source.startswith("--set ")}
    return {name: value for name, value in environ.items() if name not in settled}


def _validate(document: Document, base: Path, *, check_files: bool) -> Config:
    """Validate, then cross-check what is sound: pydantic would keep those faults back until the others are gone."""
    data: Any = copy.deepcopy(document.data)
    config = Config()
    for attempt in range(MAX_DEPTH):
        try:
            config = Config.model_validate(data, context={"base": base})
            break
        except ValidationError as error:
            found = [(_data_path(detail["loc"], data), detail) for detail in error.errors(include_url=False)]
            if attempt == 0:
                document.faults += [_fault(document, path, detail) for path, detail in found]
            for path, _detail in found:
                _prune(data, path)
    faulty = [fault.path for fault in document.faults]
    for path, message in cross_checks(config, document.data, files=check_files):
        if not any(path[: len(known)] == known for known in faulty if known):
            document.faults.append(Fault(document.place_of(path), path, message))
    return config


def _data_path(loc: tuple[int | str, ...], data: Any) -> Where:
    """Where in the data pydantic's location lies: it appends names of union members, which are no keys."""
    path: list[int | str] = []
    for part in loc:
        if isinstance(data, dict):
            path.append(part)
            if part not in data:
                break
            data = data[part]
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            path.append(part)
            data = data[part]
        else:
            break
    return tuple(path)


def _prune(data: Any, path: Where) -> None:
    """Take the faulty value at `path` out of a copy; a missing one takes its section, one in a list the list."""
    parents: list[tuple[dict[str, Any], str]] = []
    for part in path:
        if isinstance(data, dict):
            if part not in data:
                break
            parents.append((data, str(part)))
            data = data[part]
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
            if not isinstance(data, dict | list):
                break
    if parents:
        parent, name = parents[-1]
        parent.pop(name, None)


def _fault(document: Document, path: Where, detail: ErrorDetails) -> Fault:
    kind, given, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        name = str(path[-1])
        near = difflib.get_close_matches(name, _known_keys(path[:-1]), n=1)
        message = f"unknown key {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")
        return Fault(document.place_of(path, key=True), path, message)
    if kind == "missing":
        wanted = ": a folder, a .gguf file, or demo" if path[0] == "models" and path[2:] == ("path",) else ""
        return Fault(document.place_of(path[:-1], key=True), path, f"required, but not given{wanted}")
    if path[:2] == ("server", "api_keys") and path[-1] == "key":
        given = "…"
    return Fault(document.place_of(path), path, _message(kind, given, context, detail["msg"]))


def _message(kind: str, given: object, context: dict[str, Any], otherwise: str) -> str:
    expected = {
        "int_type": "a whole number", "string_type": "text (put it in quotes)", "bool_type": "true or false",
        "tuple_type": "a list", "dict_type": "'name: value' pairs", "model_type": "'name: value' pairs",
        "model_attributes_type": "'name: value' pairs", "float_type": "a number",
    }.get(kind)  # fmt: skip
    if expected is not None:
        return f"expected {expected}, not {_shown(given)}"
    match kind:
        case "value_error":
            return str(context["error"])
        case "literal_error":
            words = [word.strip(" '") for word in str(context["expected"]).replace(" or ", ",").split(",")]
            near = difflib.get_close_matches(str(given), words, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            return f"expected {context['expected']}, not {_shown(given)}{hint}"
        case "greater_than_equal":
            return f"must be at least {context['ge']}, not {_shown(given)}"
        case "less_than_equal":
            return f"must be at most {context['le']}, not {_shown(given)}"
        case "string_too_short" | "too_short":
            shortest = context["min_length"]
            return "must not be empty" if shortest == 1 else f"must have at least {shortest} characters"
        case "string_too_long" | "too_long":
            return f"must have at most {context['max_length']} characters"
    return otherwise[:1].lower() + otherwise[1:]


def _shown(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    return repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "…'"


def _known_keys(path: Where) -> list[str]:
    annotation: Any = Config
    for part in path:
        if (section := section_of(annotation)) is not None:
            fields = {info.alias or name: info for name, info in section.model_fields.items()}
            annotation = fields[str(part)].annotation if part in fields else None
        else:
            annotation = get_args(annotation)[-1 if isinstance(part, str) else 0]
    section = section_of(annotation)
    return [] if section is None else [info.alias or name for name, info in section.model_fields.items()]
