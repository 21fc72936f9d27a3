"""What a measurement was made on, and what else that machine was doing. Runs in: anywhere; owns: nothing."""

import contextlib
import platform
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import psutil

from edgekv.smi.host import read_memory, read_processor


def machine_line() -> str:
    """One line for the head of a result: processor, memory, system, versions."""
    processor, memory = read_processor(), read_memory()
    features = f" ({', '.join(processor.features)})" if processor.features else ""
    try:
        torch = f", torch {version('torch')}"
    except PackageNotFoundError:
        torch = ""
    return (
        f"{processor.cores} cores of {processor.name}{features}, {memory.total_bytes / 2**30:.0f} GiB, "
        f"{platform.system()} {platform.release()}, Python {platform.python_version()}{torch}"
    )


@dataclass(frozen=True, slots=True)
class OtherLoad:
    """Cores that were busy with other programs on average, and cores that other virtual machines took."""

    busy_cores: float
    stolen_cores: float

    def __str__(self) -> str:
        stolen = f", {self.stolen_cores:.2f} stolen by the hypervisor" if self.stolen_cores >= 0.005 else ""
        return f"others used {self.busy_cores:.2f} cores{stolen}"


class LoadWatch:
    """What other programs use between two readings: all that the machine did, less this process and its children."""

    def __init__(self) -> None:
        self._own = psutil.Process()
        self._before = self._read()

    def read(self) -> OtherLoad:
        """Averages since the last reading (at first: since this was made)."""
        before, now = self._before, self._read()
        self._before = now
        seconds = max(now.at_s - before.at_s, 1e-6)
        # Ticks of a hundredth of a second are rounded on both sides, so the difference may fall below nothing.
        others = (now.busy_s - before.busy_s) - (now.own_s - before.own_s)
        return OtherLoad(max(0.0, others / seconds), max(0.0, (now.stolen_s - before.stolen_s) / seconds))

    def _read(self) -> "_Times":
        times = psutil.cpu_times()
        busy = times.user + times.system + sum(getattr(times, name, 0.0) for name in ("nice", "irq", "softirq"))
        return _Times(time.perf_counter(), busy, getattr(times, "steal", 0.0), self._read_own())

    def _read_own(self) -> float:
        """Of this process, its children, theirs, and those that have ended and been waited for."""
        seconds = 0.0
        for process in (self._own, *self._own.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                seconds += times.user + times.system
                if sys.platform != "win32":
                    seconds += times.children_user + times.children_system
        return seconds


@dataclass(frozen=True, slots=True)
class _Times:
    """Seconds of processor time since the machine started."""

    at_s: float
    busy_s: float
    stolen_s: float
    own_s: float
