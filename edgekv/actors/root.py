"""The whole server: what starts in which order, what a signal does, how it ends. Runs in: trio; owns: the nurseries.

It starts with HTTP (which answers 503 at first), then the engine loads. It ends with the engine, which drains; then
HTTP sends what is left to send.
"""

import logging
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import trio

from edgekv.actors.admission import Admission, AdmissionLimits
from edgekv.actors.engine import EngineActor, EngineStatus, Phase
from edgekv.actors.engine_service import EngineService
from edgekv.actors.fault import is_device_error
from edgekv.actors.kernel import GaveUp, Restarts, keep_running, supervise
from edgekv.actors.latest import Latest
from edgekv.actors.messages import Drain
from edgekv.actors.service import ModelCard, Service
from edgekv.actors.vram import VramWatch
from edgekv.core.pressure import PressurePolicy
from edgekv.engine.driver import MakeCore, MakeDriver, ThreadDriver
from edgekv.errors import EdgeKVError
from edgekv.smi.reader import Source

log = logging.getLogger(__name__)

EXIT_OK = 0
EXIT_CONFIG = 1
EXIT_LOST = 70  # EX_SOFTWARE of sysexits.h: start me again
SWITCH_INTERVAL_S = 0.001
HTTP_GRACE_S = 5.0


@dataclass(frozen=True, slots=True)
class Exit:
    """How the server ended, and why unless it was asked to.

    0 clean, 1 it could not start, 70 it was lost and should be started again, 128 + n cut short by signal n.
    """

    code: int
    reason: str = ""


class ServeHTTP(Protocol):
    """The HTTP server.

    It sets `listening` once it listens, and raises if it cannot. Once `shutdown` is set it takes no new connections,
    sends what its open responses still have to send, and returns; `http_grace_s` later it is cancelled. It does not
    return before.
    """

    async def __call__(self, service: Service, *, listening: trio.Event, shutdown: trio.Event) -> None:
        """Serve."""


class HTTPEnded(Exception):
    """The HTTP server returned although nobody had asked it to."""


async def run_server(
    *,
    make_core: MakeCore[ModelCard],
    serve_http: ServeHTTP,
    max_queue: int,
    max_wait_s: Mapping[int, float] | None = None,
    grace_s: float,
    http_grace_s: float = HTTP_GRACE_S,
    make_driver: MakeDriver = ThreadDriver,
    restarts: Restarts = Restarts(),
    watch: Callable[[Latest[EngineStatus]], Awaitable[None]] | None = None,
    sources: Sequence[Source] = (),
    policy: PressurePolicy | None = None,
    device: str = "",
) -> Exit:
    """Serve until SIGINT or SIGTERM has drained the server or the engine is lost; a second signal ends it at once.

    `make_core` runs on the engine's thread, again after each crash. `watch` is given the engine's status for as long as
    the server runs (a progress bar); it may fail without harm. Nothing that was started outlives the call, except a
    thread that is stuck on a device.

    `max_wait_s`: how long a request may wait to start, by priority; None for ever. With a `policy` the memory of
    `device` is watched, by the best of `sources` that can be read.
    """
    limits = AdmissionLimits(max_queue, max_wait_s or {})
    admission = Admission(limits)
    # A burst that fits the queue must fit the mailbox too.
    engine = EngineActor(make_core, make_driver, capacity=max(256, 2 * max_queue), on_step=admission.observe)
    guard = None
    if policy is not None:
        guard = VramWatch(engine, sources, policy, device, is_busy=lambda: admission.num_open > 0)
    service = EngineService(engine, admission, guard)
    return await _Root(engine, service, guard, serve_http, grace_s, http_grace_s, restarts, watch).run()


