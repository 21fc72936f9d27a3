"""The listening sockets and the life of the server. Runs in: trio; owns: the sockets and every connection's task."""

import contextlib
import logging
from functools import partial
from socket import SHUT_WR

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.tcp_server import MAX_RECV
from hypercorn.trio.worker_context import WorkerContext

from edgekv.actors.service import Service
from edgekv.http.app import build_app
from edgekv.http.connection import LINGER_S, Connection
from edgekv.http.drain import Drain
from edgekv.http.errors import ApiError, to_json
from edgekv.http.gate import is_loopback
from edgekv.http.listen import open_listeners
from edgekv.http.settings import HttpSettings

logger = logging.getLogger("edgekv.http")

_TOO_MANY = ApiError(503, "Too many connections.", code="too_many_connections")
FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\nretry-after: 1\r\n"
    b"content-type: application/json\r\n\r\n" + to_json(_TOO_MANY.body())
)


async def serve_http(
    service: Service,
    settings: HttpSettings,
    *,
    stop: trio.Event,
    task_status: trio.TaskStatus[tuple[str, ...]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until `stop` is set and the connections have drained; `started` gets the URLs listened on.

    Once `stop` is set nothing new is accepted, requests on open connections get 503 `draining`, and running ones have
    `grace_s` to finish: streams that would not are ended with `[DONE]` shortly before. Raises `CannotListen`.
    """
    drain = Drain()
    app = ASGIWrapper(build_app(service, settings, drain))  # type: ignore[arg-type]
    config, context = _hypercorn_config(settings), WorkerContext(None)
    listeners = await open_listeners(settings)
    connections: set[Connection] = set()
    drained = trio.Event()

    async def handle(stream: trio.SocketStream) -> None:
        if len(connections) >= settings.max_connections:
            await _turn_away(stream)
            return
        connection = Connection(app, config, context, settings, stream)
        connections.add(connection)
        try:
            await connection.run()
        finally:
            connections.discard(connection)
            if drain.has_begun and not connections:
                drained.set()

    async with trio.open_nursery() as nursery:
        async with trio.open_nursery() as accepting:
            accepting.start_soon(partial(trio.serve_listeners, handle, listeners, handler_nursery=nursery))
            task_status.started(tuple(_url(settings.host, listener) for listener in listeners))
            await stop.wait()
            accepting.cancel_scope.cancel()
        drain.begun.set()
        config.keep_alive_max_requests = 0  # responses from now on say "connection: close"
        await context.terminated.set()
        for connection in connections:
            connection.end_if_idle()
        nursery.cancel_scope.deadline = trio.current_time() + settings.grace_s
        if connections:
            # A stream's last words need a moment to reach the client before everything is cancelled.
            with trio.move_on_after(max(settings.grace_s * 0.5, settings.grace_s - 2.0)):
                await drained.wait()
        drain.ending.set()


def _hypercorn_config(settings: HttpSettings) -> Config:
    config = Config()
    config.accesslog = config.errorlog = None
    config.include_server_header = False
    config.h11_max_incomplete_size = settings.max_header_bytes
    config.keep_alive_max_requests = 100_000
    return config


async def _turn_away(stream: trio.SocketStream) -> None:
    with trio.move_on_after(LINGER_S), contextlib.suppress(trio.BrokenResourceError, OSError):
        await stream.send_all(FULL)
        stream.socket.shutdown(SHUT_WR)
        # Closed with its request unread, the connection would be reset and the client never see the answer.
        while await stream.receive_some(MAX_RECV):
            pass
    stream.socket.close()


def _url(host: str, listener: trio.SocketListener) -> str:
    address, port = listener.socket.getsockname()[:2]
    if is_loopback(host) and ":" not in address:
        address = host
    return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"
