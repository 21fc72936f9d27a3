"""The official client against a real server over loopback."""

import random

import openai
import pytest
import trio

from edgekv.errors import NotServing, QueueFull
from edgekv.http.settings import ApiKey
from tests.http.fakes import REPLY, ScriptedService, eventually, running
from tests.http.raw import dialled


def client_for(server, **options):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=options.pop("api_key", "none"), max_retries=0, **options)


async def ask(server, call, **options):
    """Run `call(client)` in a thread, as a person's program would."""

    def work():
        with client_for(server, **options) as client:
            return call(client)

    with trio.fail_after(10):
        return await trio.to_thread.run_sync(work)


HELLO = [{"role": "user", "content": "hello"}]


async def test_a_chat_completion():
    async with running(ScriptedService(cached_tokens=3)) as server:
        answer = await ask(server, lambda c: c.chat.completions.create(model="gpt-4o", messages=HELLO, temperature=0))
    assert answer.object == "chat.completion"
    assert answer.model == "scripted"
    assert answer.id.startswith("chatcmpl-")
    choice = answer.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content == REPLY
    assert choice.finish_reason == "stop"
    prompt = "<s><|user|>hello<|assistant|>"
    assert answer.usage.prompt_tokens == len("hello") + prompt.count("<")
    assert answer.usage.completion_tokens == len(REPLY.encode()) + 1
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens == 3


async def test_a_streamed_chat_says_the_same_in_order():
    async with running() as server:
        chunks = await ask(
            server,
            lambda c: list(
                c.chat.completions.create(
                    model="scripted",
                    messages=HELLO,
                    temperature=0,
                    stream=True,
                    stream_options={"include_usage": True},
                )
            ),
        )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == REPLY
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-2]] == [None] * (len(chunks) - 2)
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-2].choices[0].delta.content is None
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(REPLY.encode()) + 1
    assert len({chunk.id for chunk in chunks}) == 1


async def test_completions_of_text_and_of_token_ids():
    async with running() as server:
        answer = await ask(server, lambda c: c.completions.create(model="scripted", prompt="ab", temperature=0))
        assert answer.object == "text_completion"
        assert answer.choices[0].text == REPLY[:16]
        assert answer.choices[0].finish_reason == "length"
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 16)
        answer = await ask(
            server,
            lambda c: c.completions.create(
                model="scripted", prompt=[[97, 98], [99]], n=2, max_tokens=4, temperature=0, echo=True
            ),
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert [choice.text for choice in answer.choices] == ["abOnce", "abOnce", "cOnce", "cOnce"]
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 16)


