"""Connections at the level of bytes: what keeps them, what ends them, and that nothing else is disturbed."""

import json
import socket

import pytest
import trio

from edgekv.http.connection import Http1
from tests.http.fakes import REPLY, ScriptedService, eventually, running
from tests.http.raw import dialled

HELLO = [{"role": "user", "content": "hello"}]
CHAT = "/v1/chat/completions"
ENDLESS = {"messages": HELLO, "ignore_eos": True, "max_tokens": 100_000, "temperature": 0}


async def is_alive(server):
    async with dialled(server.port) as other:
        await other.get("/health")
        with trio.fail_after(2):
            return (await other.answer()).status == 200


async def test_a_finished_stream_leaves_the_connection_open_for_the_next_request():
    async with running(keep_alive_s=0.3) as server, dialled(server.port) as raw:
        for _ in range(3):
            await raw.post(CHAT, {"messages": HELLO, "stream": True, "temperature": 0})
            answer = await raw.answer()
            assert answer.complete
            assert answer.headers["content-type"].startswith("text/event-stream")
            assert answer.events[-1] == "[DONE]"
            deltas = [json.loads(event)["choices"][0]["delta"] for event in answer.events[:-1]]
            assert "".join(delta.get("content", "") for delta in deltas) == REPLY
        began = trio.current_time()
        assert await raw.rest() == b""
        assert 0.2 < trio.current_time() - began < 1


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("leave", ["close", "reset", "half-close"])
async def test_a_client_that_leaves_stops_its_sequences(stream, leave):
    service = ScriptedService()
    async with running(service) as server, dialled(server.port) as raw:
        await raw.post(CHAT, {**ENDLESS, "stream": stream, "n": 3})
        await eventually(lambda: len(service.running) == 3)
        if stream:
            await raw.answer(until=b"Once")
        if leave == "close":
            raw.stream.socket.close()
        elif leave == "reset":
            raw.reset()
        else:
            await raw.stream.send_eof()
        await eventually(lambda: not service.running, seconds=0.3)
        assert sorted(service.aborted) == [0, 1, 2]
        assert await is_alive(server)


async def test_a_client_that_leaves_after_pipelining_is_noticed_too():
    service = ScriptedService()
    async with running(service) as server, dialled(server.port) as raw:
        await raw.post(CHAT, {**ENDLESS, "stream": False})
        await eventually(lambda: service.running)
        await raw.get("/health")
        await trio.sleep(0.02)
        raw.stream.socket.close()
        await eventually(lambda: not service.running, seconds=0.3)


async def test_pipelined_requests_are_answered_in_turn():
    async with running() as server, dialled(server.port) as raw:
        await raw.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 50)
        for _ in range(50):
            with trio.fail_after(2):
                assert (await raw.answer()).status == 200


async def test_endless_pipelining_is_cut_off():
    service = ScriptedService()
    async with running(service) as server, dialled(server.port) as raw:
        await raw.post(CHAT, {**ENDLESS, "stream": False})
        await eventually(lambda: service.running)
        with pytest.raises(trio.BrokenResourceError):
            await raw.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1_000_000)
        await eventually(lambda: not service.running)
        assert await is_alive(server)


@pytest.mark.parametrize("by", ["the kernel", "our own deadline"])
async def test_a_stalled_reader_is_cut_after_stall_s_and_holds_nobody_back(by, monkeypatch):
    if by == "our own deadline":
        monkeypatch.delattr(socket, "TCP_USER_TIMEOUT")
    service = ScriptedService(tokens_per_tick=20)
    async with running(service, stall_s=0.6) as server, dialled(server.port, receive_buffer=4096) as stalled:
        await stalled.post(CHAT, {**ENDLESS, "stream": True, "logprobs": True, "top_logprobs": 20})
        await eventually(lambda: service.running)
        began = trio.current_time()
        async with dialled(server.port) as reader:
            await reader.post(CHAT, {"messages": HELLO, "stream": True, "temperature": 0})
            with trio.fail_after(2):
                assert (await reader.answer()).events[-1] == "[DONE]"
        await eventually(lambda: not service.running, seconds=6)
        assert trio.current_time() - began > 0.5
        assert service.aborted == [0]
        assert await is_alive(server)


async def test_headers_that_drip_are_given_up_on():
    async with running(header_timeout_s=0.4, keep_alive_s=0.6) as server:
        async with dialled(server.port) as silent:
            assert await silent.rest(1.5) == b""
        async with dialled(server.port) as raw:
            await raw.get("/health")
            await raw.answer()
            with trio.fail_after(2):
                await raw.send(b"GET /hea")
                await trio.sleep(0.2)
                await raw.send(b"lth HTTP/1.1\r\nHost: lo")
                assert b" 408 " in (await raw.rest() or b"")


