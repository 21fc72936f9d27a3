"""Token ids to text as they are generated: whole characters only, constant work per token.

The bytes of the ids go through an incremental UTF-8 decoder, which holds at most the three bytes of an unfinished
character. So the pushes and `finish()` together are the decoding of all ids at once.

Runs in: anywhere (one thread at a time); owns: the unfinished character.
"""

import codecs
from collections.abc import Sequence

from edgekv.text.vocabulary import Vocabulary, strip_spaces


class Detokenizer:
    """Text of one stream of ids.

    With `prompt_ids` the stream continues their text: the first token keeps its leading space, and a character the
    prompt left unfinished is completed. Without, the stream is a text of its own, as in `Tokenizer.decode`.
    """

    def __init__(
        self, vocabulary: Vocabulary, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> None:
        self._vocabulary = vocabulary
        self._skipped: frozenset[int] = vocabulary.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._spaces_to_strip = vocabulary.rules.strip_left
        self._first = True
        tail = b""
        for token_id in reversed(prompt_ids):
            if token_id in self._skipped:
                continue
            self._first = False
            tail = vocabulary.bytes_of(token_id) + tail
            # A character has four bytes at most: with a byte that is not a continuation, the tail is known.
            if len(tail) >= 4 or any(byte & 0xC0 != 0x80 for byte in tail):
                break
        if tail:
            self._decoder.decode(tail)
            self._spaces_to_strip = 0

    def push(self, token_id: int) -> str:
        """The complete characters this token adds; "" while it leaves one unfinished, or for an id without a token."""
        if token_id in self._skipped:
            return ""
        text = self._decoder.decode(self._vocabulary.bytes_of(token_id, first=self._first))
        self._first = False
        return self._strip(text) if self._spaces_to_strip else text

    def finish(self) -> str:
        """What an unfinished character leaves behind (U+FFFD), or ""."""
        return self._strip(self._decoder.decode(b"", True))

    def _strip(self, text: str) -> str:
        text, self._spaces_to_strip = strip_spaces(text, self._spaces_to_strip)
        return text
