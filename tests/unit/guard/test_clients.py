import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from bench.guard.clients import Answer, Client, Crowd, Question

Answering = Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]


@contextmanager
def serving(answer: Answering) -> Iterator[str]:
    """A server that answers as told."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            answer(self, json.loads(self.rfile.read(int(self.headers["content-length"]))))

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def stream(handler: BaseHTTPRequestHandler, *events: object, done: bool = True) -> None:
    lines = [f"data: {json.dumps(event)}\n\n" for event in events] + (["data: [DONE]\n\n"] if done else [])
    body = "".join(lines).encode()
    handler.send_response(200)
    handler.send_header("content-length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def refuse(handler: BaseHTTPRequestHandler, status: int, code: str, **headers: str) -> None:
    body = json.dumps({"error": {"message": "no", "code": code}}).encode()
    handler.send_response(status)
    for name, value in {"content-length": str(len(body)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def asked(answering: Answering, question: Question) -> Answer:
    with serving(answering) as url, closing(Client(url)) as client:
        return client.ask(question)


def piece(text: str | None, finish_reason: str | None = None) -> dict[str, Any]:
    delta = {"content": text} if text is not None else {}
    return {"choices": [{"delta": delta, "finish_reason": finish_reason}]}


def test_a_question_is_always_the_same_and_every_kind_is_asked() -> None:
    bodies = [Question(number).body() for number in range(32)]
    assert bodies == [Question(number).body() for number in range(32)]
    assert len({json.dumps(body) for body in bodies}) == 32
    assert {body["temperature"] for body in bodies} == {0.0, 0.9}


def test_an_answer_is_the_whole_text() -> None:
    events = [piece("a"), piece(None), piece("b"), piece(None, "length")]
    answer = asked(lambda handler, body: stream(handler, *events), Question(0))
    assert (answer.text, answer.tokens, answer.fault, answer.retry_after_s) == ("ab", 2, None, None)


@pytest.mark.parametrize(
    ("answering", "told"),
    [
        (lambda handler, body: stream(handler, piece("a"), done=False), "ended after 1 tokens without"),
        (lambda handler, body: stream(handler, piece("a"), {"error": {"message": "engine crashed"}}), "engine crashed"),
        (lambda handler, body: stream(handler, piece("a"), piece(None, "error")), "finish_reason error"),
        (lambda handler, body: refuse(handler, 500, "engine_error"), "status 500: no"),
        (lambda handler, body: refuse(handler, 503, "engine_restarting", retry_after="1"), "status 503: no"),
        (lambda handler, body: refuse(handler, 429, "kv_cache_full"), "status 429: no"),  # not told when to come again
        (lambda handler, body: hang_up(handler), "without response"),
    ],
)
def test_everything_but_a_whole_answer_or_a_refusal_is_a_request_lost(answering: Answering, told: str) -> None:
    answer = asked(answering, Question(3))
    assert answer.fault is not None
    assert answer.fault.startswith("question 3: ")
    assert told in answer.fault


def test_who_is_told_to_come_again_comes_again_and_nothing_is_lost() -> None:
    seen: list[int] = []

    def answering(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        seen.append(body["seed"])
        if len(seen) == 1:
            refuse(handler, 429, "kv_cache_full", retry_after="0.01")
        elif len(seen) == 2:
            stream(handler, {"error": {"message": "waited too long", "code": "kv_cache_full"}}, done=False)
        else:
            stream(handler, piece("yes"))

    with serving(answering) as url:
        crowd = Crowd(url, 1)
        crowd.run(1)
    assert seen == [0, 0, 0]
    assert crowd.texts == {0: "yes"}
    assert (crowd.answers.refused, crowd.answers.finished, crowd.answers.lost) == (2, 1, 0)


def test_another_answer_than_undisturbed_is_counted_and_named() -> None:
    crowds: list[Crowd] = []

    def answering(handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        if body["seed"] == 1:
            crowds[0].stop.set()
        stream(handler, piece("same" if body["seed"] == 0 else "other"))

    with serving(answering) as url:
        crowds.append(Crowd(url, 2, {0: "same", 1: "same"}))
        crowds[0].run(1)
    answers = crowds[0].answers
    assert (answers.finished, answers.changed, answers.lost) == (2, 1, 0)
    assert answers.faults == ("question 1: another answer than undisturbed",)
