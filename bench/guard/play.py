"""One trace, played from beginning to end on a server of its own. Runs in: the player; owns: the run's processes.

load → own := what is leased → the trace begins, clients ask → the trace ends, clients finish → figures
"""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.guard.clients import QUESTIONS
from bench.guard.device import Keeper, new_card
from bench.guard.measure import Answers, Step, measure
from bench.guard.own import LEAST_BYTES, OwnMeter
from bench.guard.plot import Shown, draw
from bench.guard.processes import Clients, NotServing, Server
from bench.guard.report import Result
from bench.guard.server import read_steps
from bench.guard.trace import Point, Trace
from bench.guard.truth import Truth
from edgekv.core.spill import Headroom

REFERENCE_S = 300.0
LOOK_S = 0.1
SETTLE_LOOKS = 100
REOPEN_S = 10.0  # how long a source that was gone may take to be tried again (actors/feed)

Progress = Callable[[float, str], None]


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the server may hold in all: the most it may grow to, and what is no pool; with its headroom."""

    headroom: Headroom
    ceiling_bytes: int
    floor_bytes: int
    leased_bytes: int

    @classmethod
    def read(cls, memory: dict[str, Any], trace: Trace) -> "Bounds":
        """From what the server says when it has loaded."""
        ledger, pool = memory["ledger"], memory["pool"]
        beside = ledger["leased_bytes"] - pool["kv_bytes"]
        return cls(
            headroom=Headroom.of(trace.total_bytes, memory["headroom_bytes"]),
            ceiling_bytes=beside + pool["ceiling_bytes"],
            floor_bytes=beside + pool["floor_bytes"] + LEAST_BYTES,  # a last segment may be too small to be seen
            leased_bytes=ledger["leased_bytes"],
        )


@dataclass(frozen=True, slots=True)
class Expected:
    """A file with the answers to so many questions."""

    file: Path
    questions: int


def undisturbed(folder: Path, clients: int, show: Progress, questions: int = QUESTIONS) -> Expected:
    """Every question's answer from a server that nobody disturbs. Raises NotServing."""
    trace = Trace("undisturbed", "", "nvidia", 8192.0, clients, (Point(0.0, 600.0), Point(1.0, 600.0)))
    server = Server(new_card(trace, folder / "card"), folder / "steps")
    try:
        show(0.0, "answers undisturbed")
        asked = Clients(server.url, clients, questions)
        if not asked.wait(REFERENCE_S) or len(asked.texts) != questions or asked.answers.lost:
            raise NotServing(f"the server did not answer undisturbed: {asked.answers}\n{server.output}")
    finally:
        server.stop()
    file = folder / "expected.json"
    file.write_text(json.dumps(asked.texts), encoding="utf-8")
    return Expected(file, questions)


def play(trace: Trace, expected: Expected, folder: Path, show: Progress, picture: Path | None = None) -> Result:
    """Play `trace`; `folder` is empty and keeps what the run leaves behind, `picture` is where the plot goes."""
    run = _Run(trace, folder)
    try:
        run.play(expected, show)
    except (NotServing, OSError, KeyError, TypeError, ValueError) as error:
        run.fault = run.fault or f"{type(error).__name__}: {error}"
    finally:
        run.end()
    return run.result(picture)


