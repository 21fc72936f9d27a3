"""/v1/chat/completions: the request and the wording of its answer. Runs in: trio; owns: one answer."""

import time
from collections.abc import Sequence
from typing import Any, ClassVar
from uuid import uuid4

from pydantic import Field, model_validator

from edgekv.actors.service import ModelCard
from edgekv.http.choice import Choice, Delta
from edgekv.http.generation import Generation
from edgekv.http.logprobs import chat_logprobs
from edgekv.http.messages import Conversation
from edgekv.http.sampling import MAX_TOKENS, MAX_TOP_LOGPROBS, NEUTRAL, GenerationFields
from edgekv.http.schema import Neutral, fault


class ChatRequest(Conversation, GenerationFields):
    """Body of a chat completion."""

    neutral: ClassVar[Neutral] = {
        **NEUTRAL,
        # OpenAI's
        "audio": [None],
        "function_call": [None, "none", "auto"],
        "functions": [None, []],
        "modalities": [None, ["text"]],
        "parallel_tool_calls": [None],
        "prediction": [None],
        "prompt_cache_retention": [None, "in_memory", "in-memory"],
        "reasoning_effort": [None, "none"],
        "response_format": [None, {"type": "text"}],
        "tool_choice": [None, "none", "auto"],
        "tools": [None, []],
        "verbosity": [None],
        "web_search_options": [None],
        # vLLM's
        "best_of": [None, 1],
        "chat_template": [None],
        "continue_final_message": [None, False],
        "documents": [None, []],
        "echo": [None, False],
        "include_reasoning": [None, True],
        "mm_processor_kwargs": [None],
    }

    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)

    @model_validator(mode="after")
    def _consistent(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise fault("top_logprobs", "'top_logprobs' is only allowed when 'logprobs' is true.")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise fault("max_tokens", "'max_tokens' and 'max_completion_tokens' differ; send one of them.")
        return self

    @property
    def token_limit(self) -> int | None:
        """The most tokens wanted; None is as many as fit."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives wanted beside each token; None is no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


class ChatFormat:
    """Chunks `chat.completion.chunk` and the whole `chat.completion`."""

    def __init__(self, request: ChatRequest, card: ModelCard) -> None:
        self.wants_usage = request.wants_usage
        self._tokenizer = card.tokenizer
        self._with_logprobs = request.num_logprobs is not None
        self._id, self._created, self._model = f"chatcmpl-{uuid4().hex}", int(time.time()), card.name

    def opening(self, choice: Choice) -> dict[str, Any]:
        """The chunk that names the speaker."""
        return self._chunk(choice, {"role": "assistant", "content": ""}, None, None)

    def delta(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        """A chunk of text."""
        logprobs = chat_logprobs(self._tokenizer, delta.tokens) if self._with_logprobs else None
        return self._chunk(choice, {"content": delta.text}, logprobs, None)

    def closing(self, choice: Choice) -> dict[str, Any]:
        """The chunk that says why the choice ended."""
        chunk = self._chunk(choice, {}, None, choice.finish_reason)
        return chunk if self.wants_usage else {**chunk, "edgekv": choice.debug()}

    def usage(self, generation: Generation) -> dict[str, Any]:
        """The chunk that counts."""
        return {**self._head("chat.completion.chunk"), "choices": [], **generation.account()}

    def whole(self, generation: Generation, texts: Sequence[Delta]) -> dict[str, Any]:
        """The answer in one piece."""
        choices = [
            {
                "index": choice.index,
                "message": {"role": "assistant", "content": text.text, "refusal": None},
                "logprobs": chat_logprobs(self._tokenizer, text.tokens) if self._with_logprobs else None,
                "finish_reason": choice.finish_reason,
            }
            for choice, text in zip(generation.choices, texts, strict=True)
        ]
        return {**self._head("chat.completion"), "choices": choices, **generation.account()}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _chunk(
        self, choice: Choice, delta: dict[str, Any], logprobs: dict[str, Any] | None, finish_reason: str | None
    ) -> dict[str, Any]:
        entry = {"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        chunk: dict[str, Any] = {**self._head("chat.completion.chunk"), "choices": [entry]}
        if self.wants_usage:
            chunk["usage"] = None
        return chunk
