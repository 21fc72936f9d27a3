"""A client that says exactly what it is told to, byte by byte."""

import json
import socket
from contextlib import asynccontextmanager
from dataclasses import dataclass

import h11
import trio


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes
    complete: bool

    def json(self):
        return json.loads(self.body)

    @property
    def events(self):
        return [line.removeprefix("data: ") for line in self.body.decode().split("\n\n") if line]


class Raw:
    """One connection; answers are read with h11's client side."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._h11 = h11.Connection(h11.CLIENT)

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def post(self, path: str, fields: object, *, headers: str = "") -> None:
        body = json.dumps(fields).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{headers}"
        await self.send(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)

    async def get(self, path: str) -> None:
        await self.send(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())

    async def answer(self, *, until: bytes | None = None) -> Answer:
        """The next answer, or as much of it as there is once `until` has been seen."""
        if self._h11.our_state is h11.IDLE:  # what we really sent is of no interest to the parser
            self._h11.send(h11.Request(method="GET", target="/", headers=[("host", "x")]))
            self._h11.send(h11.EndOfMessage())
        answer = Answer(0, {}, b"", False)
        while True:
            event = self._h11.next_event()
            if event is h11.NEED_DATA:
                self._h11.receive_data(await self.stream.receive_some(65536))
            elif isinstance(event, h11.Response):
                answer.status = event.status_code
                answer.headers = {name.decode(): value.decode() for name, value in event.headers}
            elif isinstance(event, h11.Data):
                answer.body += bytes(event.data)
                if until is not None and until in answer.body:
                    return answer
            elif isinstance(event, h11.EndOfMessage):
                answer.complete = True
                if self._h11.our_state is h11.DONE and self._h11.their_state is h11.DONE:
                    self._h11.start_next_cycle()
                return answer
            elif isinstance(event, h11.ConnectionClosed):
                return answer

    async def rest(self, seconds: float = 3.0) -> bytes | None:
        """Everything until the server closes; None if it does not."""
        data = b""
        with trio.move_on_after(seconds):
            while True:
                try:
                    more = await self.stream.receive_some(65536)
                except trio.BrokenResourceError:
                    return data
                if not more:
                    return data
                data += more
        return None

    def reset(self) -> None:
        """Go away without a word (RST)."""
        self.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.stream.socket.close()


@asynccontextmanager
async def dialled(port: int, *, host: str = "127.0.0.1", receive_buffer: int | None = None):
    """A new connection, closed on leaving."""
    sock = trio.socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    await sock.connect((host, port))
    stream = trio.SocketStream(sock)
    try:
        yield Raw(stream)
    finally:
        sock.close()