async def test_a_streamed_completion():
    def stream(client):
        return list(
            client.completions.create(
                model="scripted",
                prompt="ab",
                echo=True,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
        )

    async with running() as server:
        chunks = await ask(server, stream)
    assert chunks[0].choices[0].text == "ab"
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == "ab" + REPLY[:16]
    assert chunks[-2].choices[0].finish_reason == "length"
    assert (chunks[-1].choices, chunks[-1].usage.total_tokens) == ([], 19)


async def test_choices_come_together_in_one_stream():
    def stream(client):
        texts, ends = {}, []
        for chunk in client.chat.completions.create(model="scripted", messages=HELLO, n=3, seed=5, stream=True):
            choice = chunk.choices[0]
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            ends += [choice.finish_reason] if choice.finish_reason else []
        return texts, ends

    async with running() as server:
        texts, ends = await ask(server, stream)
    # The scripted model begins at the seed modulo 7.
    assert texts == {0: REPLY[5:], 1: REPLY[6:], 2: REPLY[0:]}
    assert ends == ["stop"] * 3


async def test_a_seed_reproduces_and_no_seed_varies():
    def say(client, **options):
        return client.chat.completions.create(model="scripted", messages=HELLO, **options).choices[0].message.content

    async with running() as server:
        assert await ask(server, lambda c: say(c, seed=3)) == await ask(server, lambda c: say(c, seed=3)) == REPLY[3:]
        assert len({await ask(server, lambda c: say(c)) for _ in range(8)}) > 1


async def test_stop_strings_cut_across_tokens_and_chunks():
    async with running(ScriptedService(tokens_per_tick=1)) as server:
        for stream in (False, True):
            for stop in ("time there", ["nowhere", "\U0001f600 robot"], "Once", "home."):

                def say(client, stop=stop, stream=stream):
                    answer = client.chat.completions.create(
                        model="scripted", messages=HELLO, temperature=0, stop=stop, stream=stream
                    )
                    if not stream:
                        return answer.choices[0].message.content, answer.choices[0].finish_reason
                    chunks = list(answer)
                    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
                    return text, chunks[-1].choices[0].finish_reason

                text, reason = await ask(server, say)
                first = stop if isinstance(stop, str) else stop[1]
                assert text == REPLY[: REPLY.index(first)], (stop, stream)
                assert reason == "stop"
        await eventually(lambda: not server.service.running)
        # "home." ends where the model ends: nothing is left to abort there, the others were.
        assert len(server.service.aborted) >= 6


async def test_logprobs_of_a_chat():
    async with running() as server:
        for stream in (False, True):

            def say(client, stream=stream):
                answer = client.chat.completions.create(
                    model="scripted",
                    messages=HELLO,
                    temperature=0,
                    max_tokens=5,
                    logprobs=True,
                    top_logprobs=2,
                    stream=stream,
                )
                if not stream:
                    return answer.choices[0].logprobs.content
                return [
                    entry
                    for chunk in answer
                    if chunk.choices[0].logprobs is not None
                    for entry in chunk.choices[0].logprobs.content
                ]

            content = await ask(server, say)
            assert [entry.token for entry in content] == list("Once ")
            assert [entry.bytes for entry in content] == [[byte] for byte in b"Once "]
            assert [entry.logprob for entry in content] == [-0.5] * 5
            assert [[top.logprob for top in entry.top_logprobs] for entry in content] == [[-0.5, -1.5]] * 5


async def test_logprobs_of_a_completion():
    async with running() as server:
        answer = await ask(
            server,
            lambda c: c.completions.create(model="scripted", prompt="x", temperature=0, max_tokens=5, logprobs=1),
        )
    logprobs = answer.choices[0].logprobs
    assert logprobs.tokens == list("Once ")
    assert logprobs.token_logprobs == [-0.5] * 5
    assert logprobs.text_offset == [0, 1, 2, 3, 4]
    assert logprobs.top_logprobs[0] == {"O": -0.5}


async def test_a_client_that_breaks_off_a_stream_stops_the_sequence():
    def begin(client):
        stream = client.chat.completions.create(
            model="scripted", messages=HELLO, stream=True, extra_body={"ignore_eos": True}
        )
        for chunk in stream:
            if chunk.choices[0].delta.content:
                stream.close()
                return

    async with running() as server:
        await ask(server, begin)
        await eventually(lambda: not server.service.running, seconds=0.3)
        assert server.service.aborted == [0]


async def test_errors_are_the_clients_own_exceptions():
    def expect(kind, **options):
        def work(client):
            with pytest.raises(kind) as caught:
                client.chat.completions.create(**{"model": "scripted", "messages": HELLO, **options})
            return caught.value

        return work

    async with running(api_keys=(ApiKey("me", "sk-1"),), max_body_bytes=10_000) as server:
        error = await ask(server, expect(openai.AuthenticationError))
        assert error.code == "invalid_api_key"
        error = await ask(server, expect(openai.BadRequestError, temperature=9), api_key="sk-1")
        assert (error.param, error.type) == ("temperature", "invalid_request_error")
        error = await ask(server, expect(openai.NotFoundError, model="gpt-5"), api_key="sk-1")
        assert error.code == "model_not_found"
        error = await ask(server, expect(openai.BadRequestError, max_tokens=10**9), api_key="sk-1")
        assert error.code == "context_length_exceeded"
        long = [{"role": "user", "content": "x" * 20_000}]
        error = await ask(server, expect(openai.APIStatusError, messages=long), api_key="sk-1")
        assert error.status_code == 413
        server.service.refuses = QueueFull(900, 100, 2.0)
        error = await ask(server, expect(openai.RateLimitError), api_key="sk-1")
        assert (error.code, error.response.headers["retry-after"]) == ("kv_cache_full", "2")
        server.service.refuses = NotServing("device_lost", "The card is gone.", 3.0)
        error = await ask(server, expect(openai.InternalServerError), api_key="sk-1")
        assert (error.status_code, error.code) == (503, "device_lost")


async def test_a_stream_that_the_engine_loses_says_so_and_then_done():
    def stream(client):
        text = ""
        try:
            for chunk in client.chat.completions.create(model="scripted", messages=HELLO, stream=True, temperature=0):
                text += chunk.choices[0].delta.content or ""
        except openai.APIError as error:
            return text, error
        return text, None

    async with running(ScriptedService(fails_after=5)) as server:
        text, error = await ask(server, stream)
        assert REPLY.startswith(text)
        assert error is not None
        assert error.code == "device_lost"
        async with dialled(server.port) as raw:
            await raw.post("/v1/chat/completions", {"messages": HELLO, "stream": True, "n": 2})
            events = (await raw.answer()).events
            assert events[-1] == "[DONE]"
            assert '"device_lost"' in events[-2]

        def whole(client):
            with pytest.raises(openai.InternalServerError) as caught:
                client.chat.completions.create(model="scripted", messages=HELLO)
            return caught.value

        assert (await ask(server, whole)).code == "device_lost"


async def test_sixty_four_clients_that_come_and_go_leave_nothing_behind():
    service = ScriptedService()
    chance = random.Random(64)
    async with running(service) as server:
        await trio.sleep(0.02)
        tasks = trio.lowlevel.current_statistics().tasks_living

        async def client():
            for _ in range(4):
                async with dialled(server.port) as raw:
                    await raw.post(
                        "/v1/chat/completions", {"messages": HELLO, "stream": True, "n": chance.randint(1, 3)}
                    )
                    with trio.move_on_after(chance.random() * 0.2):
                        await raw.answer()

        async with trio.open_nursery() as nursery:
            for _ in range(64):
                nursery.start_soon(client)
        await eventually(lambda: trio.lowlevel.current_statistics().tasks_living <= tasks, seconds=20)
        assert not service.running
        assert len(service.drafts) > 100