class _Run:
    def __init__(self, trace: Trace, folder: Path) -> None:
        self.fault: str | None = None
        self._trace, self._folder = trace, folder
        self._server: Server | None = None
        self._clients: Clients | None = None
        self._keeper: Keeper | None = None
        self._bounds: Bounds | None = None
        self._shown: list[Shown] = []
        self._ended = threading.Event()

    def play(self, expected: Expected, show: Progress) -> None:
        trace = self._trace
        show(0.0, "loading")
        card = new_card(trace, self._folder / "card")
        self._server = Server(card, self._folder / "steps")
        self._bounds, meter = _settled(self._server, trace)
        self._keeper = Keeper(trace, card)
        self._keeper.start(meter)
        if trace.clients:
            self._clients = Clients(self._server.url, trace.clients, expected.questions, expected.file)
        looker = threading.Thread(target=self._look, args=(self._server,), name="state")
        looker.start()
        try:
            while self._keeper.at < trace.duration_s and self._keeper.fault is None:
                show(self._keeper.at, self._words())
                self._ended.wait(LOOK_S)
            show(trace.duration_s, "finishing")
            if self._clients is not None and not self._clients.finish():
                self.fault = "clients were still waiting for answers long after the trace had ended"
        finally:
            self._ended.set()
            looker.join()

    def end(self) -> None:
        """Stop whatever was started. Never raises for what the server did."""
        self._ended.set()
        if self._clients is not None and self.fault is not None:
            self._clients.wait(0.0)
        if self._keeper is not None:
            self._keeper.stop()
            self.fault = self.fault or self._keeper.fault
        if self._server is not None and (code := self._server.stop()) != 0:
            self.fault = f"the server ended with {code}: {self._server.output[-500:]}"

    def result(self, picture: Path | None) -> Result:
        answers = self._clients.answers if self._clients is not None else Answers()
        if self._keeper is None or self._bounds is None or not self._keeper.history:
            return Result(self._trace, None, answers, self.fault or "nothing was played")
        logged = list(read_steps(self._folder / "steps", self._keeper.origin))
        steps = [step for step, _ in logged if step.start >= 0]
        history = self._keeper.history
        self._keep(history, steps)
        bounds = self._bounds
        figures = measure(
            history,
            steps,
            bounds.headroom,
            longest_step_s=max((duration for step, duration in logged if step.start >= 0), default=0.0),
            ceiling_bytes=bounds.ceiling_bytes,
            floor_bytes=bounds.floor_bytes,
            blind=_blind(self._trace),
        )
        if picture is not None:
            draw(
                self._trace, history, self._shown, steps, bounds.headroom,
                ceiling_bytes=bounds.ceiling_bytes, floor_bytes=bounds.floor_bytes, to=picture,
            )  # fmt: skip
        return Result(self._trace, replace(figures, missed_s=self._keeper.missed_s), answers, self.fault)

    def _look(self, server: Server) -> None:
        """What the server says of itself: for the picture and the progress bar, never for a figure."""
        while not self._ended.wait(LOOK_S):
            try:
                memory = server.memory()
                at = self._keeper.at if self._keeper is not None else 0.0
                self._shown.append(Shown(at, memory["state"] or "ok", bool(memory["ledger"]["held"])))
            except (OSError, ValueError, TypeError, KeyError):
                continue

    def _words(self) -> str:
        assert self._keeper is not None
        now = self._keeper.history[-1]
        state = self._shown[-1].state if self._shown else "?"
        answers = self._clients.answers.finished if self._clients is not None else 0
        return f"{state}: ours {now.own >> 20:,} MiB, others {now.others >> 20:,} MiB, {answers} answers"

    def _keep(self, history: list[Truth], steps: list[Step]) -> None:
        rows = [[s.at, s.own, s.others, s.wanted, s.spilled, s.evicted_ms] for s in history]
        kept = {
            "columns": ["at", "own", "others", "wanted", "spilled", "evicted_ms"],
            "history": rows,
            "steps": [[step.start, step.end] for step in steps],
            "shown": [[shown.at, shown.state, shown.held] for shown in self._shown],
            "server": self._server.lines if self._server is not None else [],
        }
        (self._folder / "history.json").write_text(json.dumps(kept), encoding="utf-8")


def _settled(server: Server, trace: Trace) -> tuple[Bounds, OwnMeter]:
    """What the server holds, and a meter that goes on from there. Raises NotServing.

    It may have grown right after it was loaded: what it says and what it has mapped must agree before they are equated.
    """
    for _ in range(SETTLE_LOOKS):
        memory, meter = server.memory(), OwnMeter(server.process.pid, 0)
        time.sleep(LOOK_S)
        if memory["ledger"] is not None and meter.read() == 0 and server.memory()["ledger"] == memory["ledger"]:
            bounds = Bounds.read(memory, trace)
            return bounds, OwnMeter(server.process.pid, bounds.leased_bytes)
    raise NotServing("the server's memory did not come to rest after loading")


def _blind(trace: Trace) -> list[tuple[float, float]]:
    """When nothing at all could be read: on AMD the kernel's files still tell while the library hangs."""
    spells = trace.blind_spells() if trace.vendor == "nvidia" else trace.gone_spells()
    gone = trace.gone_spells()
    return [(start, end + (REOPEN_S if any(a <= end <= b for a, b in gone) else 0.0)) for start, end in spells]
