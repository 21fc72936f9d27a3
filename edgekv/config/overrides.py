"""Settings from the environment and the command line, laid over a document. Runs in: anywhere; owns: nothing.

`EDGEKV_SERVER__PORT=9000` and `--set server.port=9000` say the same. Their values are read as YAML, so numbers
are numbers and lists can be given; `${env:NAME}` inside any text is replaced by that variable.
"""

import difflib
import re
from collections.abc import Mapping
from typing import Any, get_args

from edgekv.config.document import Document, Fault, Path, Place, Value, parse_document, parse_scalar
from edgekv.config.draft_forms import SHORT_FORMS
from edgekv.config.settings import Config, section_of

ENV_PREFIX = "EDGEKV_"
# No settings: what `edgekv status` presents, and where the CPU kernels come from.
NO_SETTINGS = ("EDGEKV_KEY", "EDGEKV_CPU_KERNELS")
_REFERENCE = re.compile(r"\$\{env:([A-Za-z_][A-Za-z0-9_]*)\}")
_PART = re.compile(r'"([^"]+)"|([^."\[\]]+)')


def apply_settings(document: Document, settings: list[str]) -> None:
    """Lay each `path=value` of `--set` over the document; bad ones become faults."""
    for setting in settings:
        name, equals, text = setting.partition("=")
        source = f"--set {name}"
        path = _split(name)
        if not equals or path is None:
            document.faults.append(Fault(Place(f"--set {setting}"), (), "expected path=value, as in server.port=9000"))
            continue
        _place_value(document, _spell(path, document.data), text, source)


def apply_environment(document: Document, environ: Mapping[str, str]) -> list[str]:
    """Lay every `EDGEKV_…` variable over the document; the result warns of those that match no setting."""
    referred = set(_referred(document.data))
    warnings: list[str] = []
    for name in sorted(environ):
        if not name.startswith(ENV_PREFIX) or name in referred or name in NO_SETTINGS:
            continue
        parts = tuple(part.lower() for part in name[len(ENV_PREFIX) :].split("__"))
        path = _spell(parts, document.data)
        if not all(parts) or not _exists(path):
            near = difflib.get_close_matches(name, _variables(), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            warnings.append(f"the environment variable {name} matches no setting and has no effect{hint}")
            continue
        _place_value(document, path, environ[name], name)
    return warnings


def interpolate(document: Document, environ: Mapping[str, str]) -> None:
    """Replace every `${env:NAME}`. An unquoted value that is one reference alone is read as YAML; else it is text."""

    def visit(value: Value, path: Path) -> Value:
        if isinstance(value, dict):
            return {name: visit(item, (*path, name)) for name, item in value.items()}
        if isinstance(value, list):
            return [visit(item, (*path, index)) for index, item in enumerate(value)]
        if not isinstance(value, str) or "${" not in value:
            return value
        unknown = re.sub(_REFERENCE, "", value)
        if "${" in unknown:
            message = f"{value!r} is not understood: only ${{env:NAME}} can be interpolated"
            document.faults.append(Fault(document.place_of(path), path, message))
            return value
        missing = [name for name in _REFERENCE.findall(value) if name not in environ]
        if missing:
            message = f"the environment variable {missing[0]} is not set"
            document.faults.append(Fault(document.place_of(path), path, message))
            return value
        text = _REFERENCE.sub(lambda match: environ[match[1]], value)
        return parse_scalar(text) if path in document.plain and _REFERENCE.fullmatch(value) else text

    document.data = {name: visit(value, (name,)) for name, value in document.data.items()}


def _split(name: str) -> tuple[str, ...] | None:
    parts: list[str] = []
    end = 0
    for match in _PART.finditer(name):
        if name[end : match.start()] != ("." if parts else ""):
            return None
        parts.append(match[1] or match[2])
        end = match.end()
    return tuple(parts) if parts and end == len(name) else None


def _spell(path: tuple[str, ...], data: Value) -> tuple[str, ...]:
    """`path` with every name as the document spells it: environment variables know neither case nor dashes."""
    spelled: list[str] = []
    for part in path:
        if isinstance(data, dict) and part not in data:
            loose = part.lower().replace("-", "_")
            part = next((name for name in data if name.lower().replace("-", "_").replace(".", "_") == loose), part)
        data = data.get(part) if isinstance(data, dict) else None
        spelled.append(part)
    return tuple(spelled)


def _place_value(document: Document, path: tuple[str, ...], text: str, source: str) -> None:
    parsed = parse_document(f"value: {text}\n", source)
    if parsed.faults or parsed.data.keys() != {"value"}:
        parsed = Document(source, {"value": text})
    node: dict[str, Value] = document.data
    for part in path[:-1]:
        inner = node.get(part)
        if part == "draft" and inner in SHORT_FORMS:
            inner = {"method": inner}  # which another of its settings is laid beside
        elif not isinstance(inner, dict):
            inner = {}
        node[part] = inner
        node = inner
    node[path[-1]] = parsed.data["value"]
    for table in (document.keys, document.values):
        for known in [known for known in table if known[: len(path)] == path]:
            del table[known]
        table[path] = Place(source)
    document.plain.add(path)


def _exists(path: tuple[str, ...]) -> bool:
    annotation: Any = Config
    for part in path:
        if (section := section_of(annotation)) is not None:
            fields = {info.alias or name: info for name, info in section.model_fields.items()}
            if part not in fields:
                return False
            annotation = fields[part].annotation
        elif getattr(annotation, "__origin__", None) is dict:
            annotation = get_args(annotation)[1]
        else:
            return False
    return True


def _variables() -> list[str]:
    def walk(annotation: Any, prefix: str) -> list[str]:
        if (section := section_of(annotation)) is None:
            return [prefix]
        names: list[str] = []
        for name, info in section.model_fields.items():
            separator = "" if prefix == ENV_PREFIX else "__"
            names += walk(info.annotation, f"{prefix}{separator}{(info.alias or name).upper()}")
        return names

    return walk(Config, ENV_PREFIX)


def _referred(value: Value) -> list[str]:
    if isinstance(value, dict):
        return [name for item in value.values() for name in _referred(item)]
    if isinstance(value, list):
        return [name for item in value for name in _referred(item)]
    return _REFERENCE.findall(value) if isinstance(value, str) else []
