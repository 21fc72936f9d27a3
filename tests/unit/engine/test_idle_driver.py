"""A core in which everything waits is asked less and less often, and wakes at once when it is told something."""

import time

import pytest
import trio

from edgekv.core.sequence import FinishReason, SequenceSpec
from edgekv.core.step import EngineStats, PoolStats, Resize, StepReport
from edgekv.engine import driver as driver_module
from edgekv.engine.driver import IDLE_STEP_MOST_S, Core, LoadProgress, Progress, ThreadDriver


class WaitingCore:
    """Busy, with nothing that can run until it is resized."""

    def __init__(self) -> None:
        self.steps_at: list[float] = []
        self.resized_at: float | None = None
        self.busy = True

    def submit(self, spec: SequenceSpec) -> None: ...

    def abort(self, sequence_id: int, reason: FinishReason = FinishReason.ABORT) -> None: ...

    def resize(self, order: Resize) -> None:
        self.resized_at = time.monotonic()

    def step(self) -> StepReport:
        self.steps_at.append(time.monotonic())
        return StepReport(self.stats())

    def stats(self) -> EngineStats:
        return EngineStats(PoolStats(0, 0, 0, 0, 16), 0, 1)


class Deaf:
    """Hears nothing."""

    def on_progress(self, progress: LoadProgress) -> None: ...

    def on_ready(self, facts: None, stats: EngineStats) -> None: ...

    def on_report(self, report: StepReport) -> None: ...

    def on_fault(self, error: BaseException) -> None:
        raise error


@pytest.mark.parametrize("most_s", [IDLE_STEP_MOST_S, 5.0])
async def test_the_pauses_grow_to_their_limit_and_a_command_ends_one(
    most_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver_module, "IDLE_STEP_MOST_S", most_s)
    core = WaitingCore()

    def load(progress: Progress) -> tuple[Core, None]:
        return core, None

    driver = ThreadDriver(load, Deaf())
    await trio.sleep(0.8)
    told_at = time.monotonic()
    driver.send(lambda core: core.resize(Resize(0)))
    await trio.sleep(0.1)
    await driver.aclose()
    assert 2 <= len([at for at in core.steps_at if at < told_at]) <= (25 if most_s < 1 else 10)
    assert core.resized_at is not None
    assert core.resized_at - told_at < 0.4, "not when the pause was over"
