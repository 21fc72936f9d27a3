"""A small template language: the corpus is written in it.

``{a|b|c}`` picks one of its parts (they may nest, and a part may be empty), ``[name]`` is a slot, ``[Name]`` the
same slot with a capital, and ``[+grow]`` is a verb that agrees with the slots' subject. A slot holds a string or a
tuple to pick from, and its value may itself hold templates. ``a(n)`` becomes a or an by the letter that follows.

Runs in: anywhere; owns: nothing. The only source of chance is the ``random.Random`` that is handed in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from random import Random

Slots = Mapping[str, "str | tuple[str, ...]"]

_INNER_CHOICE = re.compile(r"\{([^{}]*)\}")
_SLOT = re.compile(r"\[([A-Za-z_][a-z_]*)\]")
_VERB = re.compile(r"\[\+([a-z]+)\]")
_ARTICLE = re.compile(r"\b([Aa])\(n\) (\w)")
_SENTENCE_START = re.compile(r'(^|[.!?] |\." |\n)("?)([a-z])')  # not after ?" or !": "Why?" asked Ada.
_IRREGULAR = {"are": "is", "have": "has", "do": "does", "go": "goes", "were": "was"}


def agree(verb: str, *, plural: bool) -> str:
    """The third-person present form of ``verb``, which is given in its plural form."""
    if plural:
        return verb
    if verb in _IRREGULAR:
        return _IRREGULAR[verb]
    if verb.endswith(("s", "sh", "ch", "x", "o")):
        return verb + "es"
    return verb[:-1] + "ies" if re.search("[^aeiou]y$", verb) else verb + "s"


def capital(text: str) -> str:
    """``text`` with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def listing(items: Sequence[str], last: str = "and") -> str:
    """The items as English writes them: "a", "a and b", "a, b and c"."""
    if len(items) < 2:
        return "".join(items)
    return f"{', '.join(items[:-1])} {last} {items[-1]}"


def expand(template: str, rng: Random, slots: Slots | None = None, *, plural: bool = True) -> str:
    """Fill in one template; raises KeyError for a slot that is not given."""
    slots = slots or {}

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        value = slots[name] if name in slots else slots[name[:1].lower() + name[1:]]
        text = value if isinstance(value, str) else rng.choice(value)
        return text if name in slots else capital(text)

    text = template
    while True:
        before = text
        text = _INNER_CHOICE.sub(lambda m: rng.choice(m[1].split("|")), text, count=1)
        if text == before:
            text = _SLOT.sub(fill, text, count=1)
        if text == before:
            break
    text = _VERB.sub(lambda m: agree(m[1], plural=plural), text)
    return tidy(text)


def tidy(text: str) -> str:
    """Articles, spaces and capitals put right."""
    text = _ARTICLE.sub(lambda m: f"{m[1]}{'n' if m[2].lower() in 'aeiou' else ''} {m[2]}", text)
    text = re.sub(r" {2,}", " ", text)
    text = re.sub(r" +([,.;!?])", r"\1", text).strip()
    return _SENTENCE_START.sub(lambda m: m[1] + m[2] + m[3].upper(), text)
