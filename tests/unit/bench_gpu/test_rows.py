"""What is told of a measurement: figures where there are any, a reason where there are none, and the targets."""

import re
from collections.abc import Callable, Iterator

import pytest
import torch

from bench.gpu.__main__ import Planned, main, measured
from bench.gpu.bench import Bench, NotMeasured, copies_of
from bench.gpu.rig import HostRig, Pass
from bench.gpu.row import Row, Section, Target, Times
from bench.gpu.sizes import ON_HOST
from bench.gpu.table import line, markdown

TIMES = Times((2e-6, 1e-6, 4e-6, 3e-6, 5e-6))


class Clock:
    """A rig on which a pass takes what its calls say."""

    is_real = True

    def __init__(self) -> None:
        self.card = HostRig().card

    def wait(self) -> None:
        pass

    def free_bytes(self) -> int:
        return 100

    def pass_of(self, run: Callable[[], None]) -> Pass:
        seconds: list[float] = []
        run()
        return Ticking(seconds, run)


class Ticking:
    captured = True

    def __init__(self, seconds: list[float], run: Callable[[], None]) -> None:
        self._run = run

    def seconds(self) -> float:
        spent.clear()
        self._run()
        return sum(spent)


spent: list[float] = []


def bench() -> Bench:
    return Bench(Clock(), ON_HOST, 100.0)  # type: ignore[arg-type]


def test_a_row_tells_its_median_its_best_tenth_and_its_share() -> None:
    row = Row("a kernel", TIMES, "3 GB/s", 0.9, "of read", Target(0.85, 0.92), "so")
    assert re.split(r"  +", line(row, has_times=True)) == [
        "a kernel", "3.00 us", "1.00 us", "3 GB/s", "0.90 of read", ">= 0.85 / 0.92 ship", "so",
    ]  # fmt: skip
    assert row.document(has_times=True)["met"] == "ship"


@pytest.mark.parametrize(("share", "met"), [(0.92, "aim"), (0.85, "ship"), (0.849, "MISSED"), (None, "")])
def test_a_target_is_met_or_missed(share: float | None, met: str) -> None:
    assert Row("", TIMES, share=share, target=Target(0.85, 0.92)).met == met


@pytest.mark.parametrize(("seconds", "met"), [(1e-6, "aim"), (2.9e-6, "ship"), (3.1e-6, "MISSED")])
def test_what_may_take_no_more_is_held_against_the_time(seconds: float, met: str) -> None:
    assert Row("", Times((seconds,)), target=Target(3e-6, 1e-6, is_most=True)).met == met


def test_what_was_not_measured_says_why_and_has_no_figure() -> None:
    row = Row("a peer", reason="it is not installed")
    assert line(row, has_times=True).split("  ")[-1].strip() == "not measured: it is not installed"
    assert row.document(has_times=True) == {"name": "a peer", "reason": "it is not installed"}
    told = markdown([Section("peers", [row])], ["a card, and its driver"], "python -m bench.gpu", has_times=True)
    assert "| a peer |  |  |  |  |  | not measured: it is not installed |" in told
    assert told.startswith("# a card: ")


def test_work_that_cannot_be_done_keeps_no_other_from_being_timed() -> None:
    def fails() -> list[Callable[[], object]]:
        raise RuntimeError("no such\nkernel")

    def lacking() -> list[Callable[[], object]]:
        raise NotMeasured("it is not installed")

    calls = [lambda: spent.append(2.0), lambda: spent.append(4.0)]
    found = bench().compare({"good": lambda: calls, "bad": fails, "missing": lacking})
    assert found.of("good").median == 3.0, "the time of one call"
    assert found.reasons == {"bad": "RuntimeError: no such kernel", "missing": "it is not installed"}
    with pytest.raises(NotMeasured, match="no such kernel"):
        found.of("bad")


def test_a_measurement_that_breaks_off_says_why_after_what_it_found() -> None:
    def breaks(bench: Bench) -> Iterator[Row]:
        yield Row("first", TIMES)
        raise ValueError("no such shape")

    rows = list(measured(bench(), Planned("a measurement", breaks)))
    assert [(row.name, row.reason) for row in rows] == [("first", ""), ("a measurement", "ValueError: no such shape")]


def test_nothing_is_begun_when_the_time_is_up() -> None:
    late = Bench(Clock(), ON_HOST, 0.0)  # type: ignore[arg-type]
    [row] = measured(late, Planned("a measurement", lambda bench: iter([Row("never", TIMES)])))
    assert row.reason == "the time was up (--limit)"


def test_what_does_not_fit_is_not_tried() -> None:
    with pytest.raises(NotMeasured, match="GiB are free"):
        bench().need(91)
    bench().need(90)


def test_shares_are_of_what_was_measured_and_there_are_none_without() -> None:
    run = bench()
    assert run.share_of_read(9.0, TIMES) is None
    run.read_bytes_s = 6e6
    assert run.share_of_read(9.0, TIMES) == pytest.approx(0.5)


def test_copies_add_up_to_the_arena() -> None:
    assert [copies_of(100, each) for each in (1000, 100, 99, 30)] == [1, 1, 2, 4]
    assert copies_of(10**9, 1, most=64) == 64


def test_without_a_card_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 1
    assert "sees no card" in capsys.readouterr().err
