"""`edgekv doctor --record FILE`: what other programs do with a device's memory, as a trace that can be played.

Runs in: the main thread; owns: the file it writes. The format is that of bench/traces in the repository.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from edgekv.cli.console import stderr, stdout
from edgekv.config.units import MIB
from edgekv.core.reading import Reading
from edgekv.errors import EdgeKVError
from edgekv.smi.reader import Reader, ReadingFailed, Source

PERIOD_S = 0.1
HANG_S = 0.5  # a reading that takes this long is a driver that hangs
LONGEST_S = 24 * 3600.0


class NothingToRecord(EdgeKVError):
    """The device cannot be read, or the file cannot be written."""


@dataclass(frozen=True, slots=True)
class Device:
    """What is recorded: its kind as a trace calls it, its title, and the ways to read it, the best first."""

    vendor: str
    title: str
    sources: Sequence[Source]


class Recording:
    """Readings, boiled down to the points where something changed. Times are in seconds since the first reading."""

    def __init__(self, device: Device, total_bytes: int) -> None:
        self._device = device
        self._total_bytes = total_bytes
        self._points: list[dict[str, Any]] = []
        self._held: dict[str, Any] = {}

    @property
    def num_points(self) -> int:
        """Points so far."""
        return len(self._points)

    def saw(self, at: float, reading: Reading) -> None:
        """The device at `at`."""
        values: dict[str, Any] = {"others_mib": round(reading.others_bytes() / MIB)}
        if self._device.vendor in ("amd", "amd-apu"):
            values["gtt_mib"] = round((reading.gtt_used_bytes or 0) / MIB)
        if self._device.vendor != "nvidia":
            values["spill_mib"] = round(reading.spilled_own_bytes / MIB)
        if "gone" in self._held:
            values["gone"] = False
        self._note(at, values)

    def lost(self, at: float) -> None:
        """From `at` on the device cannot be read."""
        if self._device.vendor != "cpu":
            self._note(at, {"gone": True})

    def hung(self, at: float, seconds: float) -> None:
        """From `at` on the driver did not answer for so long."""
        if self._device.vendor != "cpu":
            self._add(at, {"hang_s": round(seconds, 3)})

    def document(self, at: float) -> str:
        """The trace, ended at `at`."""
        points = [*self._points]
        if not points or _time(at) > points[-1]["t"]:
            points.append({"t": _time(at)})
        about = f"{self._device.title}, recorded for {at:.0f} s"
        head = {"about": about, "vendor": self._device.vendor, "total_mib": round(self._total_bytes / MIB)}
        fields = [f"  {json.dumps(name)}: {json.dumps(value)},\n" for name, value in head.items()]
        listed = ",\n".join(f"    {json.dumps(point)}" for point in points)
        return f'{{\n{"".join(fields)}  "points": [\n{listed}\n  ]\n}}\n'

    def _note(self, at: float, values: dict[str, Any]) -> None:
        changed = {name: value for name, value in values.items() if self._held.get(name) != value}
        self._held |= values
        if changed:
            self._add(at, changed)

    def _add(self, at: float, values: dict[str, Any]) -> None:
        if self._points and self._points[-1]["t"] >= _time(at):
            self._points[-1] |= values
        else:
            self._points.append({"t": _time(at), **values})


def first_device() -> Device:
    """The first card, NVIDIA's before AMD's and those with memory of their own before APUs; else main memory."""
    from edgekv.smi.cards import survey
    from edgekv.smi.device import Watched
    from edgekv.smi.sources import sources_for

    cards = sorted((card for found in survey() for card in found.cards), key=lambda card: card.unified)
    if not cards:
        return Device("cpu", "main memory", sources_for(Watched("cpu")))
    card = cards[0]
    vendor = "amd-apu" if card.vendor == "amd" and card.unified else card.vendor
    return Device(vendor, card.name, sources_for(Watched(card.vendor, card.pci_id)))


def record(
    file: Path,
    seconds: float = 60.0,
    device: Device | None = None,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Sample a device (None: the first card) ten times a second, and write a trace of it.

    Ctrl-C ends it early, with the file written. Raises NothingToRecord.
    """
    if not 0 < seconds <= LONGEST_S:
        raise NothingToRecord(f"--seconds takes more than 0 and at most {LONGEST_S:.0f}, not {seconds:g}.")
    opened = _made(file)
    try:
        with opened:
            _record(opened, seconds, device or first_device(), clock, sleep)
    except BaseException:
        file.unlink(missing_ok=True)
        raise


def _record(
    opened: TextIO, seconds: float, device: Device, clock: Callable[[], float], sleep: Callable[[float], None]
) -> None:
    eye = _Eye(device.sources)
    first = eye.read(0.0)
    recording = Recording(device, first.total_bytes)
    recording.saw(0.0, first)
    started, at = clock(), 0.0
    try:
        with _bar(device.title, seconds) as show:
            while (at := clock() - started) < seconds:
                _look(recording, eye, at, clock)
                show(at, recording.num_points)
                sleep(max(0.0, at + started + PERIOD_S - clock()))
            at = seconds
    except KeyboardInterrupt:
        at = clock() - started
    finally:
        eye.close()
    try:
        opened.write(recording.document(max(at, PERIOD_S)))
        opened.flush()
    except OSError as error:
        raise NothingToRecord(f"{opened.name} cannot be written: {error.strerror}") from None
    told = f"{opened.name}: {device.title}, {at:.0f} s, {recording.num_points} points"
    stdout().print(told, markup=False, soft_wrap=True)


class _Eye:
    """The best source that can be read, opened again when it fails."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        self._reader: Reader | None = None

    def read(self, at: float) -> Reading:
        """The device now. Raises NothingToRecord where no source gives a reading."""
        problems = []
        for source in self._sources if self._reader is None else ():
            try:
                self._reader = source.open()
                return self._reader.read(at)
            except ReadingFailed as error:
                problems.append(f"{source.name}: {error}")
                self.close()
        if self._reader is None:
            raise NothingToRecord("; ".join(problems) or "there is no way to read this device")
        try:
            return self._reader.read(at)
        except ReadingFailed as error:
            self.close()
            raise NothingToRecord(str(error)) from None

    def close(self) -> None:
        """Let go of the driver."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None


def _look(recording: Recording, eye: _Eye, at: float, clock: Callable[[], float]) -> None:
    began = clock()
    try:
        reading = eye.read(at)
    except NothingToRecord:
        recording.lost(at)
        return
    took_s = clock() - began
    if took_s >= HANG_S:
        recording.hung(at, took_s)
        at += took_s
    recording.saw(at, reading)


@contextmanager
def _bar(title: str, seconds: float) -> Iterator[Callable[[float, int], None]]:
    """How far the recording is, on a terminal."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[says]}"),
    )
    with Progress(*columns, console=stderr(), transient=True) as progress:
        task = progress.add_task(f"recording {title}", total=seconds, says="Ctrl-C ends it early")

        def show(at: float, num_points: int) -> None:
            progress.update(task, completed=at, says=f"{num_points} points; Ctrl-C ends it early")

        yield show


def _made(file: Path) -> TextIO:
    """The file, made now: who has waited for a recording is not to lose it to a bad name."""
    try:
        return file.open("x", encoding="utf-8")
    except FileExistsError:
        raise NothingToRecord(f"{file} is there already; give another name, or remove it first.") from None
    except OSError as error:
        folder = file.absolute().parent
        why = f"there is no folder {folder}" if isinstance(error, FileNotFoundError) else error.strerror
        raise NothingToRecord(f"{file} cannot be written: {why}") from None


def _time(at: float) -> float:
    return round(at, 2)
