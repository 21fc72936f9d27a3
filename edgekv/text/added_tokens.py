"""Finding added tokens in a text, as the `tokenizers` library does: leftmost, then longest; those that are matched
before normalization first, the others in what is left.

Runs in: anywhere; owns: nothing that changes.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from edgekv.text.tokenizer_files import AddedToken

Match = tuple[int, int, int]  # start, end, token id


class AddedTokenMatcher:
    """Splits a text at added tokens."""

    def __init__(self, ids: Mapping[str, int], tokens: Iterable[AddedToken]) -> None:
        self._ids = ids
        self._tokens = {token.content: token for token in tokens if token.content}
        raw = [text for text, token in self._tokens.items() if not token.normalized]
        normalized = [text for text, token in self._tokens.items() if token.normalized]
        self._patterns = [_pattern(texts) for texts in (raw, normalized) if texts]

    def split(self, text: str, fixed: Sequence[Match] = ()) -> Iterator[tuple[int, str | int]]:
        """The text as (position, an id or ordinary text) in order; `fixed` matches go before all others."""
        matches = list(fixed)
        for pattern in self._patterns:
            found: list[Match] = []
            for start, end in _gaps(matches, len(text)):
                found += self._extended(text, pattern.finditer(text, start, end), start, end)
            matches = sorted([*matches, *found])
        position = 0
        for start, end, token_id in matches:
            if position < start:
                yield position, text[position:start]
            yield start, token_id
            position = end
        if position < len(text):
            yield position, text[position:]

    def at(self, text: str, spans: Sequence[tuple[int, int]]) -> list[Match]:
        """Matches at known places, with the white space that the tokens there take with them."""
        matches: list[Match] = []
        for i, (start, end) in enumerate(spans):
            floor = matches[-1][1] if matches else 0
            ceiling = spans[i + 1][0] if i + 1 < len(spans) else len(text)
            matches.append(self._with_space(text, start, end, floor, ceiling))
        return matches

    def _extended(self, text: str, found: Iterator[re.Match[str]], floor: int, ceiling: int) -> Iterator[Match]:
        for match in found:
            start, end, token_id = self._with_space(text, match.start(), match.end(), floor, ceiling)
            if match.start() >= floor:
                yield start, end, token_id
                floor = end

    def _with_space(self, text: str, start: int, end: int, floor: int, ceiling: int) -> Match:
        content = text[start:end]
        token = self._tokens[content]
        while token.lstrip and start > floor and text[start - 1].isspace():
            start -= 1
        while token.rstrip and end < ceiling and text[end].isspace():
            end += 1
        return start, end, self._ids[content]


def _pattern(texts: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))


def _gaps(matches: Sequence[Match], length: int) -> Iterator[tuple[int, int]]:
    position = 0
    for start, end, _ in matches:
        if position < start:
            yield position, start
        position = end
    if position < length:
        yield position, length
