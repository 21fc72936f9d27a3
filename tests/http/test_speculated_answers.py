"""With speculation a step says several tokens of a sequence: answers are to the letter those of one token a step."""

import json
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx2
import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families

from edgekv.actors.service import ModelCard
from edgekv.core.sequence import FinishReason
from edgekv.core.step import EngineStats, Finished, Sampled, Started, StepReport, TokenOut
from edgekv.engine.driver import Progress
from edgekv.http.app import build_app
from edgekv.http.settings import HttpSettings
from tests.actors.fakes import FakeCore, Rig, Work
from tests.http.fakes import EOS, REPLY, card, eventually

STEP_S = 0.01  # InlineDriver's
HELLO = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"

Run = Callable[[Work], int]
"""How many tokens a sequence gets in its next step after the first."""


class Speculating(FakeCore):
    """Says REPLY, a token for each byte, in runs, cut as the engine cuts them: nothing follows what ends a sequence."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run
        self.longest = self.computed = 0

    def step(self) -> StepReport:
        started: list[Started] = []
        tokens: list[TokenOut] = []
        ended, self._ended = self._ended, []
        for number, work in list(self.work.items()):
            if not work.produced:
                started.append(Started(number, cached_tokens=0))
                self.computed += len(work.spec.prompt)
            said = self._say(work, self.run(work) if work.produced else 1)
            self.longest = max(self.longest, len(said))
            tokens += said
            if said[-1].is_stop or work.produced == work.spec.sampling.max_tokens:
                del self.work[number]
                ended.append(Finished(number, FinishReason.STOP if said[-1].is_stop else FinishReason.LENGTH))
        self.steps += 1
        self.generated += len(tokens)
        return StepReport(self.stats(), tuple(started), tuple(tokens), tuple(ended))

    def _say(self, work: Work, most: int) -> list[TokenOut]:
        sampling, said = work.spec.sampling, list[TokenOut]()
        # With a temperature each choice begins elsewhere in the reply.
        script = [*REPLY.encode()[sampling.seed % 5 if sampling.temperature else 0 :], EOS]
        while len(said) < most and work.produced < sampling.max_tokens and not (said and said[-1].is_stop):
            token = script[work.produced % len(script)]
            top = tuple(((token + rank) % 256, -0.5 - rank) for rank in range(sampling.logprobs or 0))
            work.produced += 1
            is_stop = token in sampling.stop_token_ids and work.produced > sampling.min_tokens
            said.append(
                TokenOut(work.spec.id, Sampled(token, None if sampling.logprobs is None else -0.5, top), is_stop)
            )
        return said

    def stats(self) -> EngineStats:
        return replace(super().stats(), computed_prompt_tokens=self.computed)


def always(run: int) -> Run:
    return lambda work: run


def drawn(seed: int) -> Run:
    """Another number for each sequence and step, as when proposals are accepted now and then."""
    return lambda work: random.Random(f"{seed} {work.spec.id} {work.produced}").randint(1, 9)


@asynccontextmanager
async def serving(core: FakeCore) -> AsyncIterator[tuple[httpx2.AsyncClient, Rig]]:
    """The real application over the real actors and this core."""

    def make_core(progress: Progress) -> tuple[FakeCore, ModelCard]:
        return core, card()

    rig = Rig(make_core)
    async with rig.running():
        transport = httpx2.ASGITransport(build_app(rig.service, HttpSettings()), client=("127.0.0.1", 50_000))
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost:8181") as http:
            yield http, rig


async def ask(http: httpx2.AsyncClient, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The answer in one piece, without what differs from call to call."""
    response = await http.post(path, json=body)
    assert response.status_code == 200, response.text
    answer = response.json()
    return {"choices": answer["choices"], "usage": answer["usage"]}


