"""Server-sent events that neither leak nor hang. Runs in: trio; owns: one response."""

from collections.abc import Awaitable, Callable
from typing import TypeAlias

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from edgekv.http.errors import to_json
from edgekv.http.presence import Client, ClientGone, while_present

DONE = b"data: [DONE]\n\n"

Emit: TypeAlias = Callable[[object], Awaitable[None]]


class EventStream(Response):
    """A response whose events `produce` emits, each a JSON object, and which ends with `[DONE]`.

    `produce` is cancelled as soon as the client leaves, and `release` is called once whatever happens, even if the
    response never starts. `emit` may be called from several tasks; it returns when the socket has taken the event.
    """

    media_type = "text/event-stream"

    def __init__(self, client: Client, produce: Callable[[Emit], Awaitable[None]], release: Callable[[], None]) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._client, self._produce, self._release = client, produce, release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""

        async def send_chunk(data: bytes) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": True})

        async def emit(event: object) -> None:
            await send_chunk(b"data: " + to_json(event) + b"\n\n")

        async def work() -> None:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await self._produce(emit)
            await send_chunk(DONE)

        try:
            await while_present(self._client, work)
        except ClientGone:
            return
        finally:
            self._release()
        # The server takes the connection back inside this send, which must not be cancelled: it goes out only now
        # that the watcher, whose end cancels everything beside it, is gone.
        await send({"type": "http.response.body", "body": b"", "more_body": False})
