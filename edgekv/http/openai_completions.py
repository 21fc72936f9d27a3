"""/v1/completions: the request and the wording of its answer. Runs in: trio; owns: one answer."""

import time
from collections.abc import Sequence
from typing import Any, ClassVar
from uuid import uuid4

from pydantic import Field, field_validator, model_validator

from edgekv.actors.service import ModelCard
from edgekv.http.choice import Choice, Delta
from edgekv.http.errors import invalid
from edgekv.http.generation import Generation
from edgekv.http.logprobs import completion_logprobs
from edgekv.http.sampling import MAX_TOP_LOGPROBS, NEUTRAL, GenerationFields
from edgekv.http.schema import Neutral, check_token_ids, fault
from edgekv.text.errors import TextError

DEFAULT_MAX_TOKENS = 16
MAX_PROMPTS = 64


class CompletionRequest(GenerationFields):
    """Body of a completion. `prompt` is text, token ids, or several of either."""

    neutral: ClassVar[Neutral] = {
        **NEUTRAL,
        "best_of": [None, 1],
        "prompt_embeds": [None],
        "response_format": [None, {"type": "text"}],
        "suffix": [None, ""],
    }

    prompt: Any
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)

    @field_validator("prompt")
    @classmethod
    def _is_prompt(cls, value: Any) -> Any:
        # By hand: pydantic would try each kind on each of a hundred thousand ids, and report a fault for every one.
        if value is None:
            raise ValueError("Missing required parameter: 'prompt'.")
        if isinstance(value, str):
            return value
        if isinstance(value, list) and value:
            if all(type(item) is int for item in value) or all(isinstance(item, str) for item in value):
                return value
            if all(isinstance(item, list) and item and all(type(id_) is int for id_ in item) for item in value):
                return value
        raise ValueError("'prompt' must be a string, a list of token ids, or a list of either.")

    @model_validator(mode="after")
    def _consistent(self) -> "CompletionRequest":
        if self.echo and self.logprobs is not None:
            raise fault("logprobs", "'echo' together with 'logprobs' is not supported by this server.")
        if len(self.prompts) * self.choices > MAX_PROMPTS:
            raise fault("n", f"'prompt' and 'n' ask for more than {MAX_PROMPTS} completions in one request.")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt of the request."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    def encode(self, card: ModelCard) -> list[tuple[int, ...]]:
        """Token ids of each prompt. Raises `ApiError` 400.

        The prompt is the caller's to compose: text of control tokens in it means those tokens.
        """
        encoded: list[tuple[int, ...]] = []
        for prompt in self.prompts:
            if isinstance(prompt, str):
                try:
                    ids = card.tokenizer.encode(
                        prompt, add_special_tokens=self.add_special_tokens is not False, parse_special=True
                    )
                except TextError as error:
                    raise invalid("prompt", f"'prompt': {error}") from None
            else:
                check_token_ids("prompt", prompt, card.tokenizer.vocab_size)
                ids = prompt
            if not ids:
                raise invalid("prompt", "'prompt' must hold at least one token.")
            encoded.append(tuple(ids))
        return encoded

    def echoes(self, card: ModelCard, encoded: Sequence[tuple[int, ...]]) -> list[str]:
        """What each prompt's completions begin with: the prompt if `echo`, else nothing."""
        if not self.echo:
            return ["" for _ in encoded]
        return [
            prompt if isinstance(prompt, str) else card.tokenizer.decode(ids, skip_special_tokens=False)
            for prompt, ids in zip(self.prompts, encoded, strict=True)
        ]


class CompletionFormat:
    """`text_completion`, in chunks or whole."""

    def __init__(self, request: CompletionRequest, card: ModelCard, echoes: Sequence[str]) -> None:
        self.wants_usage = request.wants_usage
        self._tokenizer = card.tokenizer
        self._with_logprobs = request.logprobs is not None
        self._echoes = [echo for echo in echoes for _ in range(request.choices)]
        self._head = {
            "id": f"cmpl-{uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": card.name,
        }

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        """The echoed prompt."""
        echo = self._echoes[choice.index]
        return self._chunk(choice.index, echo, None, None) if echo else None

    def delta(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        """A chunk of text."""
        return self._chunk(choice.index, delta.text, self._logprobs(delta), None)

    def closing(self, choice: Choice) -> dict[str, Any]:
        """The chunk that says why the choice ended."""
        chunk = self._chunk(choice.index, "", None, choice.finish_reason)
        return chunk if self.wants_usage else {**chunk, "edgekv": choice.debug()}

    def usage(self, generation: Generation) -> dict[str, Any]:
        """The chunk that counts."""
        return {**self._head, "choices": [], **generation.account()}

    def whole(self, generation: Generation, texts: Sequence[Delta]) -> dict[str, Any]:
        """The answer in one piece."""
        choices = [
            {
                "index": choice.index,
                "text": self._echoes[choice.index] + text.text,
                "logprobs": self._logprobs(text),
                "finish_reason": choice.finish_reason,
            }
            for choice, text in zip(generation.choices, texts, strict=True)
        ]
        return {**self._head, "choices": choices, **generation.account()}

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        return completion_logprobs(self._tokenizer, delta.tokens) if self._with_logprobs else None

    def _chunk(
        self, index: int, text: str, logprobs: dict[str, Any] | None, finish_reason: str | None
    ) -> dict[str, Any]:
        entry = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
        chunk: dict[str, Any] = {**self._head, "choices": [entry]}
        if self.wants_usage:
            chunk["usage"] = None
        return chunk
