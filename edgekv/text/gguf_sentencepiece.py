"""The sentencepiece model that a GGUF file was made from, put together again from its tokens, scores and kinds.

A GGUF names the algorithm "llama": pieces are merged pair by pair, the best score first, which is sentencepiece's BPE.
The message is `ModelProto` of src/sentencepiece_model.proto (github.com/google/sentencepiece).

Runs in: anywhere; owns: nothing.
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import replace

from edgekv.formats.gguf_values import Metadata, ValueType
from edgekv.formats.gguf_vocabulary import KINDS_KEY, TOKENS_KEY, GgufVocabulary, TokenKind
from edgekv.text.sentencepiece_tokenizer import SentencePieceTokenizer
from edgekv.text.tokenizer_files import AddedToken, TokenizerFiles
from edgekv.text.vocabulary import BYTE_PIECE, SPACE_MARK

_SCORES_KEY = "tokenizer.ggml.scores"
_UNKNOWN_KEY = "tokenizer.ggml.unknown_token_id"
_MAX_SCORE = 1e30  # a real one is a rank or the logarithm of a probability
_BPE = 2  # TrainerSpec.ModelType


def read_gguf_sentencepiece(
    metadata: Metadata, vocabulary: GgufVocabulary, files: TokenizerFiles, *, max_bytes: int
) -> SentencePieceTokenizer:
    """The tokenizer; raises ModelError naming file and key."""
    unknown_id = _unknown_id(metadata, vocabulary)
    kinds = _kinds(metadata, vocabulary, unknown_id)
    padding = [token_id for token_id in range(len(kinds)) if vocabulary.is_padding(token_id)]
    size = len(kinds)
    while padding and padding[-1] == size - 1:
        size = padding.pop()
    pieces = _pieces(metadata, vocabulary, kinds, padding)[:size]
    _check_bytes(metadata, pieces, kinds)
    model = _message(pieces, _scores(metadata, len(kinds))[:size], kinds[:size])
    model += _trainer(TokenKind.BYTE in kinds, {**files.named, "unk_token": pieces[unknown_id]}) + _normalizer(metadata)
    # A space goes before what follows a control token too, as in llama.cpp: so were Llama 2 and Mistral trained, whose
    # turns were encoded one by one.
    files = replace(files, legacy=True, added=files.added | _added(vocabulary))
    return SentencePieceTokenizer(
        metadata.path.name,
        model,
        files,
        types=kinds[:size],
        empty_ids=padding,
        prefix_before_space=True,
        max_bytes=max_bytes,
    )


def _unknown_id(metadata: Metadata, vocabulary: GgufVocabulary) -> int:
    if (named := vocabulary.named.get("unk_token")) is not None:
        return named
    if TokenKind.UNKNOWN in vocabulary.kinds:
        return vocabulary.kinds.index(TokenKind.UNKNOWN)
    if "<unk>" in vocabulary.texts:
        return vocabulary.texts.index("<unk>")
    raise metadata.fault(_UNKNOWN_KEY, "is missing, and no token is of the unknown kind")


def _kinds(metadata: Metadata, vocabulary: GgufVocabulary, unknown_id: int) -> list[TokenKind]:
    """As sentencepiece wants them: one UNKNOWN, and no UNDEFINED."""
    kinds = list(vocabulary.kinds)
    if not vocabulary.is_typed:
        kinds = [TokenKind.BYTE if BYTE_PIECE.fullmatch(text) else TokenKind.NORMAL for text in vocabulary.texts]
        for token_id in vocabulary.named.values():
            kinds[token_id] = TokenKind.CONTROL
    instead = {TokenKind.UNKNOWN: TokenKind.UNUSED, TokenKind.UNDEFINED: TokenKind.NORMAL}
    kinds = [instead.get(kind, kind) for kind in kinds]
    if vocabulary.is_padding(unknown_id):
        raise metadata.fault(_UNKNOWN_KEY, f"row {unknown_id} stands for no token")
    kinds[unknown_id] = TokenKind.UNKNOWN
    return kinds


def _pieces(
    metadata: Metadata, vocabulary: GgufVocabulary, kinds: Sequence[TokenKind], padding: Sequence[int]
) -> list[str]:
    pieces = list(vocabulary.texts)
    for token_id, kind in enumerate(kinds):
        if kind == TokenKind.USER_DEFINED:
            # The converter has made their marks spaces, but sentencepiece looks for them behind its normalizer.
            pieces[token_id] = pieces[token_id].replace(" ", SPACE_MARK)
        if "\0" in pieces[token_id]:
            raise metadata.fault(TOKENS_KEY, f"token {token_id}, {pieces[token_id]!r:.80}, holds a NUL")
    for token_id in padding:
        pieces[token_id] = f"\ufdd0{token_id}"  # what no vocabulary has: U+FDD0 is no character
    twins = len(pieces) - len(set(pieces))
    if twins:
        raise metadata.fault(TOKENS_KEY, f"{twins:,} tokens differ from others by their spaces alone")
    return pieces


def _check_bytes(metadata: Metadata, pieces: Sequence[str], kinds: Sequence[TokenKind]) -> None:
    spelled = {pieces[token_id].upper() for token_id, kind in enumerate(kinds) if kind == TokenKind.BYTE}
    if spelled and spelled != {f"<0X{byte:02X}>" for byte in range(256)}:
        raise metadata.fault(KINDS_KEY, f"{len(spelled)} of its tokens are bytes, but not <0x00> to <0xFF>")


def _scores(metadata: Metadata, num_tokens: int) -> Sequence[float]:
    metadata.check_count(_SCORES_KEY, num_tokens, num_tokens, "tokens")
    field = metadata.field(_SCORES_KEY)
    if field is not None and field.element == ValueType.INT32:
        scores: Sequence[float] = metadata.integers(_SCORES_KEY, -(1 << 31), 1 << 31)
    else:
        scores = metadata.numbers(_SCORES_KEY)
    if not all(map(math.isfinite, scores)) or max(map(abs, scores)) > _MAX_SCORE:
        raise metadata.fault(_SCORES_KEY, f"holds a score that is no number from -{_MAX_SCORE:g} to {_MAX_SCORE:g}")
    return scores


def _added(vocabulary: GgufVocabulary) -> dict[int, AddedToken]:
    """User-defined tokens that are more than white space, which sentencepiece finds by itself."""
    return {
        token_id: AddedToken(text, special=token_id in vocabulary.end_ids)
        for token_id, (text, kind) in enumerate(zip(vocabulary.texts, vocabulary.kinds, strict=True))
        if kind == TokenKind.USER_DEFINED and text.replace(SPACE_MARK, " ").strip()
    }


def _message(pieces: Sequence[str], scores: Sequence[float], kinds: Sequence[TokenKind]) -> bytes:
    """The `pieces` (field 1), each with piece (1), score (2) and type (3)."""
    texts = [piece.encode() for piece in pieces]
    sizes = [_varint(size) for size in range(max(map(len, texts)) + 32)]
    ends = [b"\x18" + bytes([kind]) for kind in TokenKind]
    pack = struct.Struct("<f").pack
    out: list[bytes] = []
    for text, score, kind in zip(texts, scores, kinds, strict=True):
        body = b"\x0a" + sizes[len(text)] + text + b"\x15" + pack(score) + ends[kind]
        out += b"\x0a", sizes[len(body)], body
    return b"".join(out)


def _trainer(has_bytes: bool, named: dict[str, str]) -> bytes:
    """`trainer_spec` (field 2): model_type (3), byte_fallback (35) and the pieces that have names (45 to 47)."""
    body = _field(3, _BPE) + _field(35, int(has_bytes))
    for number, name in ((45, "unk_token"), (46, "bos_token"), (47, "eos_token")):
        body += _field(number, named.get(name, ""))
    return _field(2, body)


def _normalizer(metadata: Metadata) -> bytes:
    """`normalizer_spec` (field 3): add_dummy_prefix (3), remove_extra_whitespaces (4); no character is changed."""
    prefix = metadata.flag("tokenizer.ggml.add_space_prefix", True)
    trimmed = metadata.flag("tokenizer.ggml.remove_extra_whitespaces", False)
    return _field(3, _field(1, "identity") + _field(3, int(prefix)) + _field(4, int(trimmed)))


def _field(number: int, value: int | str | bytes) -> bytes:
    """One field of a protobuf message."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    body = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(body)) + body


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