class _Root:
    def __init__(
        self,
        engine: EngineActor,
        service: EngineService,
        guard: VramWatch | None,
        serve_http: ServeHTTP,
        grace_s: float,
        http_grace_s: float,
        restarts: Restarts,
        watch: Callable[[Latest[EngineStatus]], Awaitable[None]] | None,
    ) -> None:
        self._engine = engine
        self._service = service
        self._guard = guard
        self._serve_http = serve_http
        self._grace_s = grace_s
        self._http_grace_s = http_grace_s
        self._restarts = restarts
        self._watch = watch
        self._listening = trio.Event()
        self._shutdown = trio.Event()
        self._http_ended = trio.Event()
        self._engine_scope = trio.CancelScope()
        self._cut_short_by: int | None = None

    async def run(self) -> Exit:
        await trio.lowlevel.checkpoint()
        lost: Exception | None = None
        with _switch_interval(SWITCH_INTERVAL_S):
            try:
                # The handlers are in place before anything is started, and until everything has ended.
                with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(self._heed, signals, nursery.cancel_scope)
                        nursery.start_soon(self._run_watch)
                        nursery.start_soon(keep_running, "the waiting line's clock", self._service.expire)
                        if self._guard is not None:
                            nursery.start_soon(keep_running, "the memory guard", self._guard.run)
                        lost = await self._serve(nursery)
                        nursery.cancel_scope.cancel()
            except* Exception as group:
                lost = _first(group)
                _note("the server ended", lost, group)
        return self._exit(lost)

    async def _serve(self, nursery: trio.Nursery) -> Exception | None:
        nursery.start_soon(self._run_http)
        await self._listening.wait()
        lost: Exception | None = None
        with self._engine_scope:
            try:
                await supervise(self._engine, self._restarts)
            except GaveUp as error:
                lost = error.error
                _note(str(error), lost, lost)
        self._shutdown.set()
        with trio.move_on_after(self._http_grace_s):
            await self._http_ended.wait()
        return lost

    async def _run_watch(self) -> None:
        await trio.lowlevel.checkpoint()
        if self._watch is not None:
            try:
                await self._watch(self._engine.status)
            except Exception:
                log.exception("nobody watches the engine's status any more")

    async def _run_http(self) -> None:
        try:
            await self._serve_http(self._service, listening=self._listening, shutdown=self._shutdown)
            if not self._shutdown.is_set():
                raise HTTPEnded("the HTTP server ended by itself")
        finally:
            self._http_ended.set()

    async def _heed(self, signals: AsyncIterator[int], everything: trio.CancelScope) -> None:
        drains = False
        async for number in signals:
            if drains:
                log.warning("%s again: ending at once", signal.Signals(number).name)
                self._cut_short_by = number
                everything.cancel()
                return
            drains = True
            log.info("%s: draining for at most %.0f s", signal.Signals(number).name, self._grace_s)
            if self._engine.status.value.phase is Phase.SERVING:
                self._engine.insist(Drain(self._grace_s))
            else:
                self._engine_scope.cancel()

    def _exit(self, lost: Exception | None) -> Exit:
        status = self._engine.status.value
        if self._engine.is_stuck:
            return Exit(EXIT_LOST, "the engine's thread did not come back from a step")
        if lost is not None:
            # What a person can put right, before anything was ever served, is no reason to start again.
            personal = isinstance(lost, EdgeKVError | OSError) and not is_device_error(lost)
            code = EXIT_CONFIG if personal and status.card is None else EXIT_LOST
            return Exit(code, str(lost) or type(lost).__name__)
        if self._cut_short_by is not None:
            return Exit(128 + self._cut_short_by, "cut short by a second signal")
        return Exit(EXIT_OK)


@contextmanager
def _switch_interval(seconds: float) -> Iterator[None]:
    """Let the loop have the interpreter soon while the engine's thread computes in Python."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(seconds)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def _note(what: str, lost: Exception, trace: Exception) -> None:
    # An error meant for a person is said once, by whoever is given our `Exit`.
    if not isinstance(lost, EdgeKVError) or is_device_error(lost):
        log.error("%s", what, exc_info=trace)


def _first(group: BaseExceptionGroup[Exception]) -> Exception:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, Exception)
    return error
