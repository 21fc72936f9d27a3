"""Words of a streamed answer are not cut at the terminal's edge. Runs in: anywhere; owns: one line's end."""

from typing import TextIO

from rich.cells import cell_len

ERASE_LEFT = "\x1b[{}D\x1b[K"


class WordWrap:
    """Writes text as it comes; a word that turns out not to fit is taken back and set on the next line.

    Args:
        to: a terminal.
        columns: its width in cells.
    """

    def __init__(self, to: TextIO, columns: int) -> None:
        self._to, self._columns = to, columns
        self._column = 0
        self._word = ""

    def write(self, text: str) -> None:
        """Write a piece, which may begin and end within a word."""
        for character in text:
            self._put(character)
        self._to.flush()

    def _put(self, character: str) -> None:
        if character == "\n":
            self._column, self._word = 0, ""
        elif self._column + cell_len(character) >= self._columns:
            self._break(character)
        else:
            self._column += cell_len(character)
            self._word = "" if character.isspace() else self._word + character
        if character != " " or self._column > 0:
            self._to.write(character)

    def _break(self, character: str) -> None:
        word = "" if character.isspace() else self._word
        width = cell_len(word)
        if 0 < width < self._column:
            self._to.write(ERASE_LEFT.format(width))
        else:
            word, width = "", 0  # a word as wide as the terminal is cut after all
        self._to.write("\n" + word)
        starts = "" if character.isspace() else character
        self._word, self._column = word + starts, width + cell_len(starts)
