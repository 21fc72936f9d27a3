"""The real server over a simulated card: everything is as `edgekv serve` builds it but the place and what is read.

    python -m bench.guard.server CARD_FOLDER STEP_LOG      (in SimulatedCard.environment())

Runs in: a process of its own; owns: nothing. The model computes on the processor in float32, so that answers can be
compared. A card's memory is simulated by mappings that nobody has touched: as large as they say, and as cheap to give
back as a card's. Every forward pass is noted in STEP_LOG as it ends, from without: when it began and ended, and when
the whole step did, on the monotonic clock that all processes share.
"""

import os
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from bench.guard.measure import Step
from edgekv.smi.device import Place, Watched
from edgekv.smi.sources import sources_for
from tests.sim import SimulatedCard
from tests.sim.card import CardState

_RECORD = struct.Struct("<dddd")  # the forward pass from, to; the whole step from, to
SETTINGS = ("server.port=0", "logging.level=warning")


def place_of(state: CardState) -> Place:
    """Where the simulated model goes. A card's context, which the driver makes for any program, is not there yet."""
    free = state.total_bytes - state.used_bytes + state.own_bytes
    if state.vendor == "cpu":
        watched = Watched("cpu")
        return Place("cpu", "cpu", state.name, free, total_bytes=state.total_bytes, watched=watched)
    watched = Watched("nvidia" if state.vendor == "nvidia" else "amd", state.pci_id)
    return Place("card", "cpu", state.name, free, total_bytes=state.total_bytes, watched=watched)


class StepLog:
    """Writes down when each forward pass and the step around it began and ended."""

    def __init__(self, file: Path) -> None:
        self._file = file.open("ab", buffering=0)
        self._forward: list[tuple[float, float]] = []  # of the step under way

    def install(self) -> None:
        """Time every step from now on; torch is imported."""
        from edgekv.engine.core import EngineCore
        from edgekv.engine.runner import Runner

        forward, step = Runner.forward, EngineCore.step

        def timed_forward(runner, plan):  # type: ignore[no-untyped-def]
            started = time.monotonic()
            try:
                return forward(runner, plan)
            finally:
                self._forward.append((started, time.monotonic()))

        def timed_step(core):  # type: ignore[no-untyped-def]
            started = time.monotonic()
            self._forward.clear()
            try:
                return step(core)
            finally:
                for begun, ended in self._forward:
                    self._file.write(_RECORD.pack(begun, ended, started, time.monotonic()))

        Runner.forward, EngineCore.step = timed_forward, timed_step  # type: ignore[method-assign]


def read_steps(file: Path, origin: float) -> Iterator[tuple[Step, float]]:
    """The forward passes in a log, in seconds since `origin`, and how long the step around each took."""
    for begun, ended, started, done in _RECORD.iter_unpack(file.read_bytes()):
        yield Step(begun - origin, ended - origin), done - started


def main() -> int:
    card = SimulatedCard.open(Path(sys.argv[1]))
    card.set(own_pid=os.getpid())

    from edgekv.cli.running import run
    from edgekv.cli.serve import served_model
    from edgekv.config.load import load_config

    config = load_config(None, list(SETTINGS), {}, warn=lambda warning: None)
    name, aliases, engine = served_model(config, None)
    place = place_of(card.state)
    StepLog(Path(sys.argv[2])).install()
    return run(
        config,
        name,
        aliases,
        replace(engine, place=place, dtype="float32", draft=None),
        sources=sources_for(place.watched, sysfs=card.sysfs, proc=card.proc),
    )


if __name__ == "__main__":
    sys.exit(main())
