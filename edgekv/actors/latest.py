"""A value of which only the newest matters. Runs in: trio; owns: that value."""

from collections.abc import Callable
from typing import Generic, TypeVar

import trio

T = TypeVar("T")


class Latest(Generic[T]):
    """One writer sets it and never waits; readers see the newest value, and may miss those between."""

    def __init__(self, value: T) -> None:
        self._value = value
        self._version = 0
        self._changed = trio.Event()

    @property
    def value(self) -> T:
        """The newest value."""
        return self._value

    def set(self, value: T) -> None:
        """Replace the value and wake those who wait for a newer one. Never raises."""
        self._value = value
        self._version += 1
        self._changed.set()
        self._changed = trio.Event()

    def watch(self) -> "Watch[T]":
        """The value now, then each newer one, for `async for`; values that are overtaken are skipped."""
        return Watch(self)

    async def wait_for(self, wanted: Callable[[T], bool]) -> T:
        """The first value seen, from the one now on, that `wanted` accepts."""
        async for value in self.watch():
            if wanted(value):
                return value
        raise AssertionError("a watch has no end")


class Watch(Generic[T]):
    """One reader's place in a `Latest`; it never ends by itself."""

    def __init__(self, latest: Latest[T]) -> None:
        self._latest = latest
        self._seen = -1

    def __aiter__(self) -> "Watch[T]":
        return self

    async def __anext__(self) -> T:
        await trio.lowlevel.checkpoint()
        while self._seen == self._latest._version:
            await self._latest._changed.wait()
        self._seen = self._latest._version
        return self._latest._value
