"""Log-probabilities in the two shapes that OpenAI gives them. Runs in: anywhere; owns: nothing."""

from collections.abc import Sequence
from typing import Any

from edgekv.http.choice import ShownToken
from edgekv.text.tokenizer import Tokenizer

# JSON has no infinity, and a forbidden token has a probability of 0: vLLM's stand-in.
LOWEST = -9999.0


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[ShownToken]) -> dict[str, Any]:
    """`{"content": [{token, logprob, bytes, top_logprobs}], "refusal": null}`."""

    def entry(token_id: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": tokenizer.token_text(token_id),
            "logprob": _finite(logprob),
            "bytes": list(tokenizer.token_bytes(token_id)),
        }

    content = [
        {
            **entry(token.sampled.token_id, token.sampled.logprob),
            "top_logprobs": [entry(token_id, logprob) for token_id, logprob in token.sampled.top_logprobs],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(tokenizer: Tokenizer, tokens: Sequence[ShownToken]) -> dict[str, Any]:
    """`{tokens, token_logprobs, top_logprobs, text_offset}`, offsets in characters of the continuation.

    As with OpenAI the chosen token is among the top ones, even if it was not.
    """
    tops: list[dict[str, float]] = []
    for token in tokens:
        top = {tokenizer.token_text(token_id): _finite(logprob) for token_id, logprob in token.sampled.top_logprobs}
        top.setdefault(tokenizer.token_text(token.sampled.token_id), _finite(token.sampled.logprob))
        tops.append(top)
    return {
        "tokens": [tokenizer.token_text(token.sampled.token_id) for token in tokens],
        "token_logprobs": [_finite(token.sampled.logprob) for token in tokens],
        "top_logprobs": tops,
        "text_offset": [token.offset for token in tokens],
    }


def _finite(logprob: float | None) -> float:
    return LOWEST if logprob is None else max(logprob, LOWEST)
