"""Who turns an engine's crank: an OS thread, or in tests a trio task. Runs in: trio, engine thread; owns: the core.

Whoever starts a driver gives it commands and hears from it through a `Listener`, always in trio:

    commands ── send ──► [ make_core · command · command · step · step … ] ── Listener ──► ready, reports, fault

A core that raises from `step` or from a command is finished, and so is its driver; what comes next is for the owner
to decide.
"""

import contextlib
import inspect
import queue
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeAlias, TypeVar

import trio

from edgekv.core.sequence import FinishReason, SequenceSpec
from edgekv.core.step import EngineStats, Resize, StepReport
from edgekv.engine.memory_errors import give_back_cached
from edgekv.errors import EdgeKVError

IDLE_STEP_S = 0.002
IDLE_STEP_MOST_S = 0.05
_SUSPENDABLE = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR

FactsT = TypeVar("FactsT")
FactsT_contra = TypeVar("FactsT_contra", contravariant=True)
ItemT = TypeVar("ItemT")


class DeviceLost(EdgeKVError):
    """The device answers every call with an error from now on; only a new process can use it again."""


class Core(Protocol):
    """The synchronous engine; touched by its driver alone."""

    @property
    def busy(self) -> bool:
        """Whether there is a sequence to work on."""

    def submit(self, spec: SequenceSpec) -> None:
        """Take a sequence in. Raises `ValueError` or `EdgeKVError`, unchanged, for one it cannot work on."""

    def abort(self, sequence_id: int, reason: FinishReason = FinishReason.ABORT) -> None:
        """End a sequence and free its blocks; unknown and finished ids are ignored."""

    def resize(self, order: Resize) -> None:
        """Give memory back or take some, now; what came of it is in the next report."""

    def step(self) -> StepReport:
        """Do one step; returns promptly when nothing can run."""

    def stats(self) -> EngineStats:
        """The counters so far."""


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """How far the loading has come."""

    done_bytes: int
    total_bytes: int
    stage: str


Progress: TypeAlias = Callable[[int, int, str], None]
"""Called while a core is made, with (bytes done, bytes in all, stage); it may raise to stop the loading."""

MakeCore: TypeAlias = Callable[[Progress], tuple[Core, FactsT]]
"""Makes a core and says what was found out on the way; blocks as long as it needs."""

Command: TypeAlias = Callable[[Core], None]
Rejected: TypeAlias = Callable[[Exception], None]


class Listener(Protocol[FactsT_contra]):
    """Where a driver's news go, in order. All calls are made in trio."""

    def on_progress(self, progress: LoadProgress) -> None:
        """The loading has come this far; only the latest of several is told."""

    def on_ready(self, facts: FactsT_contra, stats: EngineStats) -> None:
        """The core is made."""

    def on_report(self, report: StepReport) -> None:
        """A step was done."""

    def on_fault(self, error: BaseException) -> None:
        """The core is finished; the last call. Must not raise."""


class Driver(Protocol):
    """A running core."""

    def send(self, command: Command, rejected: Rejected | None = None) -> None:
        """Run `command` on the core before its next step; never waits.

        Should it raise `ValueError` or `EdgeKVError`, `rejected` is told and the core goes on; any other exception,
        or no `rejected`, is a fault.
        """

    async def aclose(self) -> None:
        """Stop before the next step and let go of the core; the listener hears nothing more.

        Cancelled, it leaves the driver in the step in which it is stuck.
        """


class MakeDriver(Protocol):
    """How to start a driver; the nursery outlives it."""

    def __call__(self, make_core: MakeCore[FactsT], listener: Listener[FactsT], nursery: trio.Nursery) -> Driver:
        """Start it."""


class _Stopped(BaseException):
    """Unwinds the driver's thread from wherever it is, past a loader that turns every `Exception` into its own."""


