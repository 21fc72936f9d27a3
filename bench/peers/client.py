"""One stream at a time over HTTP: how long a prompt takes, and how long each token after it.

Runs in: the main thread; owns: a connection.
"""

import random
import statistics
import time
from dataclasses import dataclass

import httpx2

LOWEST_ID = 300  # below it are control tokens and bytes


@dataclass(frozen=True, slots=True)
class Stream:
    """Prompt tokens a second without a cache, and tokens a second after the prompt, several times."""

    prefill_tok_s: float
    decode_tok_s: tuple[float, ...]


class Client:
    """Asks for completions of random token ids; no text is streamed, so nothing depends on how a server cuts it."""

    def __init__(self, url: str, vocab_size: int, seed: int) -> None:
        # A connection for each request: some servers close an idle one just as the next request goes out on it.
        limits = httpx2.Limits(max_keepalive_connections=0)
        self._http = httpx2.Client(base_url=url + "/", timeout=600, trust_env=False, limits=limits)
        self._rng, self._vocab_size = random.Random(seed), vocab_size
        self._model = self._http.get("models").json()["data"][0]["id"]

    def close(self) -> None:
        self._http.close()

    def measure(self, prompt_tokens: int, output_tokens: int, repeat: int) -> Stream:
        """The same prompt again and again: unknown for one token; then, from the cache, for one token and for more.

        The last two differ by the tokens between them and by nothing else.
        """
        prompt = [self._rng.randrange(LOWEST_ID, self._vocab_size) for _ in range(prompt_tokens)]
        cold = self._ask(prompt, 1)
        warm = statistics.median(self._ask(prompt, 1) for _ in range(3)) if repeat else 0.0
        decodes = tuple(output_tokens / (self._ask(prompt, 1 + output_tokens) - warm) for _ in range(repeat))
        return Stream(prompt_tokens / cold, decodes)

    def _ask(self, prompt: list[int], max_tokens: int) -> float:
        body = {
            "model": self._model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True,
        }  # fmt: skip
        begun = time.perf_counter()
        answer = self._http.post("completions", json=body)
        took = time.perf_counter() - begun
        answer.raise_for_status()
        usage = answer.json()["usage"]
        if (usage["prompt_tokens"], usage["completion_tokens"]) != (len(prompt), max_tokens):
            raise ValueError(f"asked for {len(prompt)} + {max_tokens} tokens, got {usage}")
        return took
