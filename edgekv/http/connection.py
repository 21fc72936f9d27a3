"""One client's connection: hypercorn's HTTP/1.1 classes with the safety they lack. Runs in: trio; owns: one socket.

What hypercorn 0.18 does by itself, and what is done here instead:

- an exception in one connection ends the whole server: `Connection.run` contains it;
- HTTP/2 (by upgrade or prior knowledge) and WebSocket start on any client's word: `Http1` is HTTP/1.1 and nothing else;
- Content-Length together with Transfer-Encoding is accepted, which smuggles requests past a proxy: refused;
- a client that sends its headers slowly, or never reads its answer, holds its connection for ever: two deadlines;
- the reader waits while a pipelined request is pending, and on a full queue that nobody empties, and then no longer
  sees the client leave: here it always goes back to the socket;
- a connection closed with unread input is reset by the kernel, so that a client never sees the refusal it was sent:
  our side is closed first, and what the client still sends is read away for a moment.
"""

import contextlib
import json
import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable
from socket import SHUT_WR
from typing import Any

import h11
import trio
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.events import Body, EndBody
from hypercorn.protocol.events import Request as RequestEvent
from hypercorn.protocol.h11 import STREAM_ID, H11Protocol
from hypercorn.protocol.http_stream import HTTPStream
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.tcp_server import MAX_RECV, TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper, ConnectionState
from hypercorn.utils import parse_socket_addr

from edgekv.http.settings import HttpSettings

logger = logging.getLogger("edgekv.http")

MAX_SEND = 64 * 1024
LINGER_S = 1.0
LINGER_BYTES = 16 * 1024 * 1024
MAX_PIPELINED_BYTES = 256 * 1024
MAX_UNREAD_MESSAGES = 4


class Inbox:
    """What the connection has for the application: body chunks, then the news that the client left.

    A body chunk waits while too many are unread, so that the client's TCP window closes; a disconnect never waits,
    and once the application is gone nothing does.
    """

    def __init__(self) -> None:
        self._messages: deque[Any] = deque()
        self._changed = trio.Event()
        self._abandoned = False

    async def put(self, message: Any) -> None:
        """Add one message; waits as the class says."""
        self._messages.append(message)
        self._notify()
        if message["type"] == "http.request":
            while len(self._messages) > MAX_UNREAD_MESSAGES and not self._abandoned:
                await self._changed.wait()

    async def take(self) -> Any:
        """The next message, waiting for one."""
        await trio.lowlevel.checkpoint()
        while not self._messages:
            await self._changed.wait()
        message = self._messages.popleft()
        self._notify()
        return message

    def abandon(self) -> None:
        """The application has returned: release whoever waits."""
        self._abandoned = True
        self._messages.clear()
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


class Tasks(TaskGroup):
    """Starts the application's tasks and keeps what they raise from the connection."""

    async def spawn_app(
        self, app: AppWrapper, config: Config, scope: Any, send: Callable[[Any], Awaitable[None]]
    ) -> Callable[[Any], Awaitable[None]]:
        """Run `app` for one request; what is returned delivers messages to it."""
        inbox = Inbox()

        async def run() -> None:
            try:
                await app(scope, inbox.take, send, trio.to_thread.run_sync, trio.from_thread.run)
            except* Exception:
                logger.exception("a request handler failed")
            finally:
                inbox.abandon()
            await send(None)

        self.spawn(run)
        return inbox.put


class Exchange(HTTPStream):
    """One request and its response; whatever is sent after the client has gone is dropped, as ASGI asks."""

    async def app_send(self, message: Any) -> None:
        """Pass one ASGI message on towards the client."""
        if not self.closed:
            await super().app_send(message)


