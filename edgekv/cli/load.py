"""Load for any OpenAI-compatible chat server, and what came of it. Runs in: trio; owns: its connections.

The same seed gives the same prompts and arrivals. Inter-token latency is the gap between chunks that carry text, so a
server that sends several tokens at once shows fewer, longer gaps; time per output token (first to last over the count
in `usage`) does not depend on that.
"""

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2
import trio

from edgekv.cli.percentile import percentile

WORDS = (
    "the of and to in is that for it as with on be at by this from or an are not have file name value type class "
    "method return string list object function module number path error call code data time default argument set get "
    "key first new line text print import range index count table memory block page server client request answer "
    "queue thread lock event loop state token model cache batch prompt user system write read open close start stop "
    "input output result test check build version option format field record order copy move change update remove "
    "search find match"
).split()
TOKENS_PER_WORD = 1.35


@dataclass(frozen=True, slots=True)
class Load:
    """What to send. `rate` is arrivals a second (0: all at once), `concurrency` the most in flight (0: no limit)."""

    requests: int = 16
    rate: float = 0.0
    concurrency: int = 0
    seed: int = 0
    system_tokens: int = 200
    tail_tokens: int = 60
    max_tokens: int = 64
    temperature: float = 0.0
    unique_system: bool = False
    warmup: int = 1
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Answer:
    """One chat: when it was due, when its chunks of text came (seconds from the start), and how it ended."""

    due_s: float
    chunks_s: list[float] = field(default_factory=list)
    end_s: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        """From when it was due to the first text."""
        return self.chunks_s[0] - self.due_s


class Target:
    """A server under load: `client` speaks to its `/v1`."""

    def __init__(self, client: httpx2.AsyncClient, model: str, tokens_per_word: float) -> None:
        self._client, self.model, self._tokens_per_word = client, model, tokens_per_word

    @classmethod
    async def find(
        cls, client: httpx2.AsyncClient, model: str | None, tokens_per_word: float | None = None
    ) -> "Target":
        """Ask for the model (the first listed, unless named) and how many tokens its words make, unless that is known.

        Only servers that are given the same `tokens_per_word` get the same prompts from the same seed.
        """
        if model is None:
            listed = await client.get("models")
            listed.raise_for_status()
            model = str(listed.json()["data"][0]["id"])
        return cls(client, model, tokens_per_word or await _measure_words(client, model))

    def text(self, rng: random.Random, num_tokens: int) -> str:
        """About `num_tokens` tokens of words."""
        return " ".join(rng.choice(WORDS) for _ in range(max(1, round(num_tokens / self._tokens_per_word))))

    async def chat(
        self, messages: list[dict[str, str]], load: Load, clock: Callable[[], float], due_s: float
    ) -> Answer:
        """Stream one chat; whatever goes wrong with it is part of the answer."""
        answer = Answer(due_s)
        body = {
            "model": self.model, "messages": messages, "max_tokens": load.max_tokens, "temperature": load.temperature,
            "stream": True, "stream_options": {"include_usage": True}, **load.extra,
        }  # fmt: skip
        try:
            async with self._client.stream("POST", "chat/completions", json=body) as response:
                if response.status_code != 200:
                    await response.aread()
                    answer.error = f"HTTP {response.status_code}: {response.text[:200]}"
                else:
                    # Read to the end whatever comes: httpx2's iterators do not like to be left early under trio.
                    async for line in response.aiter_lines():
                        if line.startswith("data:"):
                            _take(line[5:].strip(), answer, clock)
        except httpx2.HTTPError as error:
            answer.error = f"{type(error).__name__}: {error}"
        if answer.error is None and not answer.chunks_s:
            answer.error = "no text came"
        answer.end_s = clock()
        return answer


async def run_load(target: Target, load: Load) -> list[Answer]:
    """Send the whole load and gather the answers, in the order of the requests."""
    rng = random.Random(load.seed)
    system = target.text(rng, load.system_tokens) if load.system_tokens else None
    chats: list[list[dict[str, str]]] = []
    for number in range(load.requests + load.warmup):
        own = target.text(rng, load.system_tokens) if load.unique_system and load.system_tokens else system
        user = f"{number} {rng.getrandbits(32):08x} {target.text(rng, load.tail_tokens)}"
        start = [{"role": "system", "content": own}] if own else []
        chats.append([*start, {"role": "user", "content": user}])
    arrivals: list[float] = []
    at = 0.0
    for _ in range(load.requests):
        arrivals.append(at)
        at += rng.expovariate(load.rate) if load.rate > 0 else 0.0
    for chat in chats[load.requests :]:
        await target.chat(chat, load, time.perf_counter, 0.0)
    zero = time.perf_counter()

    def clock() -> float:
        return time.perf_counter() - zero

    answers = [Answer(0.0, error="not sent") for _ in range(load.requests)]
    gate = trio.Semaphore(load.concurrency or load.requests)

    async def send(number: int) -> None:
        # With a rate a chat is due when it arrives, and waiting for the gate counts as latency. Without one each
        # client sends its next chat when the last is answered.
        due_s = arrivals[number] if load.rate > 0 else clock()
        answers[number] = await target.chat(chats[number], load, clock, due_s)
        gate.release()

    async with trio.open_nursery() as nursery:
        for number in range(load.requests):
            await trio.sleep(max(0.0, arrivals[number] - clock()))
            await gate.acquire()
            nursery.start_soon(send, number)
    return answers


