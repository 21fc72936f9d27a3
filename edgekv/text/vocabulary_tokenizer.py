"""What both tokenizers have in common: the vocabulary, the cap on a text, and decoding.

Runs in: anywhere; owns: nothing that changes after loading.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from edgekv.text.control_text import ControlText
from edgekv.text.detokenizer import Detokenizer
from edgekv.text.errors import TextError, TextTooLong
from edgekv.text.vocabulary import Vocabulary


class VocabularyTokenizer(ABC):
    """A `Tokenizer` whose vocabulary is known as bytes; subclasses encode."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        control_text: ControlText,
        named_tokens: Mapping[str, str],
        named_ids: Mapping[str, int],
        *,
        max_bytes: int,
    ) -> None:
        self._vocabulary = vocabulary
        self._control_text = control_text
        self._named_tokens = dict(named_tokens)
        self._named_ids = dict(named_ids)
        self._max_bytes = max_bytes

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return len(self._vocabulary)

    @property
    def vocabulary(self) -> Vocabulary:
        """The pieces, and the bytes they stand for."""
        return self._vocabulary

    @property
    def bos_id(self) -> int | None:
        """The id that begins a text."""
        return self._named_ids.get("bos_token")

    @property
    def eos_id(self) -> int | None:
        """The id that ends a text."""
        return self._named_ids.get("eos_token")

    @property
    def special_ids(self) -> frozenset[int]:
        """The ids that `skip_special_tokens` leaves out."""
        return self._vocabulary.special_ids

    @property
    def named_tokens(self) -> Mapping[str, str]:
        """The variables a chat template sees."""
        return self._named_tokens

    @property
    def control_text(self) -> ControlText:
        """The texts that spell control tokens."""
        return self._control_text

    @abstractmethod
    def encode(self, text: str, *, add_special_tokens: bool, parse_special: bool) -> list[int]:
        """Token ids of a text."""

    @abstractmethod
    def encode_parts(self, text: str, control: Sequence[tuple[int, int]]) -> list[int]:
        """Token ids of a text in which only the `control` spans are control tokens."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ids."""
        return self._vocabulary.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """One token as text."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """One token as UTF-8 bytes."""
        return self._vocabulary.bytes_of(token_id)

    def detokenizer(self, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True) -> Detokenizer:
        """A decoder for one stream of generated ids."""
        return Detokenizer(self._vocabulary, prompt_ids, skip_special_tokens=skip_special_tokens)

    def _check(self, text: str) -> None:
        # A character is at least one byte: most texts over the cap need no encoding to be refused.
        try:
            text_bytes = len(text) if len(text) > self._max_bytes else len(text.encode("utf-8"))
        except UnicodeEncodeError as error:
            raise TextError(f"The text is not valid Unicode: a lone surrogate at character {error.start}.") from error
        if text_bytes > self._max_bytes:
            raise TextTooLong(text_bytes, self._max_bytes)