class Http1(H11Protocol):
    """HTTP/1.1 between the socket and one `Exchange` at a time."""

    stream: Exchange | None
    connection: h11.Connection

    def __init__(self, settings: HttpSettings, *args: Any) -> None:
        super().__init__(*args)
        self._settings = settings

    @property
    def has_partial_request(self) -> bool:
        """Whether a request has begun to arrive whose headers are not complete."""
        return self.stream is None and self.connection.their_state is h11.IDLE and self._num_buffered > 0

    @property
    def has_read_all(self) -> bool:
        """Whether nothing of the current request is still to come, as far as we know."""
        done = self.connection.their_state in (h11.DONE, h11.MUST_CLOSE, h11.CLOSED)
        return done and self._num_buffered == 0

    @property
    def _num_buffered(self) -> int:
        return len(self.connection.trailing_data[0])

    async def advance(self) -> None:
        """Act on all that the bytes received so far allow."""
        while True:
            if self.connection.they_are_waiting_for_100_continue:
                await self._send_h11_event(h11.InformationalResponse(status_code=100, headers=[]))
            try:
                event = self.connection.next_event()
                if isinstance(event, h11.Request):
                    self._check(event)
            except h11.RemoteProtocolError as error:
                await self.refuse(error.error_status_hint, str(error))
                return
            if isinstance(event, h11.Request):
                await self.send(Updated(idle=False))
                await self._open_exchange(event)
            elif isinstance(event, h11.Data) and self.stream is not None:
                await self.stream.handle(Body(stream_id=STREAM_ID, data=bytes(event.data)))
            elif isinstance(event, h11.EndOfMessage) and self.stream is not None:
                await self.stream.handle(EndBody(stream_id=STREAM_ID))
            else:
                if event is h11.PAUSED and self._num_buffered > MAX_PIPELINED_BYTES:
                    await self.send(Closed())
                return

    async def refuse(self, status: int, message: str) -> None:
        """Answer what is no acceptable request, if there is still an answer to give, and hang up."""
        if self.connection.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
            error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
            body = json.dumps({"error": error}).encode()
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", b"%d" % len(body)),
                (b"connection", b"close"),
            ]
            await self._send_h11_event(h11.Response(status_code=status, headers=headers))
            await self._send_h11_event(h11.Data(data=body))
            await self._send_h11_event(h11.EndOfMessage())
        await self.send(Closed())

    async def _handle_events(self) -> None:
        await self.advance()

    def _check(self, request: h11.Request) -> None:
        names = [name for name, _ in request.headers]
        upgrades = {value.strip().lower() for name, value in request.headers if name == b"upgrade"}
        if request.http_version not in (b"1.1", b"1.0"):
            raise h11.RemoteProtocolError("Only HTTP/1.1 is spoken here.", error_status_hint=505)
        if upgrades & {b"h2c", b"websocket"}:
            raise h11.RemoteProtocolError("This server does not upgrade connections.", error_status_hint=400)
        if request.method == b"CONNECT" or not request.target.startswith(b"/"):
            raise h11.RemoteProtocolError("The request target must be a path.", error_status_hint=400)
        if b"content-length" in names and b"transfer-encoding" in names:
            raise h11.RemoteProtocolError(
                "Content-Length and Transfer-Encoding exclude each other.", error_status_hint=400
            )
        if len(names) > self._settings.max_headers:
            raise h11.RemoteProtocolError("Too many header fields.", error_status_hint=431)

    async def _open_exchange(self, request: h11.Request) -> None:
        self.stream = Exchange(
            self.app,
            self.config,
            self.context,
            self.task_group,
            self.ssl,
            self.client,
            self.server,
            self.stream_send,
            STREAM_ID,
        )
        await self.stream.handle(
            RequestEvent(
                stream_id=STREAM_ID,
                headers=list(request.headers),
                http_version=request.http_version.decode("ascii"),
                method=request.method.decode("ascii"),
                raw_path=request.target,
                state=self.connection_state,
            )
        )
        self.keep_alive_requests += 1


