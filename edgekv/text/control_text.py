"""Control tokens spelled out in text: who wrote them, the template or a person.

A person's strings go into a chat template with private marks around what spells a control token; the marks show in the
rendered text where it came from. Templates may search and split such strings as before. A token put together from the
end of one string and the beginning of another is seen by a mark inside it.

Runs in: anywhere; owns: nothing that changes.
"""

import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from edgekv.text.errors import TextError

_PRIVATE_USE = range(0xE000, 0xF900)


@dataclass(frozen=True, slots=True)
class Marks:
    """Two characters that occur nowhere in the input of one rendering."""

    start: str
    end: str


class ControlText:
    """The texts of a tokenizer's control tokens, by id."""

    def __init__(self, ids: Mapping[str, int]) -> None:
        self.ids = {text: token_id for text, token_id in ids.items() if text}
        longest_first = sorted(self.ids, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._forwards = _Heads(self.ids)
        self._backwards = _Heads(text[::-1] for text in self.ids)

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Where control tokens are spelled, longest first at each place, as (start, end)."""
        return [match.span() for match in self._pattern.finditer(text)]

    def occurs_in(self, value: Any) -> bool:
        """Whether strings of a JSON value spell a control token, or could when put one after the other."""
        strings = list(_strings(value))
        if any(self._pattern.search(text) for text in strings):
            return True
        return any(map(self._begins_token, strings)) and any(map(self._ends_token, strings))

    def mark(self, value: Any, marks: Marks) -> Any:
        """A copy of a JSON value with marks around control text, and before what could end a control token."""
        if isinstance(value, str):
            marked = self._pattern.sub(lambda match: marks.start + match[0] + marks.end, value)
            if not marked.lstrip().startswith(marks.start) and self._ends_token(value):
                at = len(marked) - len(marked.lstrip())
                marked = marked[:at] + marks.start + marked[at:]
            return marked
        if isinstance(value, dict):
            return {self.mark(key, marks): self.mark(item, marks) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(item, marks) for item in value]
        return value

    def unmark(self, text: str, marks: Marks) -> tuple[str, list[tuple[int, int]], bool]:
        """Take the marks out of a rendered text.

        Returns:
            the text, the spans of the control tokens that the template wrote, and whether there are others.
        """
        for mark in (marks.start, marks.end):  # tojson may have escaped them
            text = text.replace(json.dumps(mark)[1:-1], mark)
        starts: set[int] = set()
        ends: set[int] = set()
        clean: list[str] = []
        position = 0
        for part in re.split(f"([{marks.start}{marks.end}])", text):
            if part == marks.start:
                starts.add(position)
            elif part == marks.end:
                ends.add(position)
            else:
                clean.append(part)
                position += len(part)
        marked = starts | ends
        plain = "".join(clean)
        written, others = [], False
        for start, end in self.spans(plain):
            if (start in starts and end in ends) or any(at in marked for at in range(start + 1, end)):
                others = True
            else:
                written.append((start, end))
        return plain, written, others

    def carry_over(self, written: list[tuple[int, int]], source: str, target: str) -> list[tuple[int, int]] | None:
        """The same spans in a text that differs from `source` in white space only; None if it differs in more."""
        if "".join(source.split()) != "".join(target.split()):
            return None
        known = {(place, source[start:end]) for (start, end), place in _places(written, source)}
        spans = _places(self.spans(target), target)
        return [(start, end) for (start, end), place in spans if (place, target[start:end]) in known]

    def _begins_token(self, text: str) -> bool:
        return self._forwards.end(text.rstrip())

    def _ends_token(self, text: str) -> bool:
        return self._backwards.end(text.lstrip()[: self._backwards.longest][::-1])


class _Heads:
    """The beginnings of texts, found without a copy of each: together they are as long as the square of the texts."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = sorted(texts)
        self._first_chars = {text[0] for text in self._texts}
        self.longest = max(map(len, self._texts), default=0)

    def end(self, text: str) -> bool:
        """Whether a text ends with the beginning of one of ours, and not with the whole of it."""
        starts = range(max(0, len(text) - self.longest), len(text))
        return any(text[start] in self._first_chars and self._has(text[start:]) for start in starts)

    def _has(self, head: str) -> bool:
        at = bisect_right(self._texts, head)  # whatever begins with it follows it
        return at < len(self._texts) and self._texts[at].startswith(head)


def _places(spans: list[tuple[int, int]], text: str) -> Iterator[tuple[tuple[int, int], int]]:
    """Each span, and how many characters other than white space come before it."""
    position = place = 0
    for start, end in spans:
        place += sum(not char.isspace() for char in text[position:start])
        yield (start, end), place
        position, place = end, place + sum(not char.isspace() for char in text[start:end])


def free_marks(value: Any) -> Marks:
    """Two private-use characters that no string of a JSON value contains, written out or escaped.

    Raises:
        TextError: all 6,400 are in use.
    """
    used = "\0".join(_strings(value))
    escaped = used.lower()
    free = (chr(code) for code in _PRIVATE_USE if chr(code) not in used and f"\\u{code:04x}" not in escaped)
    start, end = next(free, None), next(free, None)
    if start is None or end is None:
        raise TextError("The messages use every private-use character; control text in them cannot be marked.")
    return Marks(start, end)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, Iterable):
        for item in value:
            yield from _strings(item)
