from collections import namedtuple

import psutil
import pytest

from edgekv.cli import machine
from edgekv.cli.machine import LoadWatch, machine_line

Cpu = namedtuple("Cpu", "user nice system idle irq softirq steal")
Own = namedtuple("Own", "user system children_user children_system")


class Machine:
    """Processor times that a test sets, and the time they were taken at."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.all = Cpu(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        self.own = Own(0.0, 0.0, 0.0, 0.0)
        monkeypatch.setattr(machine.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(psutil, "cpu_times", lambda: self.all)
        monkeypatch.setattr(psutil.Process, "cpu_times", lambda process: self.own)
        monkeypatch.setattr(psutil.Process, "children", lambda process, recursive: [])


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_others_are_all_that_was_busy_less_this_process_and_those_it_waited_for(simulated: Machine) -> None:
    watch = LoadWatch()
    simulated.now += 10
    simulated.all = Cpu(user=9.0, nice=1.0, system=2.0, idle=5.0, irq=0.5, softirq=0.5, steal=1.0)
    simulated.own = Own(user=3.0, system=1.0, children_user=2.0, children_system=2.0)
    load = watch.read()
    assert load.busy_cores == pytest.approx(0.5)
    assert load.stolen_cores == pytest.approx(0.1)
    assert str(load) == "others used 0.50 cores, 0.10 stolen by the hypervisor"


def test_each_reading_begins_where_the_last_ended(simulated: Machine) -> None:
    watch = LoadWatch()
    simulated.now += 10
    simulated.all = simulated.all._replace(user=8.0)
    watch.read()
    simulated.now += 10
    assert watch.read().busy_cores == 0


def test_ticks_that_round_down_are_no_load_below_nothing(simulated: Machine) -> None:
    watch = LoadWatch()
    simulated.now += 1
    simulated.own = simulated.own._replace(user=0.01)
    assert watch.read().busy_cores == 0


def test_a_machine_is_told_in_one_line() -> None:
    line = machine_line()
    assert "cores of" in line
    assert "GiB" in line
    assert "torch 2." in line
    assert "\n" not in line
