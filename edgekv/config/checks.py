"""What makes sense only across fields, and what this version cannot do yet. Runs in: anywhere; owns: nothing."""

import difflib
import ipaddress
from collections.abc import Iterable

from edgekv.config.document import Document, Fault, Path, Value
from edgekv.config.model_path import why_no_model
from edgekv.config.settings import MAX_PINNED_BYTES, Config, Model, PinnedPrompt
from edgekv.config.units import MIB

NOT_YET_FIELDS: tuple[tuple[str, ...], ...] = (
    ("kv", "tier"),
    ("logging", "prompts"),
)
NOT_YET_VALUES: tuple[tuple[tuple[str, ...], frozenset[str]], ...] = (
    (("models", "*", "load"), frozenset({"on-demand"})),
)


def take_out_unavailable(document: Document) -> None:
    """Refuse, by name, the settings of the design that do not work yet; each leaves the data."""
    for pattern in NOT_YET_FIELDS:
        for path, parent in _matches(document.data, pattern):
            del parent[str(path[-1])]
            _not_yet(document, path, "")
    for pattern, values in NOT_YET_VALUES:
        for path, parent in _matches(document.data, pattern):
            value = parent[str(path[-1])]
            if isinstance(value, str) and value in values:
                del parent[str(path[-1])]
                _not_yet(document, path, f"{value!r} is ")
    models = document.data.get("models")
    if isinstance(models, dict) and len(models) > 1:
        for name in list(models)[1:]:
            del models[name]
            _not_yet(document, ("models", name), "a second model is ")


def cross_checks(config: Config, written: dict[str, Value], *, files: bool) -> Iterable[tuple[Path, str]]:
    """Faults between fields that are each fine alone; `files` also looks whether the models exist.

    `config` may lack what is faulty; `written` still holds it, so that nothing is called missing that is only wrong.
    """
    yield from _server(config, written)
    yield from _names(config)
    named = written.get("devices")
    devices = ["auto", "cpu", *(named if isinstance(named, dict) else ())]
    for name, model in config.models.items():
        if model.device not in devices:
            hint = _did_you_mean(model.device, devices)
            yield ("models", name, "device"), f"no device {model.device!r}: name one of {', '.join(devices)}{hint}"
        if files and (fault := why_no_model(model.path)):
            yield ("models", name, "path"), fault
        yield from _draft(written, name, model, files=files)
        yield from _pinned(config, written, name, model, files=files)


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _server(config: Config, written: dict[str, Value]) -> Iterable[tuple[Path, str]]:
    server = config.server
    section = written.get("server")
    if not is_loopback(server.host) and not (isinstance(section, dict) and section.get("api_keys")):
        message = f"{server.host} can be reached from other machines: set server.api_keys, or use 127.0.0.1"
        yield ("server", "host"), message
    names: set[str] = set()
    secrets: set[str] = set()
    for index, key in enumerate(server.api_keys):
        if key.name in names:
            yield ("server", "api_keys", index, "name"), f"{key.name!r} is the name of an earlier key"
        if key.key.get_secret_value() in secrets:
            yield ("server", "api_keys", index, "key"), "the same secret as an earlier key's"
        names.add(key.name)
        secrets.add(key.key.get_secret_value())


def _names(config: Config) -> Iterable[tuple[Path, str]]:
    owner = {name: name for name in config.models}
    for name in config.devices:
        if name in ("auto", "cpu"):
            yield ("devices", name), f"{name!r} has a meaning of its own: choose another name"
    for name, model in config.models.items():
        for index, alias in enumerate(model.aliases):
            if alias in owner:
                taken = "is a model's name" if owner[alias] == alias else f"is already an alias of {owner[alias]!r}"
                yield ("models", name, "aliases", index), f"{alias!r} {taken}"
            owner.setdefault(alias, name)


def _pinned(
    config: Config, written: dict[str, Value], model_name: str, model: Model, *, files: bool
) -> Iterable[tuple[Path, str]]:
    names: set[str] = set()
    for index, prompt in enumerate(model.pinned_prompts):
        path: Path = ("models", model_name, "pinned_prompts", index)
        if prompt.name in names:
            yield (*path, "name"), f"{prompt.name!r} is the name of an earlier pinned prompt"
        names.add(prompt.name)
        given = {"file", "text"} & _keys(written, path)
        if len(given) != 1:
            yield path, "give either 'file' or 'text'" + (", not both" if given else "")
        if prompt.raw and "role" in prompt.model_fields_set:
            yield (*path, "role"), "a raw prompt is nobody's message: leave 'role' or 'raw' out"
        if files and prompt.file is not None:
            fault = _unreadable(prompt)
            if fault:
                yield (*path, "file"), fault
    if model.pinned_prompts and not config.kv.prefix_cache:
        yield ("models", model_name, "pinned_prompts"), "they live in the prefix cache, and kv.prefix_cache is off"


def _draft(written: dict[str, Value], model_name: str, model: Model, *, files: bool) -> Iterable[tuple[Path, str]]:
    draft, where = model.draft, ("models", model_name, "draft")
    if draft is None:
        return
    given = _keys(written, where)
    if "method" in given - draft.model_fields_set:
        return  # whatever else it needs depends on that
    if draft.method == "model" and draft.path is None and "path" not in given - draft.model_fields_set:
        message = "which model drafts? Give its 'path', or write 'method: ngram', or 'draft: off' for nobody"
        yield (*where, "path") if "path" in given else where, message
    if draft.method == "ngram":
        for key in sorted(given & {"path", "kv"}):
            yield (*where, key), "n-grams need no model and no memory for one: leave it out, or set 'method: model'"
    elif draft.method == "model" and files and draft.path is not None and (fault := why_no_model(draft.path)):
        yield (*where, "path"), fault


def _keys(written: Value, path: Path) -> set[str]:
    """The keys of the mapping at `path`."""
    node = written
    for part in path:
        if isinstance(node, dict) and isinstance(part, str):
            node = node.get(part)
        elif isinstance(node, list) and isinstance(part, int) and part < len(node):
            node = node[part]
    return set(node) if isinstance(node, dict) else set()


def _unreadable(prompt: PinnedPrompt) -> str:
    file = prompt.file
    assert file is not None
    try:
        if not file.is_file():
            return f"{file}: {'not a file' if file.exists() else 'no such file'}"
        if file.stat().st_size > MAX_PINNED_BYTES:
            return f"{file}: larger than {MAX_PINNED_BYTES // MIB} MiB, which no context holds"
        if not prompt.content().strip():
            return f"{file}: empty"
    except UnicodeDecodeError:
        return f"{file}: not UTF-8 text"
    except OSError as error:
        return f"{file}: cannot be read: {error.strerror or error}"
    return ""


def _matches(data: dict[str, Value], pattern: tuple[str, ...]) -> list[tuple[Path, dict[str, Value]]]:
    found: list[tuple[Path, dict[str, Value]]] = [((), data)]
    for depth, part in enumerate(pattern):
        last = depth == len(pattern) - 1
        deeper: list[tuple[Path, dict[str, Value]]] = []
        for path, parent in found:
            for name in list(parent) if part == "*" else [part] if part in parent else []:
                value = parent[name]
                if last:
                    deeper.append(((*path, name), parent))
                elif isinstance(value, dict):
                    deeper.append(((*path, name), value))
        found = deeper
    return found


def _not_yet(document: Document, path: Path, what: str) -> None:
    message = f"{what}not available yet in this version"
    document.faults.append(Fault(document.place_of(path, key=not what), path, message))


def _did_you_mean(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
