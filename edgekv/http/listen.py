"""The sockets we listen on, made here so that they have the options we need. Runs in: trio; owns: nothing."""

import errno
import math
import socket
from typing import Any

import trio

from edgekv.errors import EdgeKVError
from edgekv.http.settings import HttpSettings

SEND_BUFFER_BYTES = 256 * 1024


class CannotListen(EdgeKVError):
    """The address cannot be bound."""

    def __init__(self, host: str, port: int, error: OSError) -> None:
        if error.errno == errno.EADDRINUSE:
            reason = "another program listens there; stop it or choose another port (server.port, 0 takes any free one)"
        elif error.errno == errno.EACCES:
            reason = "ports below 1024 need privileges; choose another port (server.port)"
        else:
            reason = (error.strerror or str(error)).lower()
        super().__init__(f"Cannot listen on {host} port {port}: {reason}.")
        self.host, self.port = host, port


async def open_listeners(settings: HttpSettings) -> list[trio.SocketListener]:
    """A listener for each address of the host that this machine has. Raises `CannotListen` and leaves none open."""
    listeners: list[trio.SocketListener] = []
    absent: OSError | None = None
    try:
        addresses = await trio.socket.getaddrinfo(
            settings.host or None, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        for family, _, _, _, address in dict.fromkeys(addresses):
            try:
                listening = _bound(family, address, settings)
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                absent = error  # "localhost" means ::1 too, on machines without IPv6 as well
            else:
                listeners.append(trio.SocketListener(trio.socket.from_stdlib_socket(listening)))
        if absent is not None and not listeners:
            raise absent
    except OSError as error:
        for listener in listeners:
            listener.socket.close()
        raise CannotListen(settings.host, settings.port, error) from None
    return listeners


def _bound(family: int, address: Any, settings: HttpSettings) -> socket.socket:
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        # Accepted sockets inherit all of these on Linux.
        listening.setblocking(False)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # Left alone the kernel lets this grow to megabytes: tokens that a reader who stopped will never see.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if settings.host == "::" else 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            # A reader that stopped reading keeps our last bytes unacknowledged: the kernel gives up on it after
            # stall_s, also when no write of ours is waiting that could time out.
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, math.ceil(settings.stall_s * 1000))
        listening.bind(address)
        listening.listen(settings.backlog)
    except OSError:
        listening.close()
        raise
    return listening
