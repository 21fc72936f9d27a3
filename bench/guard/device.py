"""Keeps a simulated card true to a trace while the server runs, and writes down what was true when.

Runs in: a thread of the player; owns: the card's state and the history.
"""

import threading
import time
from pathlib import Path
from typing import Any

from bench.guard.own import OwnMeter
from bench.guard.trace import MIB, Trace, Vendor
from bench.guard.truth import Truth, device_model
from edgekv.core.capacity import RUNTIME_BYTES
from tests.sim import CardState, SimulatedCard

PERIOD_S = 0.02
OTHER_PID = 4_000_000  # above any process's
SWAP_BYTES = 8 << 30
CONTEXT_BYTES = RUNTIME_BYTES["card"]  # what a driver sets aside for any program that computes, as planned
NAMES: dict[Vendor, str] = {
    "nvidia": "Simulated NVIDIA card", "amd": "Simulated AMD card", "amd-apu": "Simulated APU", "cpu": "Simulated CPU",
}  # fmt: skip


def new_card(trace: Trace, folder: Path) -> SimulatedCard:
    """The card as the trace begins, before the server has anything on it."""
    unified = trace.vendor in ("cpu", "amd-apu")
    state = CardState(
        trace.vendor,
        name=NAMES[trace.vendor],
        total_bytes=trace.total_bytes,
        gtt_total_bytes=trace.total_bytes if trace.vendor == "amd-apu" else 2 * trace.total_bytes,
        swap_total_bytes=SWAP_BYTES if unified else 0,
        **_shown(trace, device_model(trace).advance(0.0, 0 if trace.vendor == "cpu" else CONTEXT_BYTES)),
    )
    return SimulatedCard(folder, state)


class Keeper:
    """Plays a trace on a card from `start` until `stop`.

    `history` has a sample every PERIOD_S or, on a busy machine, as often as that goes; `missed_s` is the longest gap.
    Nothing may read `history` before `stop` has returned, except for its last item.
    """

    def __init__(self, trace: Trace, card: SimulatedCard) -> None:
        self.history: list[Truth] = []
        self.origin = 0.0
        self.missed_s = 0.0
        self.fault: str | None = None
        self._trace, self._card = trace, card
        self._model = device_model(trace)
        self._told: dict[str, Any] = {}
        self._meter: OwnMeter | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="device")

    def start(self, meter: OwnMeter) -> None:
        """Begin, with a server of which `meter` tells what it holds."""
        self._meter = meter
        self.origin = time.monotonic()
        self._tick()
        self._thread.start()

    def stop(self) -> None:
        """End; the card stays as it is."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def at(self) -> float:
        """Seconds since the trace began."""
        return time.monotonic() - self.origin

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                began = time.monotonic()
                self._tick()
                self._stop.wait(max(0.0, PERIOD_S - (time.monotonic() - began)))
        except OSError as error:
            self.fault = f"the server cannot be seen any more: {error}"

    def _tick(self) -> None:
        assert self._meter is not None
        own = self._meter.read()
        at = self.at
        if self.history:
            self.missed_s = max(self.missed_s, at - self.history[-1].at)
        truth = self._model.advance(at, own)
        self.history.append(truth)
        shown = _shown(self._trace, truth)
        changes = {field: value for field, value in shown.items() if self._told.get(field) != value}
        if truth.hanging and not (len(self.history) > 1 and self.history[-2].hanging):
            changes["hang_s"] = self._hang_left(at)
        if changes:
            self._card.set(**changes)
            self._told = shown

    def _hang_left(self, at: float) -> float:
        return max(point.t + point.hang_s - at for point in self._trace.points if point.t <= at and point.hang_s)


def _shown(trace: Trace, truth: Truth) -> dict[str, Any]:
    """What a driver shows of this, in whole MiB so that not every byte is a change."""
    gtt = truth.gtt + (truth.own - truth.spilled if trace.vendor == "amd-apu" else 0)
    return {
        "own_bytes": _whole(truth.own - truth.spilled),
        "others": ((OTHER_PID, "others", _whole(truth.others)),),
        "gtt_used_bytes": _whole(gtt),
        "spilled_own_bytes": _whole(truth.spilled),
        "evicted_ms": truth.evicted_ms,
        "gone": truth.gone,
    }


def _whole(num_bytes: int) -> int:
    return num_bytes // MIB * MIB
