"""`edgekv chat` against a scripted server."""

import io
import signal
import subprocess
import sys

import httpx2
import pytest
from typer.testing import CliRunner

from edgekv.cli.app import app
from edgekv.cli.chat import ChatFailed, Conversation, _first_model
from tests.unit.cli.openai_server import Script, openai_server

run = CliRunner().invoke


def test_a_conversation_carries_its_history_until_it_is_reset() -> None:
    script = Script()
    with openai_server(script) as url:
        lines = "Hello\nAgain\n\n/reset\n/what\nNew\n/quit\nnever\n"
        result = run(app, ["chat", "--url", url, "--system", "Be kind.", "--max-tokens", "9"], input=lines)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("Good day.") == 3
    assert "no such command" in result.stdout
    roles = [[message["role"] for message in body["messages"]] for body in script.asked]
    assert roles == [["system", "user"], ["system", "user", "assistant", "user"], ["system", "user"]]
    assert script.asked[1]["messages"][2]["content"] == "Good day."
    assert all(body["max_tokens"] == 9 and "temperature" not in body for body in script.asked)


def test_an_error_of_the_server_is_told_and_the_question_taken_back() -> None:
    script = Script(error=(400, "This model's maximum context length is 8 tokens."))
    with openai_server(script) as url:
        result = run(app, ["chat", "--url", url], input="Hello\nHello\n")
    assert result.exit_code == 0
    assert "maximum context length is 8 tokens" in result.stderr
    assert [len(body["messages"]) for body in script.asked] == [1, 1]


def test_ctrl_c_stops_the_answer_and_keeps_what_has_come() -> None:
    class Impatient(io.StringIO):
        def write(self, text: str) -> int:
            written = super().write(text)
            if text == "Good":
                raise KeyboardInterrupt
            return written

    with openai_server(Script()) as url, httpx2.Client(base_url=url + "/") as client:
        talk = Conversation(client, "a-model", None, {})
        talk.ask("Hello", Impatient())
        assert talk.messages == [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good"}]
        talk.ask("Go on", io.StringIO())
        assert talk.messages[-1]["content"] == "Good day."


def test_a_stream_that_breaks_off_is_an_error() -> None:
    with openai_server(Script(break_off=True)) as url, httpx2.Client(base_url=url + "/") as client:
        talk = Conversation(client, "a-model", None, {})
        with pytest.raises(ChatFailed, match="the engine restarts"):
            talk.ask("Hello", io.StringIO())
        assert talk.messages == []


def test_a_server_that_is_not_there_is_one_line() -> None:
    result = run(app, ["chat", "--url", "http://127.0.0.1:9/v1"])
    assert "start one with: edgekv serve" in str(result.exception)


@pytest.mark.parametrize("body", ["<html>", "[]", "{}", '{"data": []}', '{"data": [5]}'])
def test_what_is_no_openai_endpoint_is_told_in_one_line(body: str) -> None:
    transport = httpx2.MockTransport(lambda request: httpx2.Response(200, text=body))
    client = httpx2.Client(base_url="http://box/v1/", transport=transport)
    with client, pytest.raises(ChatFailed, match="is it an OpenAI endpoint"):
        _first_model(client)


def test_an_event_that_is_not_json_is_told_in_one_line() -> None:
    transport = httpx2.MockTransport(lambda request: httpx2.Response(200, text="data: oops\n\n"))
    with httpx2.Client(base_url="http://box/v1/", transport=transport) as client:
        talk = Conversation(client, "m", None, {})
        with pytest.raises(ChatFailed, match="not JSON: 'oops'"):
            talk.ask("Hello", io.StringIO())


def test_a_server_that_wants_a_key_is_told_how_to_get_one() -> None:
    refusal = {"error": {"message": "You didn't provide an API key."}}
    transport = httpx2.MockTransport(lambda request: httpx2.Response(401, json=refusal))
    client = httpx2.Client(base_url="http://box/v1/", transport=transport)
    with client, pytest.raises(ChatFailed, match="Here: edgekv chat --api-key KEY"):
        _first_model(client)


def test_a_key_in_any_letters_is_sent_and_an_error_in_brackets_is_shown() -> None:
    script = Script(error=(400, "no [/INST] here"))
    with openai_server(script) as url:
        result = run(app, ["chat", "--url", url, "--api-key", "ein Schlüssel"], input="Hello\n/quit\n")
    assert result.exit_code == 0, result.output
    assert script.keys == ["Bearer ein Schlüssel".encode().decode("latin-1")]
    assert "error: no [/INST] here" in result.stderr


def test_a_closed_terminal_leaves_no_server_behind() -> None:
    command = [sys.executable, "-m", "edgekv", "chat", "demo"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as chat:
        assert chat.stdout is not None
        url = chat.stdout.readline().split(" at ")[1].strip()
        chat.send_signal(signal.SIGHUP)
        assert chat.wait(timeout=25) == 128 + signal.SIGHUP
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(url + "/models", trust_env=False)
