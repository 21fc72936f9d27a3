"""No packet ends the server: an exception anywhere in it would end these tests with it."""

from functools import partial

import trio
from hypercorn.config import Config
from hypercorn.trio import serve
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from tests.http.fakes import ScriptedService, eventually, running
from tests.http.fuzz import Tally, corpus, mutants
from tests.http.malformed import MALFORMED


async def test_no_malformed_request_kills_or_hangs_the_server(caplog):
    assert len(MALFORMED) == 46
    tally = Tally()
    async with running() as server:
        await corpus(server.port, tally)
    assert not tally.hangs
    assert tally.sent == 46
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


async def test_no_mutation_of_one_does_either_and_nothing_is_left_behind(caplog):
    tally = Tally()
    service = ScriptedService()
    async with running(service, body_timeout_s=0.5, header_timeout_s=0.5) as server:
        await trio.sleep(0.05)
        tasks = trio.lowlevel.current_statistics().tasks_living
        await mutants(server.port, 8.0, 2026, tally)
        await eventually(lambda: trio.lowlevel.current_statistics().tasks_living <= tasks, seconds=3)
        assert not service.running
    assert not tally.hangs
    assert tally.sent > 100
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


async def attack_stock_hypercorn():
    config = Config()
    config.bind = "127.0.0.1:0"
    config.errorlog = None

    async def health(request):
        await trio.lowlevel.checkpoint()
        return Response("ok")

    async with trio.open_nursery() as nursery:
        app = Starlette(routes=[Route("/health", health)])
        urls = await nursery.start(partial(serve, app, config))
        await corpus(int(urls[0].rpartition(":")[2]), Tally())
        nursery.cancel_scope.cancel()


async def test_the_corpus_does_kill_stock_hypercorn():
    """The control: these requests are what the server's care is for."""
    died = False
    try:
        await attack_stock_hypercorn()
    except* Exception:
        died = True
    assert died
