"""tokenizer.model through the `sentencepiece` library, with the ids of transformers' LlamaTokenizer.

Added tokens are matched here, since sentencepiece does not know them; sentencepiece encodes what lies between. The
model file is the authority on normalization; only where its leading space goes is decided here.

Runs in: anywhere; owns: the sentencepiece processors, unchanged after loading (encoding releases the GIL).
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

import sentencepiece

from edgekv.errors import ModelError
from edgekv.text.added_tokens import AddedTokenMatcher
from edgekv.text.control_text import ControlText
from edgekv.text.tokenizer_files import MAX_FILE_BYTES, NAMED_TOKENS, AddedToken, TokenizerFiles
from edgekv.text.vocabulary import SPACE_MARK, DecodeRules, Vocabulary
from edgekv.text.vocabulary_tokenizer import VocabularyTokenizer

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # SentencePiece.Type in sentencepiece_model.proto
# A second `normalizer_spec` (field 3) with `add_dummy_prefix` (field 3) off: protobuf merges it over the first.
_NO_DUMMY_PREFIX = bytes([3 << 3 | 2, 2, 3 << 3, 0])
_MAX_GAP = 1 << 16  # ids without a token between the model's and an added one


class SentencePieceTokenizer(VocabularyTokenizer):
    """A sentencepiece model and the added tokens of the files beside it.

    Args:
        name: what errors call the model.
        model: a `ModelProto`.
        files: what lies beside it.
        types: those of the model's pieces, where the caller knows them.
        empty_ids: ids whose pieces are no tokens.
        prefix_before_space: put a space before a text that begins with one too. sentencepiece does so; transformers
            does not any more.
        max_bytes: the longest text.

    Raises:
        ModelError: not a sentencepiece model, added tokens that contradict it, or control tokens past any real ones.
    """

    def __init__(
        self,
        name: str,
        model: bytes,
        files: TokenizerFiles,
        *,
        types: Sequence[int] | None = None,
        empty_ids: Collection[int] = (),
        prefix_before_space: bool = False,
        max_bytes: int,
    ) -> None:
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            self._without_prefix = sentencepiece.SentencePieceProcessor(model_proto=model + _NO_DUMMY_PREFIX)
            types = list(_piece_types(model)) if types is None else types
        except (RuntimeError, ValueError) as error:
            raise ModelError(f"{name}: not a sentencepiece model: {error}") from error

        size = self._processor.get_piece_size()
        pieces: list[str | None] = [self._processor.id_to_piece(token_id) for token_id in range(size)]
        if len(types) != size:
            raise ModelError(f"{name}: not a sentencepiece model: {len(types)} pieces listed, {size} loaded")
        named = _named_tokens(self._processor, pieces, files)
        added = _added_tokens(name, pieces, types, named, files)
        for token_id in empty_ids:
            pieces[token_id] = None
        for token_id, token in added.items():
            pieces += [None] * (token_id + 1 - len(pieces))
            pieces[token_id] = token.content
        id_of = {token.content: token_id for token_id, token in added.items()}

        prefix = files.add_prefix_space is not False and self._processor.normalize("a") != "a"
        self._prefix_first = prefix
        self._prefix_always = prefix and files.legacy is True
        # LlamaTokenizer adds no space where there is one.
        self._unprefixed = () if prefix_before_space else (" ", SPACE_MARK)
        super().__init__(
            Vocabulary(
                pieces,
                (token_id for token_id, token in added.items() if token.special),
                DecodeRules(replacements=((SPACE_MARK, " "),), byte_fallback=True, strip_left=int(prefix)),
            ),
            ControlText(files.control_ids(name, added)),
            named,
            {key: id_of[text] for key, text in named.items() if text in id_of},
            max_bytes=max_bytes,
        )
        self._added = added
        self._all_tokens = AddedTokenMatcher(id_of, added.values())
        plain = [token for token in added.values() if token.content not in self.control_text.ids]
        self._plain_tokens = AddedTokenMatcher(id_of, plain)
        # User-defined pieces that are control text: sentencepiece itself would find them.
        self._known_to_model = {
            text for text, token_id in self.control_text.ids.items()
            if token_id < size and types[token_id] == _USER_DEFINED
        }  # fmt: skip
        # Models of this kind were trained with a beginning and without an end, so that is what silence means.
        self._before = [self.bos_id] if files.add_bos is not False and self.bos_id is not None else []
        self._after = [self.eos_id] if files.add_eos and self.eos_id is not None else []

    @classmethod
    def read(cls, path: Path, files: TokenizerFiles, *, max_bytes: int) -> Self:
        """The tokenizer of a tokenizer.model.

        Raises:
            ModelError: not a sentencepiece model, or added tokens that contradict it.
        """
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise ModelError(f"{path}: larger than {MAX_FILE_BYTES:,} bytes")
            model = path.read_bytes()
        except OSError as error:
            raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
        return cls(str(path), model, files, max_bytes=max_bytes)

    def encode(self, text: str, *, add_special_tokens: bool, parse_special: bool) -> list[int]:
        """Token ids of a text."""
        self._check(text)
        ids = self._encode_segments(self._all_tokens.split(text)) if parse_special else self._encode_parts(text, ())
        return [*self._before, *ids, *self._after] if add_special_tokens else ids

    def encode_parts(self, text: str, control: Sequence[tuple[int, int]]) -> list[int]:
        """Token ids of a text in which only the `control` spans are control tokens."""
        self._check(text)
        return self._encode_parts(text, control)

    def _encode_parts(self, text: str, control: Sequence[tuple[int, int]]) -> list[int]:
        return self._encode_segments(self._plain_tokens.split(text, self._all_tokens.at(text, control)))

    def _encode_segments(self, segments: Iterator[tuple[int, str | int]]) -> list[int]:
        """Segments are (position in the text, an id or ordinary text)."""
        ids: list[int] = []
        for position, segment in segments:
            if isinstance(segment, int):
                ids.append(segment)
            elif segment:
                ids += self._encode_ordinary(segment, self._prefix_always or (self._prefix_first and position == 0))
        return ids

    def _encode_ordinary(self, text: str, prefix: bool) -> list[int]:
        cuts = []
        if self._known_to_model:
            spans = self.control_text.spans(text)
            cuts = [start + 1 for start, end in spans if text[start:end] in self._known_to_model]
        ids: list[int] = []
        position = 0
        for cut in [*cuts, len(text)]:
            part = text[position:cut]
            with_prefix = prefix and position == 0 and not part.startswith(self._unprefixed)
            processor = self._processor if with_prefix else self._without_prefix
            ids += processor.encode(part)
            position = cut
        return ids


def _added_tokens(
    name: str, pieces: Sequence[str | None], types: Sequence[int], named: dict[str, str], files: TokenizerFiles
) -> dict[int, AddedToken]:
    """The model's control and user-defined pieces, then what the files declare; new texts get ids behind the rest."""
    added = {
        token_id: AddedToken(piece, special=kind == _CONTROL)
        for token_id, (piece, kind) in enumerate(zip(pieces, types, strict=True))
        if piece is not None and kind in (_CONTROL, _USER_DEFINED)
    }
    for token_id, token in sorted(files.added.items()):
        if token_id >= len(pieces) + _MAX_GAP + len(files.added):
            raise ModelError(f"{name}: added token {token.content!r}: id {token_id} is far outside the vocabulary")
        if token_id < len(pieces) and pieces[token_id] != token.content and types[token_id] == _NORMAL:
            raise ModelError(
                f"{name}: id {token_id} is {pieces[token_id]!r}, but added as {token.content!r} by its neighbours"
            )
        added[token_id] = token
    id_of = {piece: token_id for token_id, piece in enumerate(pieces) if piece is not None}
    id_of |= {token.content: token_id for token_id, token in added.items()}
    for content in dict.fromkeys([*named.values(), *files.extra]):
        token_id = id_of.get(content, max(len(pieces) - 1, *added) + 1 if added else len(pieces))
        known = added.get(token_id, AddedToken(content))
        added[token_id] = replace(known, special=True)
    return added