async def chunks_of(http: httpx2.AsyncClient, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a stream."""
    asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
    events = (await http.post(path, json=asked)).text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def text_of(entry: dict[str, Any]) -> str:
    return entry["text"] if "text" in entry else entry["delta"].get("content", "")


def logprob_tokens(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of a chunk's or an answer's `logprobs`, of either kind of request, an object a token."""
    logprobs = entry["logprobs"] or {"content": []}
    if "content" in logprobs:
        return list(logprobs["content"])
    return [dict(zip(logprobs, values, strict=True)) for values in zip(*logprobs.values(), strict=True)]


BODIES = {
    "a chat": (CHAT, HELLO),
    "to a length within a step": (CHAT, {**HELLO, "max_tokens": 21}),
    "a stop string within a step": (CHAT, {**HELLO, "stop": ["naïve"], "logprobs": True}),
    "a stop string that ends within a character's token": (CHAT, {**HELLO, "stop": "\N{GRINNING FACE}"}),
    "half a stop string at the end": (CHAT, {**HELLO, "stop": " time there was NOT", "max_tokens": 27}),
    "stop strings after a minimum": (CHAT, {**HELLO, "stop": [" "], "min_tokens": 20, "logprobs": True}),
    "a stop token within a step": (CHAT, {**HELLO, "stop_token_ids": [ord("b")], "top_logprobs": 2, "logprobs": True}),
    "past the end of the text": (CHAT, {**HELLO, "ignore_eos": True, "max_tokens": 150, "logprobs": True}),
    "half a character at the end": (CHAT, {**HELLO, "max_tokens": REPLY.encode().index("ï".encode()) + 1}),
    "several choices": (CHAT, {**HELLO, "n": 4, "seed": 5, "stop": "robot", "logprobs": True, "temperature": 1}),
    "completions": (TEXT, {"prompt": ["ab", "c"], "n": 2, "echo": True, "max_tokens": 44, "seed": 2}),
    "completions with logprobs": (TEXT, {"prompt": "ab", "max_tokens": 60, "logprobs": 2, "temperature": 0}),
}


@pytest.mark.parametrize(("path", "body"), [pytest.param(*asked, id=name) for name, asked in BODIES.items()])
async def test_answers_do_not_tell_how_many_tokens_a_step_said(
    path: str, body: dict[str, Any], autojump_clock: trio.testing.MockClock
) -> None:
    async with serving(Speculating(always(1))) as (http, _):
        wanted = await ask(http, path, body)
    for run in (*map(always, range(2, 10)), drawn(1), drawn(2)):
        core = Speculating(run)
        async with serving(core) as (http, rig):
            assert await ask(http, path, body) == wanted
            chunks = await chunks_of(http, path, body)
            assert rig.admission.num_open == 0
        assert core.longest > 1, "several tokens in one report"
        *events, last = chunks
        assert last["usage"] == wanted["usage"]
        assert last["choices"] == []
        for choice in wanted["choices"]:
            check_stream([event["choices"][0] for event in events], choice)


def check_stream(events: list[dict[str, Any]], choice: dict[str, Any]) -> None:
    """The chunks of one choice, put together, are its answer in one piece."""
    *parts, closing = [entry for entry in events if entry["index"] == choice["index"]]
    whole = choice["text"] if "text" in choice else choice["message"]["content"]
    assert "".join(map(text_of, parts)) == whole
    assert [part["finish_reason"] for part in parts] == [None] * len(parts)
    assert (closing["finish_reason"], text_of(closing)) == (choice["finish_reason"], "")
    assert [token for part in parts for token in logprob_tokens(part)] == logprob_tokens(choice)
    if not choice["logprobs"] or "content" not in choice["logprobs"]:
        return
    # At no time is text shown whose tokens are not. Bytes are tokens here, and "</s>" is no text.
    text, spelt = b"", b""
    for part in parts:
        text += text_of(part).encode()
        spelt += b"".join(bytes(token["bytes"]) for token in logprob_tokens(part) if token["token"] != "</s>")
        assert spelt.startswith(text)


async def test_a_chunk_holds_whole_characters_of_several_tokens(autojump_clock: trio.testing.MockClock) -> None:
    """In whatever place a step cuts the four bytes of an emoji and the two of an ï."""
    for run in range(2, 10):
        async with serving(Speculating(always(run))) as (http, _):
            parts = [event["choices"][0] for event in (await chunks_of(http, CHAT, HELLO))[1:-2]]
        texts = [text_of(part) for part in parts]
        assert "".join(texts) == REPLY
        assert "\ufffd" not in "".join(texts)
        assert len(texts) <= 2 + len(REPLY.encode()) / run
        assert max(map(len, texts)) == run


@pytest.mark.parametrize("stream", [False, True])
async def test_what_was_said_after_a_stop_string_is_neither_sent_nor_counted_and_the_sequence_is_aborted(
    stream: bool, autojump_clock: trio.testing.MockClock
) -> None:
    core = Speculating(always(9))
    body = {**HELLO, "stop": "upon", "ignore_eos": True, "max_tokens": 10_000, "logprobs": True}
    async with serving(core) as (http, rig):
        if stream:
            chunks = await chunks_of(http, CHAT, body)
            text = "".join(text_of(chunk["choices"][0]) for chunk in chunks[:-1])
            finish, usage = chunks[-2]["choices"][0]["finish_reason"], chunks[-1]["usage"]
        else:
            answer = await ask(http, CHAT, body)
            text, finish = answer["choices"][0]["message"]["content"], answer["choices"][0]["finish_reason"]
            usage = answer["usage"]
        assert (text, finish) == ("Once ", "stop")
        assert usage["completion_tokens"] == len("Once upon")
        assert rig.admission.num_open == 0
        await eventually(lambda: core.aborted)
    assert core.aborted == [1]
    assert core.generated < 40, "it goes on after its end"
    assert core.generated > len("Once upon"), "the stop string was found within a report"


async def test_a_choice_that_has_stopped_is_aborted_while_the_others_go_on(
    autojump_clock: trio.testing.MockClock,
) -> None:
    core = Speculating(always(7))
    # The second choice begins with "nce", and never comes to say what the first begins with.
    body = {"prompt": "ab", "n": 2, "seed": 0, "temperature": 1, "stop": "Once", "ignore_eos": True, "max_tokens": 300}
    async with serving(core) as (http, _):
        answer = await ask(http, TEXT, body)
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["stop", "length"]
    assert answer["usage"]["completion_tokens"] == len("Once") + 300
    assert core.aborted == [1]
    assert core.generated < 300 + 30


async def test_tokens_of_one_step_share_the_time_since_the_last(autojump_clock: trio.testing.MockClock) -> None:
    async with serving(Speculating(always(5))) as (http, _):
        await http.post(TEXT, json={"prompt": "abc", "max_tokens": 21})
        text = (await http.get("/metrics")).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def value(name: str, **labels: str) -> float:
        found = [s.value for s in samples if s.name == name and labels.items() <= s.labels.items()]
        assert len(found) == 1
        return found[0]

    between = "vllm:inter_token_latency_seconds"
    assert value(f"{between}_count") == 20
    assert value(f"{between}_sum") == pytest.approx(4 * STEP_S)
    assert value(f"{between}_bucket", le="0.01") == 20, "none took as long as a step"
    assert value("vllm:time_to_first_token_seconds_count") == 1
    assert value("vllm:generation_tokens_total") == 21


async def test_the_measured_pace_is_of_tokens_not_of_steps(autojump_clock: trio.testing.MockClock) -> None:
    """Else whoever waits would be told to wait for several times as long as it takes."""
    costs = {}
    for run in (1, 8):
        async with serving(Speculating(always(run))) as (http, rig), trio.open_nursery() as nursery:
            body = {"prompt": "abc", "max_tokens": 4000, "ignore_eos": True}
            for _ in range(2):
                nursery.start_soon(lambda http=http, body=body: http.post(TEXT, json=body))
            await trio.sleep(2.0)
            cost = rig.admission._pace.cost(trio.current_time())
            assert cost is not None
            costs[run] = cost.generated_s
            nursery.cancel_scope.cancel()
    assert costs[1] == pytest.approx(STEP_S / 2, rel=0.1)
    assert costs[8] == pytest.approx(costs[1] / 8, rel=0.1)
