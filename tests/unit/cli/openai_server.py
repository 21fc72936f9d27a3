"""A small OpenAI-compatible server on loopback, for commands that are its clients."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Script:
    """What the server does: `words` are streamed `gap_s` apart; prompts seen before are answered without `cold_s`."""

    words: list[str] = field(default_factory=lambda: ["Good", " day", "."])
    gap_s: float = 0.0
    cold_s: float = 0.0
    error: tuple[int, str] | None = None
    break_off: bool = False
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)


@contextmanager
def openai_server(script: Script) -> Iterator[str]:
    """Serve `script` until the end of the block; yields the endpoint."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            self._answer({"data": [{"id": "a-model"}]} if self.path == "/v1/models" else {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/tokenize":
                self._answer({"count": 2 * len(body["prompt"].split())})
                return
            script.asked.append(body)
            script.keys.append(self.headers.get("Authorization"))
            if script.error is not None:
                self._answer({"error": {"message": script.error[1]}}, script.error[0])
                return
            self._stream(body)

        def _answer(self, document: dict[str, Any], status: int = 200) -> None:
            data = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _stream(self, body: dict[str, Any]) -> None:
            self.send_response(200)
            self.end_headers()
            prefix = body["messages"][0]["content"]
            cached = 100 if prefix in script.seen else 0
            if not cached:
                time.sleep(script.cold_s)
            script.seen.add(prefix)
            events: list[dict[str, Any]] = [{"choices": [{"delta": {"content": word}}]} for word in script.words]
            usage = {"prompt_tokens": 120, "completion_tokens": 6, "prompt_tokens_details": {"cached_tokens": cached}}
            try:
                for event in [*events, {"choices": [], "usage": usage}]:
                    self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
                    time.sleep(script.gap_s)
                    if script.break_off:
                        self.wfile.write(b'data: {"error": {"message": "the engine restarts"}}\n\n')
                        break
                self.wfile.write(b"data: [DONE]\n\n")
            except OSError:
                pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        finally:
            server.shutdown()
            thread.join()
