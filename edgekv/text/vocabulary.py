"""The vocabulary as bytes: what each token id adds to the text, and how a text begins.

Every decoder of the supported tokenizers (byte-level BPE, sentencepiece with byte fallback, metaspace) is a map from
ids to bytes, joined and read as UTF-8, plus a rule for the first space. Malformed bytes become U+FFFD one maximal
subpart at a time, as in Unicode's recommended practice: so a stream can be decoded as it comes.

Runs in: anywhere; owns: the bytes of each id (a cache that only grows, at most one entry per id).
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from edgekv.text.errors import UnknownTokenId

SPACE_MARK = "▁"  # U+2581, how sentencepiece writes a space
BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class DecodeRules:
    """How pieces become text.

    `byte_level`: each character stands for one byte (GPT-2's table). `replacements`: applied to each piece in order.
    `byte_fallback`: `<0xE2>` is that byte. `strip_left`: so many spaces are taken off the beginning of the text.
    `first_loses_mark`: the first piece of a text drops its space marks, wherever in the piece they are.
    """

    byte_level: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    strip_left: int = 0
    first_loses_mark: bool = False


def rules_of_decoder(decoder: dict[str, Any]) -> DecodeRules:
    """Read the `decoder` of a tokenizer.json.

    Raises:
        ValueError: a decoder that is not a map from ids to bytes, with its name.
    """
    byte_level = byte_fallback = first_loses_mark = joined = False
    replacements: list[tuple[str, str]] = []
    strip_left = 0
    for step in decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]:
        match step:
            case {"type": "ByteLevel"}:
                byte_level = True
            case {"type": "ByteFallback"}:
                byte_fallback = True
            case {"type": "Fuse"}:
                joined = True
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if not joined:
                replacements.append((old, new))
            case {"type": "Strip", "content": " ", "start": int(start), "stop": 0} if joined:
                strip_left += start
            case {"type": "Metaspace", "replacement": str(mark)}:
                replacements.append((mark, " "))
                first_loses_mark = step.get("prepend_scheme", "always") != "never"
            case _:
                raise ValueError(f"decoder {step.get('type')!r} is not supported")
    return DecodeRules(byte_level, tuple(replacements), byte_fallback, strip_left, first_loses_mark)


class Vocabulary:
    """Pieces by id, and the bytes they stand for."""

    def __init__(self, pieces: Sequence[str | None], special_ids: Iterable[int], rules: DecodeRules) -> None:
        self.pieces = pieces
        self.special_ids = frozenset(special_ids)
        self.rules = rules
        self._bytes: dict[int, bytes] = {}
        self._byte_of_char = _byte_level_table() if rules.byte_level else {}

    def __len__(self) -> int:
        return len(self.pieces)

    def check(self, ids: Iterable[int]) -> None:
        """Raise `UnknownTokenId` for the first id outside the vocabulary."""
        size = len(self.pieces)
        for token_id in ids:
            if not 0 <= token_id < size:
                raise UnknownTokenId(token_id, size)

    def bytes_of(self, token_id: int, *, first: bool = False) -> bytes:
        """The bytes an id adds to a text; `first` where it begins one.

        Ids without a token (the padding rows of an embedding table larger than its vocabulary) add nothing.
        """
        if first and self.rules.first_loses_mark and 0 <= token_id < len(self.pieces):
            piece = self.pieces[token_id] or ""
            for mark, _ in self.rules.replacements:
                piece = piece.replace(mark, "")
            return piece.encode("utf-8", "replace")
        known = self._bytes.get(token_id)
        if known is None:
            if not 0 <= token_id < len(self.pieces):
                return b""
            known = self._bytes[token_id] = self._spell(self.pieces[token_id] or "")
        return known

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of a whole sequence of ids (all checked to be in the vocabulary)."""
        self.check(ids)
        if skip_special_tokens:
            ids = [token_id for token_id in ids if token_id not in self.special_ids]
        text = b"".join(self.bytes_of(token_id, first=i == 0) for i, token_id in enumerate(ids))
        spaces = self.rules.strip_left
        return strip_spaces(text.decode("utf-8", "replace"), spaces)[0]

    def _spell(self, piece: str) -> bytes:
        if self.rules.byte_level:
            try:
                return bytes(self._byte_of_char[char] for char in piece)
            except KeyError:  # an added token, written as itself
                return piece.encode("utf-8", "replace")
        for old, new in self.rules.replacements:
            piece = piece.replace(old, new)
        if self.rules.byte_fallback and (byte := BYTE_PIECE.fullmatch(piece)):
            return bytes([int(byte[1], 16)])
        return piece.encode("utf-8", "replace")


def strip_spaces(text: str, count: int) -> tuple[str, int]:
    """Take up to `count` leading spaces off; also returns how many may still be taken off what follows."""
    while count and text.startswith(" "):
        text, count = text[1:], count - 1
    return text, 0 if text else count


def _byte_level_table() -> dict[str, int]:
    """GPT-2's bytes_to_unicode, inverted: printable bytes are themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
