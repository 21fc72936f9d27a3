"""The one interface of tokenizers, and which of its two implementations a model gets.

Runs in: anywhere; all methods may be called by several threads at once; owns: nothing.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from edgekv.config.model_path import gguf_at
from edgekv.errors import ModelError
from edgekv.text.control_text import ControlText
from edgekv.text.detokenizer import Detokenizer
from edgekv.text.tokenizer_files import read_tokenizer_files

MAX_BYTES = 4 << 20
"""Default cap on one text, UTF-8 bytes: about a million tokens, and under two seconds of work without the GIL."""


class Tokenizer(Protocol):
    """Text to token ids and back."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id; a model's embedding table may be larger."""
        ...

    @property
    def bos_id(self) -> int | None:
        """The id that begins a text."""
        ...

    @property
    def eos_id(self) -> int | None:
        """The id that ends a text; a model's generation settings may name more."""
        ...

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids that `skip_special_tokens` leaves out."""
        ...

    @property
    def named_tokens(self) -> Mapping[str, str]:
        """The variables a chat template sees: "bos_token" and the like, with their texts."""
        ...

    @property
    def control_text(self) -> ControlText:
        """The texts that spell control tokens."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool, parse_special: bool) -> list[int]:
        """Token ids of a text.

        Args:
            text: at most as many UTF-8 bytes as the tokenizer was made for.
            add_special_tokens: put the beginning- and end-of-text ids around it that the model folder asks for.
            parse_special: let text that spells a control token become its id; otherwise it is ordinary text.

        Raises:
            TextTooLong: over the cap.
            TextError: not Unicode text (a lone surrogate).
        """
        ...

    def encode_parts(self, text: str, control: Sequence[tuple[int, int]]) -> list[int]:
        """Like `encode` without added ids, but only the `control` spans (start, end) are control tokens.

        The spans are sorted, do not overlap, and each spells one of `control_text`.
        """
        ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ids.

        Raises:
            UnknownTokenId: an id outside the vocabulary.
        """
        ...

    def token_text(self, token_id: int) -> str:
        """One token as text, U+FFFD for half a character, "" for an id without a token."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """One token as UTF-8 bytes, b"" for an id without a token."""
        ...

    def detokenizer(self, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True) -> Detokenizer:
        """A decoder for one stream of generated ids that follow `prompt_ids`."""
        ...


def load_tokenizer(folder: Path, *, max_bytes: int = MAX_BYTES) -> Tokenizer:
    """The tokenizer of a model folder: tokenizer.json if there is one, else tokenizer.model; or that of a GGUF file.

    Args:
        folder: a folder in Hugging Face's form, or a GGUF file.
        max_bytes: the longest text `encode` takes, in UTF-8 bytes.

    Raises:
        ModelError: neither file, or one that is broken, by name.
    """
    if (file := gguf_at(folder)) is not None:
        from edgekv.text.gguf_tokenizer import load_gguf_tokenizer

        return load_gguf_tokenizer(file, max_bytes=max_bytes)
    files = read_tokenizer_files(folder)
    if (folder / "tokenizer.json").exists():
        from edgekv.text.json_tokenizer import JsonTokenizer

        return JsonTokenizer.read(folder / "tokenizer.json", files, max_bytes=max_bytes)
    if (folder / "tokenizer.model").exists():
        from edgekv.text.sentencepiece_tokenizer import SentencePieceTokenizer

        return SentencePieceTokenizer.read(folder / "tokenizer.model", files, max_bytes=max_bytes)
    raise ModelError(f"{folder}: no tokenizer: neither tokenizer.json nor tokenizer.model is there")
