"""`edgekv chat`: talk to a served model in the terminal. Runs in: the main thread; owns: the conversation."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, TextIO

import typer
from rich.markup import escape

from edgekv.cli.console import bearer, stderr, stdout
from edgekv.cli.wrap import WordWrap
from edgekv.errors import EdgeKVError

if TYPE_CHECKING:
    import httpx2

DEFAULT_URL = "http://127.0.0.1:8181/v1"
READY = "edgekv is ready: "
HELP = "/reset forgets the conversation, /quit ends it (so does Ctrl-D); Ctrl-C stops an answer."


class ChatFailed(EdgeKVError):
    """The server did not answer; the conversation goes on."""


def chat(
    model: str | None = typer.Argument(
        None, help="A model to serve and talk to, a folder or a .gguf file; else the running server."
    ),
    url: str | None = typer.Option(None, help=f"The server's OpenAI endpoint; by default {DEFAULT_URL}."),
    api_key: str | None = typer.Option(None, envvar="OPENAI_API_KEY", help="Sent as a bearer token."),
    name: str | None = typer.Option(None, "--name", help="Which of the server's models; by default its first."),
    system: str | None = typer.Option(None, help="A system prompt."),
    temperature: float | None = typer.Option(None, min=0.0, help="0 always takes the likeliest token."),
    max_tokens: int | None = typer.Option(None, min=1, help="The longest answer."),
) -> None:
    """Talk to the running server; without one, start one for as long as the conversation lasts."""
    import httpx2

    options = {"temperature": temperature, "max_tokens": max_tokens}
    with contextlib.ExitStack() as stack:
        endpoint = url or DEFAULT_URL
        if model is not None or (url is None and not _answers(endpoint)):
            endpoint = stack.enter_context(own_server(model))
        client = stack.enter_context(
            httpx2.Client(base_url=endpoint.rstrip("/") + "/", headers=bearer(api_key), timeout=600, trust_env=False)
        )
        served = name or _first_model(client)
        talk = Conversation(client, served, system, {key: value for key, value in options.items() if value is not None})
        stdout().print(f"[bold]{escape(served)}[/] at {escape(endpoint)}")
        stdout().print(HELP, style="dim")
        _converse(talk)


class Conversation:
    """The messages so far. Invariant: they end with an answer, so that the next thing to add is a question."""

    def __init__(
        self, client: "httpx2.Client", model: str, system: str | None, options: dict[str, float | int]
    ) -> None:
        self._client, self._model, self._options = client, model, options
        self._start = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, str]] = list(self._start)

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.messages = list(self._start)

    def ask(self, question: str, to: TextIO) -> None:
        """Stream the answer to `to`. Ctrl-C ends it and keeps what has come; a failure takes the question back."""
        import httpx2

        asked = [*self.messages, {"role": "user", "content": question}]
        parts: list[str] = []
        out = WordWrap(to, shutil.get_terminal_size().columns) if to.isatty() else to
        try:
            with contextlib.suppress(KeyboardInterrupt), contextlib.closing(self._stream(asked)) as stream:
                for text in stream:
                    parts.append(text)
                    out.write(text)
                    to.flush()
        except httpx2.HTTPError as error:
            raise ChatFailed(f"the server is gone: {error}") from None
        finally:
            to.write("\n")
            to.flush()
        if parts:
            self.messages = [*asked, {"role": "assistant", "content": "".join(parts)}]

    def _stream(self, messages: list[dict[str, str]]) -> Generator[str, None, None]:
        body = {"model": self._model, "messages": messages, "stream": True, **self._options}
        with self._client.stream("POST", "chat/completions", json=body) as response:
            if response.status_code != 200:
                response.read()
                raise ChatFailed(_reason(response))
            for line in response.iter_lines():
                data = line.removeprefix("data:").strip()
                if not line.startswith("data:") or data == "[DONE]":
                    continue
                try:
                    event = json.loads(data)
                except ValueError:
                    raise ChatFailed(f"the server sent an event that is not JSON: {data[:100]!r}") from None
                if event.get("error"):
                    raise ChatFailed(str(event["error"].get("message", event["error"])))
                for choice in event.get("choices") or []:
                    if text := (choice.get("delta") or {}).get("content"):
                        yield text


@contextlib.contextmanager
def own_server(model: str | None) -> Iterator[str]:
    """A server of our own on a free port, stopped at the end; its endpoint. Raises ChatFailed if it does not start."""
    command = [sys.executable, "-m", "edgekv", "serve", "--port", "0", "--set", "logging.level=warning"]
    command += [] if model is None else ["--model", model]
    # A closed terminal ends us, and must not leave the server behind.
    before = {number: signal.signal(number, _leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    # Its own session: the terminal's Ctrl-C is meant for the answer, not for the server.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True, env=dict(os.environ))
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(READY):
                yield line.removeprefix(READY).split()[0]
                break
        else:
            raise ChatFailed(f"the server did not start (exit code {process.wait()}); see above")
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(number: int, frame: object) -> None:
    sys.exit(128 + number)


def _converse(talk: Conversation) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() its history and editing
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            stdout().print()
            return
        except KeyboardInterrupt:
            stdout().print("\n(/quit or Ctrl-D ends the conversation)")
            continue
        match question:
            case "":
                continue
            case "/quit" | "/exit" | "/bye":
                return
            case "/reset" | "/clear":
                talk.reset()
                stdout().print("(forgotten)")
            case "/help" | "/?":
                stdout().print(HELP)
            case _ if question.startswith("/"):
                stdout().print(f"no such command; {HELP}")
            case _:
                try:
                    talk.ask(question, sys.stdout)
                except ChatFailed as error:
                    stderr().print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True)


def _answers(endpoint: str) -> bool:
    import httpx2

    try:
        httpx2.get(endpoint.removesuffix("/v1") + "/health", timeout=2, trust_env=False)
    except httpx2.HTTPError:
        return False
    return True


def _first_model(client: "httpx2.Client") -> str:
    import httpx2

    try:
        response = client.get("models")
    except httpx2.HTTPError as error:
        raise ChatFailed(f"no server at {client.base_url}: {error}; start one with: edgekv serve") from None
    if response.status_code == 401:
        raise ChatFailed(f"{_reason(response)} Here: edgekv chat --api-key KEY, or OPENAI_API_KEY=KEY")
    if response.status_code != 200:
        raise ChatFailed(_reason(response))
    try:
        return str(response.json()["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        raise ChatFailed(f"{client.base_url} names no model: is it an OpenAI endpoint? Give one with --url") from None


def _reason(response: "httpx2.Response") -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {response.status_code}"