class _News(Generic[FactsT]):
    """Hands a driver's news to its listener in trio; a listener that raises is a fault."""

    def __init__(self, listener: Listener[FactsT]) -> None:
        self._listener = listener
        self._open = True

    def close(self) -> None:
        """Nothing more is told."""
        self._open = False

    def progress(self, progress: LoadProgress) -> None:
        self._tell(self._listener.on_progress, progress)

    def ready(self, found: tuple[FactsT, EngineStats]) -> None:
        self._tell(lambda pair: self._listener.on_ready(*pair), found)

    def report(self, report: StepReport) -> None:
        self._tell(self._listener.on_report, report)

    def rejected(self, tell: Rejected, error: Exception) -> None:
        self._tell(tell, error)

    def fault(self, error: BaseException) -> None:
        if self._open:
            self._open = False
            self._listener.on_fault(error)

    def _tell(self, tell: Callable[[ItemT], None], item: ItemT) -> None:
        if not self._open:
            return
        # In a run_sync_soon callback an exception would end the whole trio run.
        try:
            tell(item)
        except Exception as error:
            self.fault(error)


class ThreadDriver(Generic[FactsT]):
    """A core on an OS thread of its own: it loads, waits and steps there, and never holds up the loop.

    One `run_sync_soon` per step carries the report up. The thread ends with the core.
    """

    def __init__(
        self, make_core: MakeCore[FactsT], listener: Listener[FactsT], nursery: trio.Nursery | None = None
    ) -> None:
        self._make_core = make_core
        self._news = _News(listener)
        self._trio = trio.lowlevel.current_trio_token()
        self._commands: queue.SimpleQueue[tuple[Command, Rejected | None]] = queue.SimpleQueue()
        self._progress = LoadProgress(0, 0, "starting")
        self._stopping = False
        self._gone = trio.Event()
        self._thread = threading.Thread(target=self._main, name="edgekv-engine", daemon=True)
        self._thread.start()

    def send(self, command: Command, rejected: Rejected | None = None) -> None:
        """See `Driver.send`."""
        self._commands.put((command, rejected))

    async def aclose(self) -> None:
        """See `Driver.aclose`; the thread is a daemon, so that the process can end without it."""
        self._stopping = True
        self._commands.put((lambda core: None, None))
        try:
            await self._gone.wait()
        finally:
            self._news.close()
        self._thread.join()

    def _main(self) -> None:
        try:
            self._drive()
        except _Stopped:
            pass
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            _forget_locals(error)
            with contextlib.suppress(_Stopped):
                self._soon(self._news.fault, error)
        # A core in a reference cycle would keep its memory while the next one asks for as much again.
        give_back_cached()
        with contextlib.suppress(trio.RunFinishedError):
            self._trio.run_sync_soon(self._gone.set)

    def _drive(self) -> None:
        core, facts = self._make_core(self._report_progress)
        self._soon(self._news.ready, (facts, core.stats()))
        before: StepReport | None = None
        idle_s = IDLE_STEP_S
        while not self._stopping:
            if not core.busy:
                self._obey(core, *self._commands.get())
            elif not self._commands.empty():
                self._obey(core, *self._commands.get_nowait())
            else:
                report = core.step()
                self._soon(self._news.report, report)
                if before is not None and _is_idle(before, report):
                    # Every sequence waits for something, mostly for memory, and a command will bring it: do not flood
                    # the loop with reports of nothing meanwhile.
                    with contextlib.suppress(queue.Empty):
                        self._obey(core, *self._commands.get(timeout=idle_s))
                    idle_s = min(2 * idle_s, IDLE_STEP_MOST_S)
                else:
                    idle_s = IDLE_STEP_S
                before = report

    def _obey(self, core: Core, command: Command, rejected: Rejected | None) -> None:
        try:
            command(core)
        except (ValueError, EdgeKVError) as error:
            if rejected is None:
                raise
            tell, refusal = rejected, error
            self._soon(lambda _: self._news.rejected(tell, refusal), None)

    def _report_progress(self, done_bytes: int, total_bytes: int, stage: str) -> None:
        if self._stopping:
            raise _Stopped
        self._progress = LoadProgress(done_bytes, total_bytes, stage)
        with contextlib.suppress(trio.RunFinishedError):
            self._trio.run_sync_soon(self._tell_progress, idempotent=True)

    def _tell_progress(self) -> None:
        self._news.progress(self._progress)

    def _soon(self, tell: Callable[[ItemT], None], item: ItemT) -> None:
        try:
            self._trio.run_sync_soon(tell, item)
        except trio.RunFinishedError:
            raise _Stopped from None


