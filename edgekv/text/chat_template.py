"""Chat templates: messages to a prompt, byte for byte as transformers' `apply_chat_template`, and to token ids in
which control tokens come from the template only.

Runs in: anywhere, several threads at once; owns: the compiled templates.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2

from edgekv.config.model_path import gguf_at
from edgekv.errors import ModelError
from edgekv.text.control_text import free_marks
from edgekv.text.errors import TemplateError
from edgekv.text.template_costs import LimitExceeded, Limits
from edgekv.text.template_sandbox import TemplateEnvironment
from edgekv.text.tokenizer import Tokenizer
from edgekv.text.tokenizer_files import MAX_TEMPLATE_CHARS, read_tokenizer_files

_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """The templates of one model, by name: "default", and perhaps "tool_use" for requests with tools.

    Args:
        sources: jinja texts by name.
        variables: "bos_token" … as the templates see them.
        limits: the box each rendering runs in.

    Raises:
        TemplateError: a template that cannot be compiled.
    """

    def __init__(
        self, sources: Mapping[str, str], variables: Mapping[str, str] | None = None, *, limits: Limits | None = None
    ) -> None:
        environment = TemplateEnvironment(limits or Limits())
        environment.add_filter("tojson", _tojson)
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._environment = environment
        self._variables = dict(variables or {})
        self._sources = dict(sources)
        self._templates: dict[str, jinja2.Template] = {}
        for name, source in sources.items():
            if len(source) > MAX_TEMPLATE_CHARS:
                raise TemplateError(f"chat template {name!r}: longer than {MAX_TEMPLATE_CHARS:,} characters")
            try:
                self._templates[name] = environment.from_string(source)
            except jinja2.TemplateSyntaxError as error:
                raise TemplateError(f"chat template {name!r}: line {error.lineno}: {error.message}") from error
            except Exception as error:  # a template is somebody else's program
                raise TemplateError(f"chat template {name!r}: {type(error).__name__}: {error}") from error

    @property
    def sources(self) -> Mapping[str, str]:
        """The jinja texts by name."""
        return self._sources

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt as text.

        Args:
            messages: JSON objects; keys whose value is None count as missing.
            add_generation_prompt: end with the beginning of the assistant's answer.
            tools: JSON schemas of functions.
            **kwargs: further variables of the template ("enable_thinking", "documents" …).

        Raises:
            TemplateError: with the template's own message where it refuses the messages.
        """
        if not messages:
            raise TemplateError("The conversation is empty: give at least one message.")
        chat = [
            _with_reasoning({key: item for key, item in message.items() if item is not None})
            for message in map(_plain, messages)
        ]
        variables = {"documents": None, **self._variables, **_plain(kwargs)}
        variables |= {
            "messages": chat,
            "tools": None if tools is None else _plain(tools),
            "add_generation_prompt": add_generation_prompt,
        }
        return self._run(self._choose(tools is not None), variables)

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """The prompt as token ids, those of transformers' `apply_chat_template(tokenize=True)`.

        Nothing is put before what the template writes. Text inside messages, tools or variables that spells a control
        token is encoded as ordinary text.

        Raises:
            TemplateError: as in `render`.
            TextError: the prompt is too long, or not Unicode.
        """
        control = tokenizer.control_text
        text = self.render(messages, add_generation_prompt=add_generation_prompt, tools=tools, **kwargs)
        inputs = [messages, tools, kwargs]
        if not control.occurs_in(inputs):
            return tokenizer.encode(text, add_special_tokens=False, parse_special=True)
        marks = free_marks([inputs, self._sources])
        marked = self.render(
            control.mark(messages, marks),
            add_generation_prompt=add_generation_prompt,
            tools=control.mark(tools, marks),
            **control.mark(kwargs, marks),
        )
        unmarked, written, others = control.unmark(marked, marks)
        if unmarked != text:
            # A template that trims around control text leaves white space beside a mark. If it did more, what it
            # made of the marked messages is the prompt whose control tokens we know.
            carried = control.carry_over(written, unmarked, text)
            if carried is None:
                text = unmarked
            else:
                written, others = carried, True
        if not others:
            return tokenizer.encode(text, add_special_tokens=False, parse_special=True)
        return tokenizer.encode_parts(text, written)

    def _choose(self, with_tools: bool) -> jinja2.Template:
        name = "tool_use" if with_tools and "tool_use" in self._templates else "default"
        template = self._templates.get(name)
        if template is None:
            raise TemplateError(f"There is no default chat template, only {', '.join(sorted(self._templates))}.")
        return template

    def _run(self, template: jinja2.Template, variables: dict[str, Any]) -> str:
        environment = self._environment
        try:
            with environment.budget():
                parts = []
                for part in template.generate(variables):
                    environment.step(len(part))
                    parts.append(part)
                return "".join(parts)
        except LimitExceeded as error:
            raise TemplateError(f"The chat template was stopped: {error}.") from error
        except jinja2.TemplateError as error:
            raise TemplateError(str(error) or "The chat template refused these messages.") from error
        except Exception as error:  # a template is somebody else's program: whatever it does wrong ends here
            raise TemplateError(
                f"The chat template failed on these messages: {type(error).__name__}: {error}"
            ) from error


def load_chat_template(folder: Path, *, limits: Limits | None = None) -> ChatTemplate | None:
    """The chat template of a model folder or a GGUF file, None if it has none.

    Raises:
        ModelError: a template or a file beside it that is broken, by name.
    """
    if (file := gguf_at(folder)) is not None:
        from edgekv.text.gguf_tokenizer import read_gguf_template_files

        files = read_gguf_template_files(file)
    else:
        files = read_tokenizer_files(folder)
    if not files.chat_templates:
        return None
    named = dict(files.named)
    if files.tokenizer_class.removesuffix("Fast") == "LlamaTokenizer":
        named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | named
    try:
        return ChatTemplate(files.chat_templates, named, limits=limits)
    except TemplateError as error:
        raise ModelError(f"{folder}: {error}") from error


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Put the reasoning of an answer under each of the names that templates read."""
    reasoning = next((message[key] for key in _REASONING_FIELDS if message.get(key) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _plain(value: Any) -> Any:
    """A deep copy of JSON types; anything else has no place in a template."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return str.__str__(value)
    return f"<{type(value).__name__}>"


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    if len(form) > 1000 or any(sum(map(str.isdigit, field[:6])) > 3 for field in form.split("%")[1:]):
        raise LimitExceeded("a date format that is too long")
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
