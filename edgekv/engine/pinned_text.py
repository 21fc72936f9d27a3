"""The tokens of a pinned text: those that every prompt which begins with it has in common.

Runs in: anywhere; owns: nothing.

What follows a text changes how its end is rendered (a template may trim it, or put it into the user's turn) and how it
is tokenized (the last token may take in what comes next). So it is rendered with several continuations that have little
in common, the way that requests are, and what all of them begin with is taken.
"""

from collections.abc import Iterator
from itertools import takewhile

from edgekv.config.settings import PinnedPrompt as PinnedText
from edgekv.engine.pinned import PinnedPrompt, PinnedPromptRefused
from edgekv.text.chat_template import ChatTemplate
from edgekv.text.errors import TemplateError, TextError
from edgekv.text.tokenizer import Tokenizer

# A word, a capital, blanks, a digit, marks, other scripts: so that no two merge with what is before them alike.
CONTINUATIONS = ("you", "The", " of", "\nand", "7", "(", "...", "é", "水")


def encode_pinned(written: PinnedText, tokenizer: Tokenizer, template: ChatTemplate | None) -> PinnedPrompt:
    """What is to be pinned for an entry of the configuration. Raises PinnedPromptRefused."""
    try:
        text = written.content()
    except (OSError, ValueError) as error:
        raise PinnedPromptRefused(written.name, f"{written.file}: {error}") from error
    if written.file is not None:
        text = text.removesuffix("\n")  # editors put it there
    try:
        if written.raw:
            token_ids = raw_tokens(text, tokenizer)
        elif template is None:
            raise PinnedPromptRefused(
                written.name, "this model has no chat template. For /v1/completions pin it with raw: true."
            )
        else:
            token_ids = message_tokens(text, written.role, tokenizer, template)
    except TextError as error:
        why = str(error)
        if isinstance(error, TemplateError):
            other = "user" if written.role == "system" else "system"
            why = f"the chat template takes no {written.role} message ({why}). Try role: {other}, or raw: true."
        raise PinnedPromptRefused(written.name, why) from error
    return PinnedPrompt(
        name=written.name,
        token_ids=token_ids,
        ttl_s=None if written.ttl_s == "never" else written.ttl_s,
        priority=written.priority,
    )


def message_tokens(text: str, role: str, tokenizer: Tokenizer, template: ChatTemplate) -> tuple[int, ...]:
    """What conversations that begin with this message have in common, as the chat endpoint encodes them.

    Of a system message the first turns are compared: some templates (Mistral's from v3 on) put it before the latest
    user turn, so that later ones begin otherwise. A template that writes the date makes this true for today only.
    Raises TemplateError, and TextError as `encode` does.
    """
    first = {"role": role, "content": text}
    return _in_common(
        template.encode(tokenizer, [first, *turns], add_generation_prompt=True) for turns in _turns_after(role)
    )


def raw_tokens(text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """What prompts that begin with this text have in common, as the completions endpoint encodes them."""
    return _in_common(
        tokenizer.encode(text + continuation, add_special_tokens=True, parse_special=True)
        for continuation in CONTINUATIONS
    )


def _turns_after(role: str) -> Iterator[list[dict[str, str]]]:
    """What a conversation can go on with after its first message."""
    if role == "user":
        yield []
        for content in CONTINUATIONS:
            yield [{"role": "assistant", "content": content}, {"role": "user", "content": content}]
        return
    for content in CONTINUATIONS:
        yield [{"role": "user", "content": content}]


def _in_common(encoded: Iterator[list[int]]) -> tuple[int, ...]:
    columns = zip(*encoded, strict=False)
    return tuple(column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns))
