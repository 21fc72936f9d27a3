import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bench.guard.trace import Trace, load_trace
from edgekv.cli.record import Device, NothingToRecord, record
from edgekv.core.reading import Reading
from edgekv.smi.reader import ReadingFailed, Source

MIB = 1 << 20


@dataclass
class Card:
    """A card and a clock; `says` tells what a reading finds at a moment, or raises what becomes of it."""

    says: Callable[[float], dict[str, Any]]
    now: float = 0.0
    closed: int = 0
    opened: int = 0
    at: list[float] = field(default_factory=list)

    def open(self) -> "Card":
        self.says(self.now)
        self.opened += 1
        return self

    def read(self, at: float) -> Reading:
        self.at.append(self.now)
        told = {"used": 600, "takes_s": 0.0, **self.says(self.now)}
        self.now += told.pop("takes_s")
        return Reading(
            total_bytes=8192 * MIB, own_bytes=0, source="card", at=at, used_bytes=told.pop("used") * MIB, **told
        )

    def close(self) -> None:
        self.closed += 1

    def record(self, file: Path, seconds: float = 5.0, vendor: str = "amd") -> Trace:
        device = Device(vendor, "A Card", [Source("card", self.open)])
        record(file, seconds, device, clock=lambda: self.now, sleep=self.sleep)
        return load_trace(file)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "mine.json"


def test_only_what_changes_is_written_down_and_the_end(file: Path) -> None:
    card = Card(lambda now: {"used": 600 if now < 2 else 4700, "gtt_used_bytes": 180 * MIB})
    trace = card.record(file)
    assert json.loads(file.read_text())["points"] == [
        {"t": 0.0, "others_mib": 600, "gtt_mib": 180, "spill_mib": 0},
        {"t": 2.0, "others_mib": 4700},
        {"t": 5.0},
    ]
    assert (trace.vendor, trace.total_mib, trace.duration_s) == ("amd", 8192, 5)
    assert trace.about == "A Card, recorded for 5 s"
    assert card.closed == 1


def test_the_card_is_read_ten_times_a_second(file: Path) -> None:
    card = Card(lambda now: {})
    card.record(file, 2.0)
    assert 20 <= len(card.at) <= 22


def test_a_spill_is_recorded(file: Path) -> None:
    trace = Card(lambda now: {"spilled_own_bytes": 256 * MIB if now >= 1 else 0}).record(file)
    assert [trace.at(t).spill_bytes // MIB for t in (0.5, 1.5)] == [0, 256]


def test_nvidia_and_main_memory_say_nothing_that_such_a_trace_cannot_hold(file: Path) -> None:
    for vendor in ("nvidia", "cpu", "amd-apu"):
        target = file.with_name(f"{vendor}.json")
        assert Card(lambda now: {"gtt_used_bytes": 5 * MIB}).record(target, vendor=vendor).vendor == vendor


def test_a_driver_that_takes_its_time_is_one_that_hangs(file: Path) -> None:
    hangs = iter([0.0] * 5 + [3.0])
    trace = Card(lambda now: {"takes_s": next(hangs, 0.0)}).record(file, 6.0)
    [(start, end)] = trace.blind_spells()
    assert end - start == pytest.approx(3.0)


def test_a_driver_that_is_gone_and_comes_back_is_recorded_as_that(file: Path) -> None:
    def says(now: float) -> dict[str, Any]:
        if 2 <= now < 3:
            raise ReadingFailed("no such card")
        return {"used": 600 if now < 2 else 700}

    card = Card(says)
    trace = card.record(file)
    assert trace.gone_spells() == [(2.0, 3.0)]
    assert trace.at(4).others_bytes == 700 * MIB
    assert card.opened == 2


def test_ctrl_c_ends_it_with_the_file_written(file: Path) -> None:
    def says(now: float) -> dict[str, Any]:
        if now >= 3:
            raise KeyboardInterrupt
        return {}

    assert Card(says).record(file, 60.0).duration_s == pytest.approx(3.0)


def test_the_second_source_is_read_where_the_first_cannot_be(file: Path) -> None:
    def absent() -> Card:
        raise ReadingFailed("no library")

    card = Card(lambda now: {})
    device = Device("amd", "A Card", [Source("amdsmi", absent), Source("sysfs", card.open)])
    record(file, 1.0, device, clock=lambda: card.now, sleep=card.sleep)
    assert load_trace(file).at(0.5).others_bytes == 600 * MIB


def test_a_device_that_cannot_be_read_is_an_error_that_says_why(file: Path) -> None:
    def says(now: float) -> dict[str, Any]:
        raise ReadingFailed("the driver is not loaded")

    with pytest.raises(NothingToRecord, match="card: the driver is not loaded"):
        Card(says).record(file)
    assert not file.exists()


def test_nothing_that_exists_is_overwritten_and_a_bad_place_is_told_before_the_recording(file: Path) -> None:
    card = Card(lambda now: {})
    file.write_text("mine")
    with pytest.raises(NothingToRecord, match="is there already"):
        card.record(file)
    with pytest.raises(NothingToRecord, match="there is no folder"):
        card.record(file.parent / "none" / "x.json")
    with pytest.raises(NothingToRecord, match="cannot be written: File name too long"):
        card.record(file.parent / ("x" * 300))
    for seconds in (0.0, -1.0, float("nan"), 1e9):
        with pytest.raises(NothingToRecord, match="--seconds takes"):
            card.record(file.parent / "y.json", seconds)
    assert (file.read_text(), card.at) == ("mine", [])


def test_main_memory_of_this_machine_can_be_recorded(file: Path) -> None:
    from edgekv.smi.device import Watched
    from edgekv.smi.sources import sources_for

    moments: Iterator[float] = iter(range(1000))
    record(
        file, 3.0, Device("cpu", "main memory", sources_for(Watched("cpu"))),
        clock=lambda: next(moments) / 4, sleep=lambda seconds: None,
    )  # fmt: skip
    trace = load_trace(file)
    assert 0 < trace.at(0).others_bytes < trace.total_bytes


def test_the_first_card_is_recorded_through_its_driver_as_the_command_does_it(file: Path) -> None:
    from tests.sim import CardState, SimulatedCard

    card = SimulatedCard(file.parent / "card", CardState("nvidia", others=((4_000_000, "game", 900 * MIB),)))
    command = [sys.executable, "-m", "edgekv", "doctor", "--record", str(file), "--seconds", "0.5"]
    done = subprocess.run(command, env={**os.environ, **card.environment()}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    trace = load_trace(file)
    assert (trace.vendor, trace.total_mib, trace.at(0).others_bytes) == ("nvidia", 16384, 900 * MIB)
    assert trace.about.startswith("Simulated card, recorded for ")
