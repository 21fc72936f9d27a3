"""Streamed words are set whole, however they arrive."""

import io
import re
from textwrap import wrap

from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from edgekv.cli.wrap import WordWrap


def shown(pieces: list[str], columns: int) -> list[str]:
    """What a terminal shows: erasing moves left over what the line ends with."""
    to = io.StringIO()
    wrapped = WordWrap(to, columns)
    for piece in pieces:
        wrapped.write(piece)
    lines = [""]
    for part in re.split(r"(\x1b\[\d+D\x1b\[K|\n)", to.getvalue()):
        if part == "\n":
            lines.append("")
        elif part.startswith("\x1b"):
            kept = cell_len(lines[-1]) - int(part[2 : part.index("D")])
            while cell_len(lines[-1]) > kept:
                lines[-1] = lines[-1][:-1]
        else:
            lines[-1] += part
    return [line.rstrip() for line in lines]


def test_a_word_that_does_not_fit_goes_to_the_next_line() -> None:
    assert shown(["the to", "mato gro", "ws"], 12) == ["the tomato", "grows"]


def test_a_word_wider_than_the_terminal_is_cut() -> None:
    assert shown(["abcdefghijkl"], 6) == ["abcde", "fghij", "kl"]


def test_wide_characters_count_twice() -> None:
    assert shown(["ab 西红柿"], 8) == ["ab", "西红柿"]


@given(st.lists(st.text("abcdef", min_size=1, max_size=9), min_size=1, max_size=30), st.integers(11, 40), st.data())
def test_any_pieces_wrap_as_the_whole(words: list[str], columns: int, data: st.DataObject) -> None:
    text = " ".join(words)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert shown(pieces, columns) == wrap(text, columns - 1)
