"""The small JSON files beside a tokenizer: added tokens, named special tokens, flags and chat templates, in old and
new Hugging Face forms, read once into one frozen record.

Precedence is transformers': `added_tokens_decoder` in tokenizer_config.json, and only where that is missing
special_tokens_map.json and added_tokens.json; a template file before a template inside the configuration.

Runs in: anywhere; owns: nothing.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekv.errors import ModelError

CONFIG_FILE = "tokenizer_config.json"
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MAX_FILE_BYTES = 256 << 20
MAX_TEMPLATE_CHARS = 1 << 20
# Real ones have some 30 characters each and, where a model also speaks or draws, a million together.
MAX_CONTROL_CHARS = 256
MAX_ALL_CONTROL_CHARS = 2 << 20
_MAX_SEARCHED_CHARS = 2 << 30  # a second or two; the largest real vocabulary and template come to a tenth of it


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token matched in the text before the tokenizer's own model sees it."""

    content: str
    special: bool = False
    normalized: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What the files beside tokenizer.json or tokenizer.model say.

    `added` is by id. `named` maps "bos_token" … to a text, as templates see them. `extra` are further special tokens.
    `add_bos`, `add_eos`, `legacy` and `add_prefix_space` are None where no file speaks of them.
    """

    tokenizer_class: str
    model_type: str
    added: dict[int, AddedToken]
    named: dict[str, str]
    extra: tuple[str, ...]
    add_bos: bool | None
    add_eos: bool | None
    legacy: bool | None
    add_prefix_space: bool | None
    chat_templates: dict[str, str]

    def control_ids(self, name: str, added: Mapping[int, AddedToken]) -> dict[str, int]:
        """The tokens whose text must never become their id when it comes from a person, by text.

        All special tokens; and of the others those written like one (`<|tool|>`) or named by the chat template
        (`<think>`), but not plain white space, which some vocabularies add as tokens.

        Raises:
            ModelError: control tokens longer, or more of them, than any real ones; `name` is what errors call the file.
        """
        plain = sum(not _looks_like_control(token) for token in added.values())
        if plain * sum(map(len, self.chat_templates.values())) > _MAX_SEARCHED_CHARS:
            raise ModelError(f"{name}: {plain:,} added tokens cannot be looked for in chat templates as long as these")
        control: dict[str, int] = {}
        total_chars = 0
        for token_id, token in added.items():
            text = token.content
            if not _looks_like_control(token) and not self._names(text):
                continue
            if len(text) > MAX_CONTROL_CHARS:
                raise ModelError(
                    f"{name}: token {token_id}: a control token of {len(text):,} characters, {text[:40]!r}…, is over "
                    f"the limit of {MAX_CONTROL_CHARS} that no real one comes near"
                )
            control[text] = token_id
            total_chars += len(text)
        if total_chars > MAX_ALL_CONTROL_CHARS:
            raise ModelError(
                f"{name}: its {len(control):,} control tokens have {total_chars:,} characters, over the limit of "
                f"{MAX_ALL_CONTROL_CHARS:,} that no real ones come near"
            )
        return control

    def _names(self, text: str) -> bool:
        return bool(text.strip()) and any(text in template for template in self.chat_templates.values())


def _looks_like_control(token: AddedToken) -> bool:
    content = token.content
    return token.special or (content.startswith(("<|", "<｜")) and content.endswith(("|>", "｜>")))


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Read what there is; missing files are empty ones.

    Raises:
        ModelError: a file that is not what it should be, with its name and the field.
    """
    config = read_json_object(folder / CONFIG_FILE)
    added = _added_tokens_decoder(config, folder / CONFIG_FILE)
    sources = [config]
    if added is None:
        special_map = read_json_object(folder / "special_tokens_map.json")
        sources.append(special_map)
        added = _legacy_added_tokens(folder / "added_tokens.json", [config, special_map])
    named: dict[str, str] = {}
    extra: list[str] = []
    for source in sources:
        for key, value in source.items():
            text = _token_text(value)
            if key in NAMED_TOKENS and text is not None:
                named[key] = text
            elif key in ("additional_special_tokens", "extra_special_tokens"):
                values = value.values() if isinstance(value, dict) else value or ()
                extra += [item for item in map(_token_text, values) if item is not None]
    model_type = read_json_object(folder / "config.json").get("model_type")
    tokenizer_class = config.get("tokenizer_class")
    return TokenizerFiles(
        tokenizer_class=tokenizer_class if isinstance(tokenizer_class, str) else "",
        model_type=model_type if isinstance(model_type, str) else "",
        added=added,
        named=named,
        extra=tuple(dict.fromkeys(extra)),
        add_bos=_flag(config, "add_bos_token"),
        add_eos=_flag(config, "add_eos_token"),
        legacy=_flag(config, "legacy"),
        add_prefix_space=_flag(config, "add_prefix_space"),
        chat_templates=_bounded(folder, _chat_templates(folder, config)),
    )


