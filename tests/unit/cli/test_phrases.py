"""Where a line that is too long is broken."""

import pytest
from rich.cells import cell_len

from edgekv.cli.phrases import wrap_phrases

LINE = "pool    1,600 tokens in 100 blocks: 25 in use, 15 cached; 60 free"


def test_a_line_that_fits_stays_as_it_is() -> None:
    assert wrap_phrases(LINE, len(LINE), 10) == LINE
    assert wrap_phrases("", 10, 4) == ""


def test_it_is_broken_between_phrases() -> None:
    assert wrap_phrases(LINE, len(LINE) - 1, 10) == LINE.removesuffix(" 60 free") + "\n          60 free"
    lines = ["pool    1,600 tokens in 100 blocks:", "  25 in use, 15 cached; 60 free"]
    assert wrap_phrases(LINE, 36, 2).splitlines() == lines


def test_a_phrase_that_is_too_long_is_broken_between_words() -> None:
    assert wrap_phrases("held: no step runs until memory is there", 22, 2).splitlines() == [
        "held: no step runs", "  until memory is", "  there",
    ]  # fmt: skip
    assert wrap_phrases("        " + "x" * 20, 12, 2).strip() == "x" * 20, "a word is not broken"


@pytest.mark.parametrize("width", range(16, 70))
def test_nothing_is_lost_and_nothing_too_wide(width: int) -> None:
    line = "draft   模型模型, up to 8 tokens at once, on: 3.4 proposed for a sequence, 62 % accepted"
    wrapped = wrap_phrases(line, width, 4)
    assert " ".join(wrapped.split()) == " ".join(line.split())
    assert all(cell_len(each) <= width for each in wrapped.splitlines())
