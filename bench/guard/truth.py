"""What is true of a device under a trace: what a driver and a kernel make of what we hold and what others want.

Runs in: anywhere; owns: what a driver remembers (spilled bytes, the time our queues were stopped).

NVIDIA on Linux never moves anybody's memory: what does not fit is refused, so others go without until there is room.
amdgpu gives others what they want and moves ours out: our queues stop, and RESTORE_S later what fits goes back in;
the rest lies in system memory and stays there, even when there is room again, until as much of ours has been freed.
In main memory (CPU, APU) what does not fit is swapped out, and comes back when it is touched.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from bench.guard.trace import Moment, Trace

RESTORE_S = 0.1  # amdgpu's delay between stopping our queues and bringing our buffers back


@dataclass(frozen=True, slots=True)
class Truth:
    """A device at one moment, all in bytes but the times.

    `own` is what the server has asked of the device, wherever it lies; `spilled` what of it lies elsewhere. `others` is
    what other programs have of what they want (`wanted`). `at` is in seconds of the trace.
    """

    at: float
    total: int
    own: int
    others: int
    wanted: int
    spilled: int
    gtt: int
    evicted_ms: int
    hanging: bool
    gone: bool

    @property
    def free(self) -> int:
        """What nobody has; below zero where more has been given out than there is."""
        return self.total - (self.own - self.spilled) - self.others

    @property
    def blind(self) -> bool:
        """Whether the driver tells nobody anything."""
        return self.hanging or self.gone

    @property
    def denied(self) -> bool:
        """Whether others went without."""
        return self.wanted > self.others


class DeviceModel(ABC):
    """A device that a trace is played on. `advance` is called with times that rise."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._own = self._spilled = self._spill_told = 0
        self._evicted_ms = 0.0

    def advance(self, at: float, own: int) -> Truth:
        """The device at `at`, when the server holds `own` bytes of it."""
        moment = self._trace.at(at)
        freed = max(0, self._own - own)
        self._own = own
        self._spilled -= min(freed, self._spilled)
        # The trace's own spill comes and goes by its changes: what has been freed meanwhile is not spilled again.
        told, self._spill_told = moment.spill_bytes - self._spill_told, moment.spill_bytes
        self._spilled = min(max(0, self._spilled + told), own)
        others = self._give(at, moment, self._trace.total_bytes - own, told > 0)
        return Truth(
            at=at,
            total=self._trace.total_bytes,
            own=own,
            others=others,
            wanted=moment.others_bytes,
            spilled=self._spilled,
            gtt=moment.gtt_bytes + self._spilled,
            evicted_ms=round(self._evicted_ms),
            hanging=moment.hanging,
            gone=moment.gone,
        )

    @abstractmethod
    def _give(self, at: float, moment: Moment, left: int, spilling: bool) -> int:
        """What others get where `left` is not ours; brings what is spilled up to date."""


class Refusing(DeviceModel):
    """NVIDIA on Linux."""

    def __init__(self, trace: Trace) -> None:
        super().__init__(trace)
        self._others = 0

    def _give(self, at: float, moment: Moment, left: int, spilling: bool) -> int:
        # What others have once, nobody takes from them.
        self._others = min(moment.others_bytes, max(left, self._others, 0))
        return self._others


class Evicting(DeviceModel):
    """amdgpu with memory of its own."""

    def __init__(self, trace: Trace) -> None:
        super().__init__(trace)
        self._stopped_at: float | None = None
        self._last_at = 0.0
        self._evicted = 0  # of the spilled bytes: driven out since our queues were stopped, and not yet brought back

    def _give(self, at: float, moment: Moment, left: int, spilling: bool) -> int:
        missing = moment.others_bytes - (left + self._spilled)
        elapsed_s, self._last_at = at - self._last_at, at
        if self._stopped_at is not None:
            self._evicted_ms += 1000 * min(elapsed_s, max(0.0, RESTORE_S - (at - elapsed_s - self._stopped_at)))
            if at - self._stopped_at >= RESTORE_S:
                back = min(self._evicted, self._spilled, max(0, -missing))
                self._spilled -= back
                missing += back
                self._stopped_at, self._evicted = None, 0
        if missing > 0:
            self._spilled += missing
            self._evicted += missing
        if (missing > 0 or spilling) and self._stopped_at is None:
            self._stopped_at = at
        return moment.others_bytes


class Swapping(DeviceModel):
    """Main memory, of a machine without a card or with an APU."""

    def __init__(self, trace: Trace) -> None:
        super().__init__(trace)
        self._swapped = 0

    def _give(self, at: float, moment: Moment, left: int, spilling: bool) -> int:
        told = max(0, self._spilled - self._swapped)
        self._swapped = max(0, moment.others_bytes - left - told)
        self._spilled = told + self._swapped
        return moment.others_bytes


def device_model(trace: Trace) -> DeviceModel:
    """The model of the trace's kind of device."""
    models: dict[str, type[DeviceModel]] = {"nvidia": Refusing, "amd": Evicting, "amd-apu": Swapping, "cpu": Swapping}
    return models[trace.vendor](trace)
