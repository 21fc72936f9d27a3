"""Noticing that a client has left while work is done for it. Runs in: trio; owns: nothing."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio
from starlette.types import Receive

T = TypeVar("T")


class ClientGone(Exception):
    """The client closed its connection; nobody is left to answer."""


class Client:
    """The far end of a request whose body has been read. That it left is told once by the server, and kept here."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._has_left = False

    async def left(self) -> None:
        """Return as soon as the client has closed its connection."""
        while not self._has_left:
            self._has_left = (await self._receive())["type"] == "http.disconnect"


async def while_present(client: Client, work: Callable[[], Awaitable[T]]) -> T:
    """Run `work`; cancel it and raise `ClientGone` as soon as the client leaves.

    What `work` returns or raises comes out as it is, even when the client leaves in the same moment.
    """
    results: list[T] = []
    failures: list[Exception] = []
    async with trio.open_nursery() as nursery:

        async def watch() -> None:
            await client.left()
            nursery.cancel_scope.cancel()

        nursery.start_soon(watch)
        try:
            results.append(await work())
        except Exception as error:
            failures.append(error)
        nursery.cancel_scope.cancel()
    if failures:
        raise failures[0]
    if not results:
        raise ClientGone
    return results[0]
