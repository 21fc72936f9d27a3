"""Many clients, few blocks, rude clients, and the end of the server: nothing is lost and nothing stays behind."""

import json
import random
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx2
import openai
from openai.types.chat import ChatCompletionMessageParam

from edgekv.core.kv_format import kv_bytes_per_token
from edgekv.demo import target_path
from edgekv.model.hf_config import read_spec
from tests.e2e.real_server import RealServer, real_server

BLOCK_BYTES = 16 * kv_bytes_per_token(read_spec(target_path()), dtype_bytes=4)
SUBJECTS = ("Ada", "a hen", "rain", "Tom", "mint", "a bee", "frost", "kale")
LONG_PROMPTS = [f"Tell me a long story about {subject} in the garden." for subject in SUBJECTS]


def stream_chat(server: RealServer, text: str, leave_after: int | None, max_tokens: int = 48) -> int:
    """Chunks read before the end, or before leaving without a word."""
    messages = [{"role": "user", "content": text}]
    body = {"messages": messages, "stream": True, "max_tokens": max_tokens, "ignore_eos": True}
    seen = 0
    with httpx2.stream("POST", server.url + "/v1/chat/completions", json=body, timeout=120) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            seen += line.startswith("data: {")
            if leave_after is not None and seen > leave_after:
                return seen
            if line == "data: [DONE]":
                return seen
    raise AssertionError("the stream ended without [DONE]")


def test_sixty_four_clients_that_leave_when_they_like_leave_nothing_behind() -> None:
    dice = random.Random(3)
    with real_server("--set", "server.max_queue=200") as server:
        stream_chat(server, "Hello", None)
        threads = server.num_threads
        leaves = [dice.choice([None, dice.randrange(40)]) for _ in range(64)]
        texts = [f"{dice.choice(LONG_PROMPTS)} {dice.random()}" for _ in leaves]
        with ThreadPoolExecutor(64) as clients:
            list(clients.map(lambda job: stream_chat(server, *job), zip(texts, leaves, strict=True)))
        server.wait_until_quiet()
        assert server.metric("edgekv_kv_blocks_active") == 0
        blocks = [server.metric(f"edgekv_kv_blocks{kind}") for kind in ("", "_free", "_cached")]
        assert blocks[0] == blocks[1] + blocks[2]
        assert server.num_threads <= threads + 1, "trio keeps an idle worker thread or two, not one a client"


def test_ten_blocks_serve_eight_long_requests_as_if_they_were_alone() -> None:
    def answers(server: RealServer) -> list[str]:
        def one(text: str) -> str:
            answer = server.chat(text, max_tokens=100, temperature=0, ignore_eos=True).json()
            assert answer["usage"]["completion_tokens"] == 100
            return str(answer["choices"][0]["message"]["content"])

        with ThreadPoolExecutor(8) as clients:
            return list(clients.map(one, LONG_PROMPTS))

    with real_server() as server:
        unconstrained = answers(server)
    with real_server("--set", f"kv.budget={10 * BLOCK_BYTES}B") as server:
        assert "GPU KV cache size: 160 tokens" in server.output
        assert answers(server) == unconstrained
        assert server.metric("vllm:num_preemptions_total") > 0
        refusal = server.chat("Hello", max_tokens=200)
        assert refusal.status_code == 400
        assert refusal.json()["error"]["code"] == "context_length_exceeded"
        assert "This model's maximum context length is 160 tokens. However, you requested 2" in refusal.text
        assert "kv.budget" in refusal.text, "it says which setting would help"


def test_past_max_queue_there_is_429_with_a_time_to_come_back() -> None:
    with real_server("--set", f"kv.budget={20 * BLOCK_BYTES}B", "--set", "server.max_queue=2") as server:
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 250, "ignore_eos": True}
        with ThreadPoolExecutor(12) as clients:
            answers = list(clients.map(lambda _: server.post("/v1/chat/completions", body), range(12)))
        codes = sorted(answer.status_code for answer in answers)
        assert set(codes) == {200, 429}
        for answer in answers:
            if answer.status_code == 429:
                assert answer.json()["error"]["code"] == "kv_cache_full"
                assert 1 <= int(answer.headers["retry-after"]) <= 600
            else:
                assert answer.json()["usage"]["completion_tokens"] == 250


def test_a_full_queue_is_the_official_clients_rate_limit_error() -> None:
    with (
        real_server("--set", f"kv.budget={20 * BLOCK_BYTES}B", "--set", "server.max_queue=1") as server,
        openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client,
    ):

        def ask(_: int) -> str | None:
            hi: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hi"}]
            try:
                client.chat.completions.create(
                    model="demo", messages=hi, max_tokens=250, extra_body={"ignore_eos": True}
                )
            except openai.RateLimitError as error:
                return error.code
            return "answered"

        with ThreadPoolExecutor(10) as clients:
            assert set(clients.map(ask, range(10))) == {"answered", "kv_cache_full"}


def read_slowly(server: RealServer, seconds: float) -> Callable[[], bytes]:
    """Start a long stream, read nothing for `seconds`, then all there is."""
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps(
        {"prompt": "In spring", "stream": True, "max_tokens": 4000, "ignore_eos": True, "logprobs": 5, "n": 4}
    ).encode()
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    client.connect((host, int(port)))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    client.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)

    def finish() -> bytes:
        time.sleep(seconds)
        client.close()
        return b""

    return finish


def test_a_reader_that_stops_reading_holds_nobody_back_and_is_cut_off() -> None:
    with real_server("--set", "server.stall=1s") as server:
        finish = read_slowly(server, 0)
        assert stream_chat(server, "Hello", None, max_tokens=20) > 5
        deadline = time.monotonic() + 60
        while server.metric("vllm:num_requests_running"):
            assert time.monotonic() < deadline, "the stalled reader's sequences still run"
            time.sleep(0.2)
        assert server.metric("vllm:generation_tokens_total") < 4 * 4000, "it was cut off before its end"
        assert server.metric("edgekv_kv_blocks_active") == 0
        finish()


def test_sigterm_in_mid_stream_ends_streams_cleanly_within_the_grace() -> None:
    server = RealServer("--set", "server.grace=2s")
    try:
        body = {"prompt": "In spring", "stream": True, "max_tokens": 4000, "ignore_eos": True}
        lines: list[str] = []
        begun = threading.Event()

        def read() -> None:
            with httpx2.stream("POST", server.url + "/v1/completions", json=body, timeout=60) as response:
                for line in response.iter_lines():
                    lines.append(line)
                    begun.set()

        reader = threading.Thread(target=read)
        reader.start()
        assert begun.wait(30)
        asked_at = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - asked_at < 2 + 6, "the grace, and the same again for HTTP's last words"
        reader.join(10)
        assert not reader.is_alive()
        assert [line for line in lines if line][-1] == "data: [DONE]"
    finally:
        server.kill()
