"""/tokenize and /detokenize in vLLM's form. Runs in: anywhere; owns: nothing."""

from typing import Any, ClassVar, Self

from pydantic import Field, field_validator

from edgekv.actors.service import ModelCard
from edgekv.http.errors import invalid
from edgekv.http.messages import Conversation
from edgekv.http.schema import Neutral, RequestModel, check_token_ids, parse_object
from edgekv.text.errors import TextError


class TokenizeText(RequestModel):
    """`prompt` form of /tokenize."""

    model: str | None = Field(None, max_length=512)
    prompt: str
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    def encode(self, card: ModelCard) -> tuple[int, ...]:
        """The token ids. Raises `ApiError` 400."""
        try:
            ids = card.tokenizer.encode(
                self.prompt, add_special_tokens=self.add_special_tokens is not False, parse_special=True
            )
        except TextError as error:
            raise invalid("prompt", f"'prompt': {error}") from None
        return tuple(ids)


class TokenizeChat(Conversation):
    """`messages` form of /tokenize."""

    neutral: ClassVar[Neutral] = {
        "chat_template": [None],
        "continue_final_message": [None, False],
        "mm_processor_kwargs": [None],
        "tools": [None, []],
    }

    model: str | None = Field(None, max_length=512)
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeRequest:
    """Whichever form the body has."""

    def __init__(self, form: TokenizeText | TokenizeChat) -> None:
        self.form = form

    @classmethod
    def from_body(cls, body: bytes) -> Self:
        """Parse and validate. Raises `ApiError` 400."""
        value = parse_object(body)
        return cls(TokenizeChat.from_object(value) if "messages" in value else TokenizeText.from_object(value))

    def answer(self, card: ModelCard) -> dict[str, Any]:
        """The response's JSON object. Raises `ApiError` 400."""
        if isinstance(self.form, TokenizeText):
            ids = self.form.encode(card)
        else:
            ids = self.form.encode(card, add_special_tokens=self.form.add_special_tokens is True)
        strings = [card.tokenizer.token_text(id_) for id_ in ids] if self.form.return_token_strs else None
        return {"count": len(ids), "max_model_len": card.context_tokens, "tokens": list(ids), "token_strs": strings}


class DetokenizeRequest(RequestModel):
    """Body of /detokenize."""

    model: str | None = Field(None, max_length=512)
    tokens: Any

    @field_validator("tokens")
    @classmethod
    def _are_ids(cls, value: Any) -> Any:
        if isinstance(value, list) and all(type(item) is int for item in value):
            return value
        raise ValueError("'tokens' must be a list of token ids.")

    def answer(self, card: ModelCard) -> dict[str, Any]:
        """The response's JSON object. Raises `ApiError` 400."""
        check_token_ids("tokens", self.tokens, card.tokenizer.vocab_size)
        return {"prompt": card.tokenizer.decode(self.tokens, skip_special_tokens=False)}
