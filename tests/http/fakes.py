"""A service that behaves like the engine's, with a script in place of a model."""

import math
from collections.abc import Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

import httpx2
import trio

from edgekv.actors.service import Health, MemoryView, ModelCard, SequenceDraft
from edgekv.actors.stream import Failed, TokenStream
from edgekv.core.sequence import FinishReason
from edgekv.core.step import EngineStats, Finished, PoolStats, Sampled, SpeculationStats, Started, TokenOut
from edgekv.errors import ContextLengthExceeded
from edgekv.http.app import build_app
from edgekv.http.server import serve_http
from edgekv.http.settings import HttpSettings
from edgekv.model.spec import GenerationDefaults
from edgekv.text.chat_template import ChatTemplate
from edgekv.text.control_text import ControlText
from edgekv.text.detokenizer import Detokenizer
from edgekv.text.vocabulary import DecodeRules, Vocabulary

SPECIAL = {"<s>": 256, "</s>": 257, "<|user|>": 258, "<|assistant|>": 259, "<|system|>": 260}
EOS = SPECIAL["</s>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'tool' %}{{ raise_exception('This model knows no tools.') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
REPLY = "Once upon a time there was a naïve 😀 robot. It wrote prose.\nThe end, said everybody, and went home."


class ByteTokenizer:
    """A token for each byte, and the special ones."""

    vocab_size = 261
    bos_id = SPECIAL["<s>"]
    eos_id = EOS
    special_ids = frozenset(SPECIAL.values())
    named_tokens: Mapping[str, str] = {"bos_token": "<s>", "eos_token": "</s>"}
    control_text = ControlText(SPECIAL)

    def __init__(self) -> None:
        pieces = [f"<0x{byte:02X}>" for byte in range(256)] + list(SPECIAL)
        self._vocabulary = Vocabulary(pieces, self.special_ids, DecodeRules(False, (), True, 0, False))

    def encode(self, text: str, *, add_special_tokens: bool, parse_special: bool) -> list[int]:
        ids = self.encode_parts(text, self.control_text.spans(text) if parse_special else [])
        return [self.bos_id, *ids] if add_special_tokens else ids

    def encode_parts(self, text: str, control: Sequence[tuple[int, int]]) -> list[int]:
        ids: list[int] = []
        position = 0
        for start, end in control:
            ids += text[position:start].encode()
            ids.append(SPECIAL[text[start:end]])
            position = end
        return ids + list(text[position:].encode())

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._vocabulary.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        return self.decode([token_id], skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        return self._vocabulary.bytes_of(token_id)

    def detokenizer(self, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True) -> Detokenizer:
        return Detokenizer(self._vocabulary, prompt_ids, skip_special_tokens=skip_special_tokens)


def card(**changes: object) -> ModelCard:
    """The scripted model's card."""
    values: dict[str, object] = {
        "name": "scripted",
        "aliases": ("gpt-4o", "org/scripted"),
        "created": 1_700_000_000,
        "context_tokens": 400_000,
        "model_context_tokens": 400_000,
        "pool_tokens": 300_000,
        "block_size": 16,
        "tokenizer": ByteTokenizer(),
        "chat_template": ChatTemplate({"default": TEMPLATE}, ByteTokenizer.named_tokens),
        "generation": GenerationDefaults(eos_token_ids=(EOS,), bos_token_id=256),
    }
    return ModelCard(**{**values, **changes})  # type: ignore[arg-type]


@dataclass
class ScriptedService:
    """Says `reply` and then the end-of-sequence token, some tokens a tick, to whoever asks.

    With a temperature the seed chooses where in the reply to begin. `fails_after`: tokens before the engine is lost.
    """

    reply: str = REPLY
    tick_s: float = 0.001
    tokens_per_tick: int = 4
    cached_tokens: int = 0
    miss: str | None = None
    failure: Failed = field(default_factory=partial(Failed, "device_lost", "The card is gone."))
    watched: MemoryView | None = None
    speculation: SpeculationStats | None = None
    degraded: str = ""
    fails_after: int | None = None
    ends_with: FinishReason | None = None
    refuses: Exception | None = None
    served: ModelCard | Exception = field(default_factory=card)
    drafts: list[SequenceDraft] = field(default_factory=list)
    running: set[int] = field(default_factory=set)
    aborted: list[int] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: {"prompt": 0, "generated": 0})
    nursery: trio.Nursery | None = None

    def card(self) -> ModelCard:
        if isinstance(self.served, Exception):
            raise self.served
        return self.served

    def health(self) -> Health:
        if isinstance(self.served, Exception):
            return Health("loading", "12 % of 3 GB")
        return Health("degraded", self.degraded) if self.degraded else Health("ok")

    def memory(self) -> MemoryView | None:
        return self.watched

    def stats(self) -> EngineStats | None:
        pool = PoolStats(total_blocks=100, free_blocks=60, cached_blocks=15, active_blocks=25, block_size=16)
        return EngineStats(
            pool=pool,
            running=len(self.running),
            waiting=0,
            steps=7,
            forward_s=1.25,
            prompt_tokens=self.counts["prompt"],
            generated_tokens=self.counts["generated"],
            misses={"cold": 1},
            proposed_tokens=50,
            accepted_tokens=31,
            speculation=self.speculation,
        )

    async def open(self, drafts: Sequence[SequenceDraft]) -> list[TokenStream]:
        await trio.lowlevel.checkpoint()
        if self.refuses is not None:
            raise self.refuses
        limit = self.card().limit_tokens
        for draft in drafts:
            if draft.needed_tokens > limit:
                raise ContextLengthExceeded(limit, len(draft.prompt), draft.sampling.max_tokens)
        assert self.nursery is not None
        streams = []
        for draft in drafts:
            stream = TokenStream(len(self.drafts), self)
            self.drafts.append(draft)
            self.running.add(stream.sequence_id)
            self.counts["prompt"] += len(draft.prompt)
            self.nursery.start_soon(self._speak, draft, stream)
            streams.append(stream)
        return streams

    def started(self, sequence_id: int) -> None:
        pass

    def ended(self, sequence_id: int, *, unfinished: bool) -> None:
        self.running.discard(sequence_id)
        if unfinished:
            self.aborted.append(sequence_id)

    def _script(self, draft: SequenceDraft) -> list[int]:
        data = self.reply.encode()
        if draft.sampling.temperature:
            at = draft.sampling.seed % 7
            data = data[at:]
        return [*data, EOS]

    async def _speak(self, draft: SequenceDraft, stream: TokenStream) -> None:
        number, sampling = stream.sequence_id, draft.sampling
        await trio.sleep(self.tick_s)
        if self.fails_after == 0:
            stream.push(self.failure)
            return
        stream.push(Started(number, self.cached_tokens, self.miss))
        for count, token_id in enumerate(self._tokens(draft), 1):
            if stream.has_ended:
                return
            if self.fails_after is not None and count > self.fails_after:
                stream.push(self.failure)
                return
            self.counts["generated"] += 1
            is_stop = token_id in sampling.stop_token_ids and count > sampling.min_tokens
            stream.push(TokenOut(number, self._sampled(token_id, sampling.logprobs), is_stop))
            if is_stop or count == sampling.max_tokens:
                reason = FinishReason.STOP if is_stop else FinishReason.LENGTH
                stream.push(Finished(number, self.ends_with or reason))
                return
            if count % self.tokens_per_tick == 0:
                await trio.sleep(self.tick_s)

    def _tokens(self, draft: SequenceDraft) -> list[int]:
        script = self._script(draft)
        repeats = math.ceil(draft.sampling.max_tokens / len(script)) if EOS not in draft.sampling.stop_token_ids else 1
        return script * min(repeats, 10_000)

    @staticmethod
    def _sampled(token_id: int, logprobs: int | None) -> Sampled:
        if logprobs is None:
            return Sampled(token_id)
        top = tuple(((token_id + rank) % 256, -0.5 - rank) for rank in range(logprobs))
        return Sampled(token_id, -0.5, top)


@dataclass
class Server:
    """A server on a free port of the loopback interface."""

    service: ScriptedService
    url: str
    stop: trio.Event
    stopped: trio.Event

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


@asynccontextmanager
async def running(service: ScriptedService | None = None, **settings: object):  # type: ignore[no-untyped-def]
    """A real server over sockets, in this process; on leaving it is stopped, and must have stopped within its grace."""
    service = service or ScriptedService()
    chosen = HttpSettings(**{"port": 0, "grace_s": 1.0, **settings})  # type: ignore[arg-type]
    server = Server(service, "", trio.Event(), trio.Event())
    listening = trio.Event()

    async def host() -> None:
        async with trio.open_nursery() as nursery:
            urls = await nursery.start(partial(serve_http, service, chosen, stop=server.stop))
            server.url = urls[0]
            listening.set()
        server.stopped.set()

    async with trio.open_nursery() as nursery, trio.open_nursery() as engine:
        service.nursery = engine
        nursery.start_soon(host)
        await listening.wait()
        yield server
        server.stop.set()
        with trio.fail_after(chosen.grace_s + 2):
            await server.stopped.wait()
        engine.cancel_scope.cancel()


@asynccontextmanager
async def calling(service: ScriptedService | None = None, *, client=("127.0.0.1", 50_000), **settings: object):  # type: ignore[no-untyped-def]
    """An httpx2 client that calls the application directly, without sockets."""
    service = service or ScriptedService()
    app = build_app(service, HttpSettings(**settings))  # type: ignore[arg-type]
    transport = httpx2.ASGITransport(app, client=client)
    async with trio.open_nursery() as engine:
        service.nursery = engine
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost:8181") as caller:
            yield caller
        engine.cancel_scope.cancel()


async def eventually(condition, seconds=1.0):  # type: ignore[no-untyped-def]
    """Wait for `condition()`, but not for long."""
    until = trio.current_time() + seconds
    while not condition():
        assert trio.current_time() < until
        await trio.sleep(0.005)