class Connection(TCPServer):
    """A socket, the task that reads it, and the tasks of the application that answer on it.

    Exactly one deadline applies at a time: until a request's headers are complete, while idle, or while lingering. A
    request in progress has none here: the application times its body, and `stall_s` times every write.
    """

    stream: trio.SocketStream  # type: ignore[assignment]  # never TLS here
    protocol: Http1  # type: ignore[assignment]

    def __init__(
        self,
        app: AppWrapper,
        config: Config,
        context: WorkerContext,
        settings: HttpSettings,
        stream: trio.SocketStream,
    ) -> None:
        super().__init__(app, config, context, ConnectionState({}), stream)  # type: ignore[arg-type]
        self._settings = settings
        self._deadline = trio.current_time() + settings.header_timeout_s
        self._receiving = trio.CancelScope()
        self._woken = False
        self._idle = True
        self._lingering = False

    async def run(self) -> None:
        """Serve the connection to its end. Raises nothing but cancellation."""
        try:
            await self._converse()
        except* OSError:
            pass  # the client's doing: reset, timed out, gone before we asked who it is
        except* h11.ProtocolError as errors:
            logger.debug("a connection ended: %s", errors.exceptions[0])
        except* Exception:
            logger.exception("a connection failed")

    def end_if_idle(self) -> None:
        """The server is stopping: hang up unless a request is in progress."""
        if self._idle:
            self._set_deadline(trio.current_time())

    async def protocol_send(self, event: Event) -> None:
        """Carry out what the protocol asks: send bytes, hang up, or note that a request began or ended."""
        if isinstance(event, RawData):
            await self._send(event.data)
        elif isinstance(event, Closed):
            await self._hang_up()
        elif isinstance(event, Updated):
            self._idle = event.idle
            self._set_deadline(trio.current_time() + self._settings.keep_alive_s if event.idle else math.inf)
            if event.idle:
                self._wake()  # the next request may have arrived already

    async def _converse(self) -> None:
        socket = self.stream.socket
        client = parse_socket_addr(socket.family, socket.getpeername())
        server = parse_socket_addr(socket.family, socket.getsockname())
        try:
            async with Tasks() as tasks:
                self._task_group = tasks
                self.protocol = Http1(
                    self._settings,
                    self.app,
                    self.config,
                    self.context,
                    tasks,
                    self.state,
                    False,
                    client,
                    server,
                    self.protocol_send,
                )
                await self._read_data()
        finally:
            socket.close()

    async def _read_data(self) -> None:
        num_discarded = 0
        while True:
            data = await self._receive()
            if self._lingering:
                num_discarded += len(data or b"")
                if not data or num_discarded > LINGER_BYTES:
                    break
            elif data is None:
                if trio.current_time() < self._deadline:
                    await self.protocol.advance()
                elif self.protocol.has_partial_request:
                    await self.protocol.refuse(408, "The request's headers took too long.")
                else:
                    break
            else:
                begins = self._idle and not self.protocol.has_partial_request
                await self.protocol.handle(RawData(data))
                if data == b"":
                    break
                if begins and self.protocol.has_partial_request:
                    self._set_deadline(trio.current_time() + self._settings.header_timeout_s)
        await self.protocol.handle(Closed())

    async def _receive(self) -> bytes | None:
        """Bytes; b"" when the client will send no more; None when woken or past the deadline."""
        if self._woken:
            self._woken = False
            return None
        with trio.CancelScope(deadline=self._deadline) as self._receiving:
            try:
                return bytes(await self.stream.receive_some(MAX_RECV))
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return b""
        self._woken = False
        return None

    def _set_deadline(self, deadline: float) -> None:
        self._deadline = deadline
        self._receiving.deadline = deadline

    def _wake(self) -> None:
        # The reader may be anywhere: the flag catches it before it next waits, the cancellation while it waits.
        self._woken = True
        self._receiving.cancel()

    async def _send(self, data: bytes) -> None:
        async with self.send_lock:
            if self._lingering:
                return  # the answer to a refused request, or more of one that was cut short
            num_sent = 0
            try:
                while num_sent < len(data):
                    # In pieces, each with the whole time: a client that reads slowly does read.
                    with trio.CancelScope(deadline=trio.current_time() + self._settings.stall_s) as sending:
                        await self.stream.send_all(data[num_sent : num_sent + MAX_SEND])
                    if sending.cancelled_caught:
                        break
                    num_sent += MAX_SEND
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass
            finally:
                # Part of a message has gone out, or none: nothing sensible can follow it on this connection.
                if num_sent < len(data):
                    self.stream.socket.close()
        if num_sent < len(data):
            await self.protocol.handle(Closed())
            self._wake()

    async def _hang_up(self) -> None:
        if not self._lingering:
            self._lingering = True
            # Not `send_eof`, which waits and would collide with a response being sent by another task.
            with contextlib.suppress(OSError):
                self.stream.socket.shutdown(SHUT_WR)
            self._set_deadline(trio.current_time() + (0.0 if self.protocol.has_read_all else LINGER_S))
        await self.protocol.handle(Closed())
