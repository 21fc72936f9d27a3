"""Chat messages as they come in, and as a chat template takes them. Runs in: anywhere; owns: nothing."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from edgekv.actors.service import ModelCard
from edgekv.http.errors import invalid
from edgekv.http.schema import Neutral, RequestModel, fault
from edgekv.text.errors import TextError

# What a template gets from the server itself; `self` is jinja's own.
RESERVED_KWARGS = frozenset(
    "self messages tools documents add_generation_prompt continue_final_message tokenizer chat_template".split()
)


class TextPart(RequestModel):
    """A piece of a message; only text is supported."""

    type: Literal["text"]
    text: str


class Message(RequestModel):
    """One message; `name` and `tool_call_id` are handed to the template, which may use them."""

    neutral: ClassVar[Neutral] = {
        "annotations": [None, []],
        "audio": [None],
        "function_call": [None],
        "reasoning": [None, ""],
        "reasoning_content": [None, ""],
        "refusal": [None],
        "tool_calls": [None, []],
        "weight": [None],
    }

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True, max_length=1024)] | None = None
    name: str | None = Field(None, max_length=256)
    tool_call_id: str | None = Field(None, max_length=256)

    @model_validator(mode="after")
    def _has_content(self) -> "Message":
        if self.content is None and self.role != "assistant":
            raise fault("content", f"A message of role '{self.role}' must have 'content'.")
        return self

    def for_template(self) -> dict[str, str]:
        """The message as templates know it: `developer` is the newer name of `system`, parts are joined by lines."""
        content = self.content or ""
        if not isinstance(content, str):
            content = "\n".join(part.text for part in content)
        message = {"role": "system" if self.role == "developer" else self.role, "content": content}
        for name, value in (("name", self.name), ("tool_call_id", self.tool_call_id)):
            if value is not None:
                message[name] = value
        return message


class Conversation(RequestModel):
    """Messages and how a template is to render them."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=10_000)]
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, max_length=32)

    @field_validator("chat_template_kwargs")
    @classmethod
    def _not_reserved(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        for name in value or {}:
            if name in RESERVED_KWARGS or not name.isidentifier():
                raise ValueError(f"'chat_template_kwargs' cannot set '{name[:64]}'.")
        return value

    def encode(self, card: ModelCard, *, add_special_tokens: bool = False) -> tuple[int, ...]:
        """The prompt's token ids. Raises `ApiError` 400 if the model's template does not take these messages."""
        if card.chat_template is None:
            raise invalid(
                "messages", "This model has no chat template; use /v1/completions.", code="chat_template_missing"
            )
        try:
            ids = card.chat_template.encode(
                card.tokenizer,
                [message.for_template() for message in self.messages],
                add_generation_prompt=self.add_generation_prompt is not False,
                **(self.chat_template_kwargs or {}),
            )
        except TextError as error:
            raise invalid("messages", f"'messages': {error}", code="invalid_messages") from None
        bos_id = card.tokenizer.bos_id
        if add_special_tokens and bos_id is not None and ids[:1] != [bos_id]:
            ids = [bos_id, *ids]
        return tuple(ids)