def read_text(path: Path) -> str:
    """A UTF-8 file of bounded size.

    Raises:
        ModelError: missing, too large or not UTF-8.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ModelError(f"{path}: larger than {MAX_FILE_BYTES:,} bytes")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ModelError(f"{path}: not UTF-8 at byte {error.start}") from error


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} where there is no such file.

    Raises:
        ModelError: not JSON, or not an object.
    """
    if not path.exists():
        return {}
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected an object, found {type(value).__name__}")
    return value


def _added_tokens_decoder(config: dict[str, Any], path: Path) -> dict[int, AddedToken] | None:
    entries = config.get("added_tokens_decoder")
    if entries is None:
        return None
    if not isinstance(entries, dict):
        raise ModelError(f"{path}: added_tokens_decoder: expected an object")
    added = {}
    for key, entry in entries.items():
        if not (isinstance(entry, dict) and isinstance(entry.get("content"), str) and key.isascii() and key.isdigit()):
            raise ModelError(f"{path}: added_tokens_decoder.{key}: expected an id and an object with content")
        added[int(key)] = added_token(entry)
    return added


def added_token(entry: dict[str, Any]) -> AddedToken:
    """An added token from its JSON form."""
    special = bool(entry.get("special", False))
    flags = {name: bool(entry.get(name, False)) for name in ("lstrip", "rstrip", "single_word")}
    return AddedToken(entry["content"], special, bool(entry.get("normalized", not special)), **flags)


def _legacy_added_tokens(path: Path, sources: Iterable[dict[str, Any]]) -> dict[int, AddedToken]:
    special: set[str | None] = set()
    for source in sources:
        special |= {_token_text(source.get(key)) for key in NAMED_TOKENS}
        extra = source.get("additional_special_tokens") or ()
        special |= set(map(_token_text, extra))
    added = {}
    for content, token_id in read_json_object(path).items():
        if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
            raise ModelError(f"{path}: {content!r}: expected a token id, found {token_id!r}")
        added[token_id] = AddedToken(content, content in special, content not in special)
    return added


def _token_text(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _flag(config: dict[str, Any], key: str) -> bool | None:
    value = config.get(key)
    return value if isinstance(value, bool) else None


def _bounded(folder: Path, templates: dict[str, str]) -> dict[str, str]:
    for name, text in templates.items():
        if len(text) > MAX_TEMPLATE_CHARS:
            what = f"chat template {name!r:.80}"
            raise ModelError(f"{folder}: {what}: longer than {MAX_TEMPLATE_CHARS:,} characters")
    return templates


def _chat_templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Templates by name. Files beat tokenizer_config.json, which beats chat_template.json (a processor's file)."""
    templates = {}
    if (folder / "chat_template.jinja").is_file():
        templates["default"] = read_text(folder / "chat_template.jinja")
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = read_text(path)
    if templates:
        return templates
    for name, source in ((CONFIG_FILE, config), ("chat_template.json", None)):
        value = (read_json_object(folder / name) if source is None else source).get("chat_template")
        match value:
            case None:
                continue
            case str(text):
                return {"default": text}
            case dict() if all(isinstance(text, str) for text in value.values()):
                return dict(value)
            case list() if all(
                isinstance(item, dict) and isinstance(item.get("name"), str) and isinstance(item.get("template"), str)
                for item in value
            ):
                return {item["name"]: item["template"] for item in value}
            case _:
                raise ModelError(f"{name}: chat_template: expected a text or a list of named templates")
    return {}