async def test_a_body_that_drips_is_given_up_on():
    async with running(body_timeout_s=0.3) as server, dialled(server.port) as raw:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        await raw.send(head + b"Content-Length: 100\r\n\r\n{")
        with trio.fail_after(2):
            answer = await raw.answer()
        assert answer.status == 408
        assert await raw.rest() == b""


@pytest.mark.parametrize("framing", ["declared", "chunked", "expect"])
async def test_a_large_body_gets_to_see_its_413(framing):
    async with running(max_body_bytes=100_000) as server, dialled(server.port) as raw:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        size = 3_000_000
        if framing == "chunked":
            await raw.send(head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % size)
        elif framing == "expect":
            await raw.send(head + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % size)
        else:
            await raw.send(head + b"Content-Length: %d\r\n\r\n" % size)
        async with trio.open_nursery() as nursery:

            async def upload():
                await raw.send(b"x" * size)

            nursery.start_soon(upload)
            with trio.fail_after(3):
                assert (await raw.answer()).status == 413
        assert await raw.rest() == b""
        assert await is_alive(server)


async def test_a_refusal_is_seen_by_a_client_that_still_sends():
    async with running() as server, dialled(server.port) as raw:
        await raw.send(
            b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2000000\r\n\r\n" + b"x" * 1_000_000
        )
        with trio.fail_after(3):
            assert (await raw.answer()).status == 404
        await raw.send(b"x" * 1_000_000)