class InlineDriver(Generic[FactsT]):
    """The same crank turned by a trio task: with a mock clock, a run is a pure function of its seed."""

    def __init__(
        self,
        make_core: MakeCore[FactsT],
        listener: Listener[FactsT],
        nursery: trio.Nursery,
        step_s: float = 0.01,
    ) -> None:
        self._make_core = make_core
        self._news = _News(listener)
        self._commands: queue.SimpleQueue[tuple[Command, Rejected | None]] = queue.SimpleQueue()
        self._step_s = step_s
        self._stopping = False
        self._wake = trio.Event()
        self._gone = trio.Event()
        nursery.start_soon(self._main)

    def send(self, command: Command, rejected: Rejected | None = None) -> None:
        """See `Driver.send`."""
        self._commands.put((command, rejected))
        self._wake.set()

    async def aclose(self) -> None:
        """See `Driver.aclose`."""
        self._stopping = True
        self._wake.set()
        try:
            await self._gone.wait()
        finally:
            self._news.close()

    async def _main(self) -> None:
        # Shielded like the thread, which no scope can cancel either: only `aclose` ends it.
        with trio.CancelScope(shield=True):
            await trio.lowlevel.checkpoint()
            try:
                core, facts = self._make_core(self._report_progress)
                self._news.ready((facts, core.stats()))
                while not self._stopping:
                    if not self._commands.empty():
                        self._obey(core, *self._commands.get())
                    elif core.busy:
                        await trio.sleep(self._step_s)
                        self._news.report(core.step())
                    else:
                        self._wake = trio.Event()
                        await self._wake.wait()
            except Exception as error:
                self._news.fault(error)
        self._gone.set()

    def _report_progress(self, done_bytes: int, total_bytes: int, stage: str) -> None:
        self._news.progress(LoadProgress(done_bytes, total_bytes, stage))

    def _obey(self, core: Core, command: Command, rejected: Rejected | None) -> None:
        try:
            command(core)
        except (ValueError, EdgeKVError) as error:
            if rejected is None:
                raise
            self._news.rejected(rejected, error)


def _is_idle(before: StepReport, report: StepReport) -> bool:
    """Whether the step of `report`, which followed that of `before`, neither said nor computed anything."""
    if report.started or report.tokens or report.finished:
        return False
    then, now = before.stats, report.stats
    return (then.computed_prompt_tokens, then.generated_tokens) == (now.computed_prompt_tokens, now.generated_tokens)


def _forget_locals(error: BaseException) -> None:
    """Drop the locals that `error`'s tracebacks keep alive: among them is the core, with all of its memory."""
    seen: set[int] = set()
    chain: list[BaseException | None] = [error]
    while chain:
        if (link := chain.pop()) is None or id(link) in seen:
            continue
        seen.add(id(link))
        for frame, _ in traceback.walk_tb(link.__traceback__):
            # Clearing a suspended coroutine would close it, and an error that is raised again has been through some.
            if not frame.f_code.co_flags & _SUSPENDABLE:
                with contextlib.suppress(RuntimeError):  # it is running
                    frame.clear()
        chain += [link.__cause__, link.__context__]
        if isinstance(link, BaseExceptionGroup):
            chain += link.exceptions
