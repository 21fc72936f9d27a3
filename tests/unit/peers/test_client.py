import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from bench.peers.client import Client

PREFILL_S, TOKEN_S = 0.05, 0.01


class Completions(BaseHTTPRequestHandler):
    """Takes PREFILL_S for a prompt that it has not seen and TOKEN_S for each token; `cut` tokens are missing."""

    cut = 0
    asked: list[dict[str, Any]]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer({"data": [{"id": "a-model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body["prompt"] not in [before["prompt"] for before in self.asked]:
            time.sleep(PREFILL_S)
        self.asked.append(body)
        time.sleep(TOKEN_S * body["max_tokens"])
        tokens = body["max_tokens"] - self.cut
        self._answer({"usage": {"prompt_tokens": len(body["prompt"]), "completion_tokens": tokens}})

    def _answer(self, document: dict[str, Any]) -> None:
        data = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def handler() -> type[Completions]:
    class Handler(Completions):
        asked: list[dict[str, Any]] = []  # noqa: RUF012 - of this test's server alone

    return Handler


@pytest.fixture
def url(handler: type[Completions]) -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        server.shutdown()
        thread.join()


def test_the_prompt_and_the_tokens_after_it_are_told_apart(url: str, handler: type[Completions]) -> None:
    client = Client(url, vocab_size=1000, seed=3)
    found = client.measure(20, 10, repeat=2)
    client.close()
    assert found.prefill_tok_s == pytest.approx(20 / (PREFILL_S + TOKEN_S), rel=0.4)
    assert list(found.decode_tok_s) == pytest.approx([1 / TOKEN_S] * 2, rel=0.3)
    assert len({tuple(body["prompt"]) for body in handler.asked}) == 1
    assert all(body["ignore_eos"] and body["temperature"] == 0 for body in handler.asked)


def test_prompts_are_the_seeds(url: str, handler: type[Completions]) -> None:
    for seed in (3, 3, 4):
        client = Client(url, vocab_size=1000, seed=seed)
        client.measure(5, 0, repeat=0)
        client.close()
    first, again, other = (body["prompt"] for body in handler.asked)
    assert first == again != other


def test_a_server_that_gives_less_than_was_asked_for_is_no_measurement(url: str, handler: type[Completions]) -> None:
    handler.cut = 1
    client = Client(url, vocab_size=1000, seed=3)
    with pytest.raises(ValueError, match=r"asked for 5 \+ 1 tokens"):
        client.measure(5, 0, repeat=0)
    client.close()
