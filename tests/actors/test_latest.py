"""Readers of a `Latest` always come to see its newest value."""

import trio
import trio.testing

from edgekv.actors.latest import Latest


async def test_a_watch_starts_with_the_value_now_and_skips_what_is_overtaken() -> None:
    latest = Latest(0)
    latest.set(1)
    watch = latest.watch()
    assert await anext(watch) == 1
    latest.set(2)
    latest.set(3)
    assert await anext(watch) == 3


async def test_a_watch_waits_for_a_newer_value() -> None:
    latest, seen = Latest("a"), list[str]()

    async def read() -> None:
        async for value in latest.watch():
            seen.append(value)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        assert seen == ["a"]
        latest.set("a")  # an equal value is news too
        await trio.testing.wait_all_tasks_blocked()
        latest.set("b")
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert seen == ["a", "a", "b"]
    assert latest.value == "b"


async def test_wait_for_returns_the_first_value_wanted() -> None:
    latest = Latest(1)
    async with trio.open_nursery() as nursery:

        async def count() -> None:
            for number in range(2, 10):
                await trio.testing.wait_all_tasks_blocked()
                latest.set(number)

        nursery.start_soon(count)
        assert await latest.wait_for(lambda number: number % 4 == 0) == 4
    assert await latest.wait_for(lambda number: number > 0) == 9
