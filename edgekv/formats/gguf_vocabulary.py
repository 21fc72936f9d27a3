"""The vocabulary that a GGUF file carries: tokens, what kind each is, and which of them have a part to play.

Runs in: anywhere (no torch); owns: nothing. Keys: docs/gguf.md of github.com/ggml-org/ggml. The numbers of the kinds
are those of sentencepiece's `ModelProto.SentencePiece.Type`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

from edgekv.formats.gguf_values import Metadata

MAX_TOKENS = 1 << 22
_MAX_TOKEN_CHARS = 1 << 16
TOKENS_KEY = "tokenizer.ggml.tokens"
KINDS_KEY = "tokenizer.ggml.token_type"


class TokenKind(IntEnum):
    """The format's numbers for what a token is."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


_ID_KEYS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
}
_END_KEYS = (_ID_KEYS["eos_token"], "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
# A GGUF names one end of text and, if it is young, one end of a turn. The generation_config.json that it was made from
# may have named more, and files of Gemma name no end of a turn at all. llama.cpp finds them by their text; so do we,
# but among tokens that are more than text: Qwen's "</s>" is a piece of HTML.
_ENDS = frozenset((
    "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>", "<|end|>", "<end_of_turn>", "<EOT>",
    "<｜end▁of▁sentence｜>", "<end_of_utterance>",
))  # fmt: skip


@dataclass(frozen=True, slots=True)
class GgufVocabulary:
    """Every token by id.

    Invariant: no text appears twice, and `kinds` is as long as `texts`. `is_typed`: whether the file says what kind its
    tokens are; without it all are NORMAL. `named` maps "bos_token", "eos_token" and "unk_token" to ids where the file
    has them. `end_ids` end an answer.
    """

    texts: Sequence[str]
    kinds: Sequence[TokenKind]
    is_typed: bool
    named: Mapping[str, int]
    end_ids: tuple[int, ...]

    @property
    def named_texts(self) -> dict[str, str]:
        """The texts of `named`, where they are tokens."""
        return {name: self.texts[i] for name, i in self.named.items() if not self.is_padding(i)}

    def is_padding(self, token_id: int) -> bool:
        """Whether the id stands for no token: a converter filled the vocabulary up to the embedding's rows."""
        return self.kinds[token_id] == TokenKind.UNUSED and self.texts[token_id] in (f"[PAD{token_id}]", "")


def read_vocabulary(metadata: Metadata) -> GgufVocabulary:
    """The vocabulary, checked; raises ModelError naming file and key."""
    metadata.check_count(TOKENS_KEY, 1, MAX_TOKENS, "tokens")
    texts = metadata.texts(TOKENS_KEY)
    if (longest := max(map(len, texts))) > _MAX_TOKEN_CHARS:
        raise metadata.fault(TOKENS_KEY, f"a token of {longest:,} characters, which no real one has")
    kinds = _kinds(metadata, len(texts))
    for token_id, text in enumerate(texts):
        if not text:
            kinds[token_id] = TokenKind.UNUSED
    _refuse_twins(metadata, texts)
    last = len(texts) - 1
    named = {name: metadata.integer(key, 0, last) for name, key in _ID_KEYS.items() if key in metadata}
    ends = [metadata.integer(key, 0, last) for key in _END_KEYS if key in metadata]
    marked = (TokenKind.CONTROL, TokenKind.USER_DEFINED)
    ends += [token_id for token_id, text in enumerate(texts) if text in _ENDS and kinds[token_id] in marked]
    return GgufVocabulary(texts, kinds, KINDS_KEY in metadata, named, tuple(dict.fromkeys(ends)))


def _kinds(metadata: Metadata, num_tokens: int) -> list[TokenKind]:
    if KINDS_KEY not in metadata:
        return [TokenKind.NORMAL] * num_tokens
    metadata.check_count(KINDS_KEY, num_tokens, num_tokens, "tokens")
    kinds = list(TokenKind)
    return [kinds[number] for number in metadata.integers(KINDS_KEY, min(TokenKind), max(TokenKind))]


def _refuse_twins(metadata: Metadata, texts: Sequence[str]) -> None:
    if len(set(texts) - {""}) + texts.count("") == len(texts):
        return
    first: dict[str, int] = {}
    for token_id, text in enumerate(texts):
        if text and first.setdefault(text, token_id) != token_id:
            raise metadata.fault(TOKENS_KEY, f"{text!r:.80} is both token {first[text]} and token {token_id}")