async def measure_prefix(target: Target, prefix_tokens: int, load: Load, rounds: int) -> list[tuple[Answer, Answer]]:
    """For each round a prefix never sent before: one chat that meets it cold, then one that shares it."""
    rng = random.Random(f"prefix {load.seed} {time.time_ns()}")
    pairs: list[tuple[Answer, Answer]] = []
    for _ in range(rounds):
        system = f"{rng.getrandbits(64):016x} {target.text(rng, prefix_tokens)}"
        both: list[Answer] = []
        for name in ("cold", "warm"):
            user = f"{name} {rng.getrandbits(32):08x} {target.text(rng, load.tail_tokens)}"
            messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
            both.append(await target.chat(messages, load, time.perf_counter, time.perf_counter()))
        pairs.append((both[0], both[1]))
    return pairs


def summarise(answers: Sequence[Answer]) -> dict[str, Any]:
    """Counts, token rates, and latencies in milliseconds at several percentiles."""
    good = [answer for answer in answers if answer.error is None]
    gaps = [later - sooner for a in good for sooner, later in zip(a.chunks_s, a.chunks_s[1:], strict=False)]
    spans = [(a.chunks_s[-1] - a.chunks_s[0]) / (a.output_tokens - 1) for a in good if a.output_tokens > 1]
    duration = max((answer.end_s for answer in good), default=0.0)
    tokens = sum(answer.output_tokens for answer in good)
    count = max(1, len(good))
    return {
        "ok": len(good),
        "errors": len(answers) - len(good),
        "first_errors": sorted({answer.error for answer in answers if answer.error is not None})[:3],
        "prompt_tokens_mean": round(sum(answer.prompt_tokens for answer in good) / count, 1),
        "cached_tokens_mean": round(sum(answer.cached_tokens for answer in good) / count, 1),
        "output_tokens": tokens,
        "duration_s": round(duration, 3),
        "output_tok_s": round(tokens / duration, 2) if duration else 0.0,
        "ttft_ms": _milliseconds([answer.ttft_s for answer in good], 50, 90, 99),
        "itl_ms": _milliseconds(gaps, 10, 50, 99),
        "tpot_ms": _milliseconds(spans, 50, 99),
        "e2e_ms": _milliseconds([answer.end_s - answer.due_s for answer in good], 50, 99),
    }


def _take(data: str, answer: Answer, clock: Callable[[], float]) -> None:
    """Enter one event; what it may say of an error is the answer's."""
    if data == "[DONE]" or answer.error is not None:
        return
    try:
        event = json.loads(data)
    except ValueError:
        answer.error = f"not JSON: {data[:100]!r}"
        return
    if event.get("error"):
        answer.error = str(event["error"])[:200]
    if usage := event.get("usage"):
        answer.prompt_tokens = usage.get("prompt_tokens") or 0
        answer.output_tokens = usage.get("completion_tokens") or 0
        answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    for choice in event.get("choices") or []:
        delta = choice.get("delta") or {}
        if delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning"):
            answer.chunks_s.append(clock())
            answer.output_tokens = max(answer.output_tokens, len(answer.chunks_s))


async def _measure_words(client: httpx2.AsyncClient, model: str) -> float:
    """Tokens per word, from the server's own tokenizer where it offers one (vLLM's `/tokenize`)."""
    url = client.base_url.copy_with(path=client.base_url.path.removesuffix("/").removesuffix("/v1") + "/tokenize")
    try:
        answer = await client.post(url, json={"model": model, "prompt": " ".join(WORDS), "add_special_tokens": False})
        count = answer.json()["count"]
    except (httpx2.HTTPError, ValueError, KeyError, TypeError):
        return TOKENS_PER_WORD
    return count / len(WORDS) if isinstance(count, int) and count > 0 else TOKENS_PER_WORD


def _milliseconds(seconds: Sequence[float], *percents: int) -> dict[str, float | None]:
    found = {f"p{percent}": percentile(seconds, percent) for percent in percents}
    return {name: None if value is None else round(value * 1e3, 1) for name, value in found.items()}