def _named_tokens(
    processor: sentencepiece.SentencePieceProcessor, pieces: Sequence[str | None], files: TokenizerFiles
) -> dict[str, str]:
    """What the files name, else what the model file says."""
    own = {"bos_token": processor.bos_id(), "eos_token": processor.eos_id(), "unk_token": processor.unk_id()}
    named = {key: piece for key, token_id in own.items() if token_id >= 0 and (piece := pieces[token_id])}
    named |= files.named
    return {key: named[key] for key in NAMED_TOKENS if key in named}


def _piece_types(model: bytes) -> Iterator[int]:
    """`type` (field 3) of each of the model's `pieces` (field 1), 1 where it is not written.

    Raises:
        ValueError: not a protobuf message.
    """
    for number, value in _fields(model):
        if number == 1 and isinstance(value, bytes):
            kind = 1
            for inner, inner_value in _fields(value):
                if inner == 3 and isinstance(inner_value, int):
                    kind = inner_value
            yield kind


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protobuf message in wire form: (number, a varint or the raw bytes)."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        size = {1: 8, 5: 4}.get(key & 7)
        if key & 7 == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        if key & 7 == 2:
            size, at = _varint(message, at)
        if size is None or at + size > len(message):
            raise ValueError(f"a broken field at byte {at}")
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(message) and shift < 64:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise ValueError(f"a broken number at byte {at}")
