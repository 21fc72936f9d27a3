"""The fields that say how to continue a prompt, shared by chat and completions. Runs in: anywhere; owns: nothing."""

import secrets
from typing import Annotated, ClassVar, TypeVar

from pydantic import Field, field_validator, model_validator

from edgekv.actors.service import ModelCard
from edgekv.core.sampling import SamplingParams
from edgekv.http.errors import invalid
from edgekv.http.schema import Neutral, RequestModel, fault

MAX_CHOICES = 16
MAX_TOP_LOGPROBS = 20
MAX_TOKENS = 2**31 - 1

N = TypeVar("N", int, float)
StopString = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]

NEUTRAL: Neutral = {
    # OpenAI's
    "metadata": [None, {}],
    "service_tier": [None, "auto", "default"],
    "store": [None, False],
    # vLLM's
    "allowed_token_ids": [None],
    "bad_words": [None, []],
    "detokenize": [None, True],
    "include_stop_str_in_output": [None, False],
    "kv_transfer_params": [None],
    "length_penalty": [None, 1, 1.0],
    "prompt_logprobs": [None],
    "return_token_ids": [None, False],
    "return_tokens_as_token_ids": [None, False],
    "spaces_between_special_tokens": [None, True],
    "structured_outputs": [None],
    "guided_json": [None],
    "guided_regex": [None],
    "guided_choice": [None],
    "guided_grammar": [None],
    "truncate_prompt_tokens": [None],
    "use_beam_search": [None, False],
    "vllm_xargs": [None, {}],
}


class StreamOptions(RequestModel):
    """What a stream says beside its text."""

    neutral: ClassVar[Neutral] = {"include_obfuscation": [None, False], "continuous_usage_stats": [None, False]}

    include_usage: bool | None = None


class GenerationFields(RequestModel):
    """What chat and completions have in common; None is the same as absent.

    `user`, `safety_identifier` and `request_id` are labels, and `prompt_cache_key` a hint for servers with several
    caches: all are accepted and mean nothing here.
    """

    model: str | None = Field(None, max_length=512)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: StopString | Annotated[list[StopString], Field(fail_fast=True, max_length=16)] | None = None
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=1024)
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS)
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True, max_length=128)] | None = None
    cache_salt: str | None = Field(None, min_length=1, max_length=256)
    priority: int | None = Field(None, ge=-(2**31), le=2**31 - 1)
    add_special_tokens: bool | None = None
    skip_special_tokens: bool | None = None
    user: str | None = Field(None, max_length=512)
    safety_identifier: str | None = Field(None, max_length=512)
    prompt_cache_key: str | None = Field(None, max_length=512)
    request_id: str | None = Field(None, max_length=512)

    @field_validator("logit_bias")
    @classmethod
    def _token_ids(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for key in value or {}:
            if not (key.isascii() and key.isdecimal() and len(key) <= 10):
                raise ValueError("The keys of 'logit_bias' must be token ids.")
        return value

    @model_validator(mode="after")
    def _options_need_stream(self) -> "GenerationFields":
        if self.stream_options is not None and not self.stream:
            raise fault("stream_options", "'stream_options' is only allowed when 'stream' is true.")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def choices(self) -> int:
        """How many continuations of each prompt are wanted."""
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        """Whether the stream ends with a usage chunk."""
        return bool(self.stream and self.stream_options and self.stream_options.include_usage)

    def sampling(
        self, card: ModelCard, *, num_prompt: int, max_tokens: int | None, default_tokens: int, logprobs: int | None
    ) -> list[SamplingParams]:
        """Settings of each choice over one prompt: the request's, else the model's own, else OpenAI's defaults.

        Without `max_tokens` up to `default_tokens` are generated, as far as the context and the KV pool as it is now
        hold them. With a seed, choice i of a request uses seed + i.
        Raises `ContextLengthExceeded`, and `ApiError` 400 for a token id that the model does not have.
        """
        limit, own = card.limit_tokens, card.generation
        if num_prompt + (max_tokens or 1) > limit:
            raise card.exceeded(num_prompt, max_tokens or 1)
        allowed = max_tokens or max(1, min(default_tokens, card.present_tokens - num_prompt))
        if self.min_tokens is not None and self.min_tokens > allowed:
            raise invalid("min_tokens", f"'min_tokens' must be at most the {allowed} tokens that may be generated.")
        temperature = _first(self.temperature, 0.0 if own.do_sample is False else own.temperature, 1.0)
        top_k = _first(self.top_k, own.top_k, 0)
        stop_ids = frozenset(self.stop_token_ids or ()) | (frozenset() if self.ignore_eos else set(own.eos_token_ids))
        bias = tuple((int(key), value) for key, value in (self.logit_bias or {}).items() if value)
        vocab_size = card.tokenizer.vocab_size
        for name, ids in (("logit_bias", [token for token, _ in bias]), ("stop_token_ids", self.stop_token_ids or [])):
            if any(token >= vocab_size for token in ids):
                raise invalid(name, f"'{name}' names a token id outside the vocabulary of {vocab_size}.")
        seed = secrets.randbits(63) if self.seed is None else self.seed
        return [
            SamplingParams(
                max_tokens=allowed,
                seed=(seed + index) % 2**64,
                temperature=temperature,
                top_k=top_k if top_k > 0 else None,
                top_p=_first(self.top_p, own.top_p, 1.0),
                min_p=_first(self.min_p, own.min_p, 0.0),
                repetition_penalty=_first(self.repetition_penalty, own.repetition_penalty, 1.0),
                presence_penalty=self.presence_penalty or 0.0,
                frequency_penalty=self.frequency_penalty or 0.0,
                logit_bias=bias,
                logprobs=logprobs,
                min_tokens=self.min_tokens or 0,
                stop_token_ids=stop_ids,
            )
            for index in range(self.choices)
        ]


def _first(*values: N | None) -> N:
    return next(value for value in values if value is not None)