REFUSED = {
    "length and chunks": (b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n"
                          b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /health HTTP/1.1\r\n"
                          b"Host: localhost\r\n\r\n", 400),
    "two lengths": (b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n"
                    b"Content-Length: 5\r\n\r\n", 400),
    "h2c": (b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
            b"HTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n", 400),
    "prior knowledge": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "websocket": (b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
                  b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n", 400),
    "connect": (b"CONNECT evil:443 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "absolute target": (b"GET http://evil/health HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    "no host": (b"GET /health HTTP/1.1\r\n\r\n", 400),
    "two hosts": (b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n", 400),
    "many headers": (b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"A: b\r\n" * 150 + b"\r\n", 431),
    "long headers": (b"GET /health HTTP/1.1\r\nHost: localhost\r\nA: " + b"b" * 100_000 + b"\r\n\r\n", 431),
    "endless first line": (b"G" * 100_000, 431),
    "garbage": (b"\0" * 1000, 400),
    "tls": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x55" * 200 + b"\r\n\r\n", 400),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
async def test_what_is_not_plain_http_1_1_is_refused_once_and_hung_up_on(case):
    data, status = REFUSED[case]
    async with running() as server, dialled(server.port) as raw:
        await raw.send(data)
        answer = await raw.rest()
        assert answer is not None
        assert answer.startswith(b"HTTP/1.1 %d " % status), answer
        assert answer.count(b"\r\n\r\n") == 1
        assert b'"error"' in answer
        assert await is_alive(server)


async def test_an_unknown_upgrade_is_ignored_as_http_says():
    async with running() as server, dialled(server.port) as raw:
        await raw.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: gopher\r\n\r\n")
        with trio.fail_after(2):
            assert (await raw.answer()).status == 200


async def test_connections_past_the_cap_are_told_so():
    async with running(max_connections=2) as server:
        async with dialled(server.port) as first, dialled(server.port) as second, dialled(server.port) as third:
            await first.get("/health")
            assert (await first.answer()).status == 200
            assert b" 503 " in (await third.rest() or b"")
            await second.get("/health")
            assert (await second.answer()).status == 200
        await trio.sleep(0.05)
        assert await is_alive(server)


async def test_who_is_one_too_many_is_told_so_even_with_a_request_on_its_way():
    async with running(max_connections=1) as server, dialled(server.port) as first:
        await first.get("/health")
        assert (await first.answer()).status == 200
        for _ in range(20):
            async with dialled(server.port) as second:
                await second.post(CHAT, {"messages": [{"role": "user", "content": "x" * 100_000}]})
                await trio.sleep(0.01)
                assert b"too_many_connections" in (await second.rest() or b"")


async def test_a_handler_that_fails_answers_500_and_is_logged(caplog):
    service = ScriptedService(refuses=RuntimeError("/secret/path"))
    async with running(service) as server, dialled(server.port) as raw:
        await raw.post(CHAT, {"messages": HELLO})
        answer = await raw.answer()
        assert answer.status == 500
        assert b"secret" not in answer.body
        service.refuses = None
        assert await is_alive(server)
    assert "a request handler failed" in caplog.text


async def test_clients_faults_leave_no_trace_in_the_log(caplog):
    async with running() as server:
        for data, _ in REFUSED.values():
            async with dialled(server.port) as raw:
                await raw.send(data)
                raw.reset()
        assert await is_alive(server)
    assert "Traceback" not in caplog.text
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


@pytest.mark.parametrize("stream", [True, False])
async def test_stopping_lets_a_running_request_finish(stream):
    service = ScriptedService(tick_s=0.01)
    async with running(service, grace_s=3.0) as server, dialled(server.port) as raw, dialled(server.port) as idle:
        await idle.get("/health")
        await idle.answer()
        await raw.post(CHAT, {"messages": HELLO, "stream": stream, "temperature": 0})
        await eventually(lambda: service.running)
        server.stop.set()
        assert await idle.rest(0.5) == b""
        with pytest.raises(OSError):
            await trio.open_tcp_stream("127.0.0.1", server.port)
        answer = await raw.answer()
        assert answer.complete
        text = answer.body.decode()
        assert "[DONE]" in text if stream else REPLY.split("\n")[0] in text
        await eventually(server.stopped.is_set, seconds=0.5)


async def test_stopping_ends_a_stream_that_would_not_finish_with_done_within_the_grace():
    service = ScriptedService()
    async with running(service, grace_s=0.8) as server, dialled(server.port) as raw, dialled(server.port) as stalled:
        await stalled.post(CHAT, {**ENDLESS, "stream": True})
        await raw.post(CHAT, {**ENDLESS, "stream": True})
        await raw.answer(until=b"Once")
        server.stop.set()
        began = trio.current_time()
        answer = await raw.answer()
        assert answer.complete
        assert answer.events[-1] == "[DONE]"
        assert json.loads(answer.events[-2])["error"]["code"] == "draining"
        await eventually(server.stopped.is_set, seconds=2)
        assert trio.current_time() - began < 1.2
        assert not service.running


async def test_a_request_on_an_open_connection_is_refused_while_stopping():
    service = ScriptedService()
    async with running(service, grace_s=1.0) as server, dialled(server.port) as raw:
        await raw.send(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        await trio.sleep(0.05)
        async with dialled(server.port) as busy:
            await busy.post(CHAT, {**ENDLESS, "stream": True})
            await eventually(lambda: service.running)
            server.stop.set()
            await trio.sleep(0.05)
            answer = await raw.rest()
            assert answer is not None
            assert b" 200 " not in answer


async def test_a_slow_reader_that_does_read_gets_the_whole_of_a_long_answer():
    async with running(stall_s=0.3) as server, dialled(server.port, receive_buffer=65536) as raw:
        await raw.post("/tokenize", {"prompt": "x" * 400_000})
        began = trio.current_time()
        received = b""
        while not received.endswith(b"}"):
            await trio.sleep(0.02)
            received += await raw.stream.receive_some(40_000)
        assert trio.current_time() - began > 0.7
        body = received.partition(b"\r\n\r\n")[2]
        assert json.loads(body)["count"] == 400_001


async def test_a_fault_in_a_connection_ends_that_connection_alone(monkeypatch, caplog):
    async def fail(protocol):
        await trio.lowlevel.checkpoint()
        raise ZeroDivisionError("planted")

    async with running() as server, dialled(server.port) as other:
        await other.get("/health")
        assert (await other.answer()).status == 200
        await trio.sleep(0.05)  # its reader waits again
        with monkeypatch.context() as planted:
            planted.setattr(Http1, "advance", fail)
            async with dialled(server.port) as raw:
                await raw.get("/health")
                assert await raw.rest() == b""
        assert "a connection failed" in caplog.text
        await other.get("/health")
        assert (await other.answer()).status == 200
        assert await is_alive(server)


@pytest.mark.parametrize("leave", ["close", "reset"])
async def test_leaving_in_the_middle_of_a_body_is_no_fault(leave, caplog):
    async with running() as server:
        async with dialled(server.port) as raw:
            head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            await raw.send(head + b"Content-Length: 100\r\n\r\n{")
            await trio.sleep(0.02)
            if leave == "reset":
                raw.reset()
        assert await is_alive(server)
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
