"""Errors of text: what a person sent, or a model folder holds, that cannot be turned into tokens or a prompt.

Runs in: anywhere; owns: nothing.
"""

from edgekv.errors import EdgeKVError


class TextError(EdgeKVError):
    """A text cannot be encoded, or ids cannot be decoded (HTTP 400)."""


class TextTooLong(TextError):
    """The text is refused before tokenizing; `limit_bytes` is the tokenizer's cap, both counts are UTF-8 bytes."""

    def __init__(self, text_bytes: int, limit_bytes: int) -> None:
        super().__init__(f"The text is {text_bytes:,} bytes long; at most {limit_bytes:,} bytes are tokenized at once.")
        self.text_bytes, self.limit_bytes = text_bytes, limit_bytes


class UnknownTokenId(TextError):
    """An id lies outside the vocabulary."""

    def __init__(self, token_id: int, vocab_size: int) -> None:
        super().__init__(f"Token id {token_id} is outside the vocabulary (0 to {vocab_size - 1}).")
        self.token_id, self.vocab_size = token_id, vocab_size


class TemplateError(TextError):
    """A chat template refused these messages, failed on them, or asked for more time or memory than it gets."""
