"""A played trace as a picture: our share of the device from below, others' from above, free memory between.

Runs in: anywhere (matplotlib, without a display); owns: nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from bench.guard.measure import Step, ideal
from bench.guard.trace import Trace
from bench.guard.truth import Truth
from edgekv.core.spill import Headroom

GIB = 1 << 30
STATE_COLOURS = {
    "ok": "#ffffff", "pressure": "#fff3c4", "critical": "#ffd9a8", "thrash": "#f6c1e6", "spilled": "#f9b4b4",
}  # fmt: skip
BLIND = "#d9d9d9"


@dataclass(frozen=True, slots=True)
class Shown:
    """What the server itself said at one moment: the state, and whether steps were held back."""

    at: float
    state: str
    held: bool


def draw(
    trace: Trace,
    history: Sequence[Truth],
    shown: Sequence[Shown],
    steps: Sequence[Step],
    headroom: Headroom,
    *,
    ceiling_bytes: int,
    floor_bytes: int,
    to: Path,
) -> None:
    """Write the picture, a PNG."""
    figure = Figure(figsize=(10, 4.6), dpi=80, layout="constrained")
    memory, rate = figure.subplots(2, 1, sharex=True, height_ratios=(5, 1))
    _memory(memory, trace, history, shown, ideal(history, headroom, ceiling_bytes, floor_bytes))
    _rate(rate, steps, history[-1].at)
    memory.set_title(f"{trace.name}: {trace.about}", loc="left", fontsize=10)
    to.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(to, metadata={"Software": None})


def _memory(axes: Axes, trace: Trace, history: Sequence[Truth], shown: Sequence[Shown], wanted: Sequence[int]) -> None:
    times = [sample.at for sample in history]
    total = trace.total_bytes / GIB
    there = [(sample.own - sample.spilled) / GIB for sample in history]
    others = [total - sample.others / GIB for sample in history]
    states = _background(axes, trace, shown, history[-1].at)
    axes.fill_between(times, 0, there, color="#2a78b5", linewidth=0, label="ours")
    axes.fill_between(times, others, total, color="#8a8a8a", linewidth=0, label="others")
    if any(sample.spilled for sample in history):
        own = [sample.own / GIB for sample in history]
        axes.fill_between(times, there, own, color="#d62728", linewidth=0, label="ours, spilled")
    if any(sample.denied for sample in history):
        want = [total - sample.wanted / GIB for sample in history]
        axes.plot(times, want, color="#444444", linewidth=0.8, linestyle=":", label="others want")
    axes.plot(times, [each / GIB for each in wanted], color="#0b3c5d", linewidth=1.0, linestyle="--", label="ideal")
    axes.set_ylim(0, total)
    axes.set_xlim(0, history[-1].at)
    axes.set_ylabel("GiB")
    handles, labels = axes.get_legend_handles_labels()
    handles += [Patch(facecolor=colour, edgecolor="#999999", linewidth=0.5) for colour in states.values()]
    axes.legend(handles, [*labels, *states], loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)


def _background(axes: Axes, trace: Trace, shown: Sequence[Shown], end: float) -> dict[str, str]:
    used: dict[str, str] = {}
    for now, after in zip(shown, [*(each.at for each in shown[1:]), end], strict=True):
        if now.state != "ok" and now.state in STATE_COLOURS and after > now.at:
            used[now.state] = STATE_COLOURS[now.state]
            axes.axvspan(now.at, after, color=STATE_COLOURS[now.state], linewidth=0)
    for start, stop in trace.blind_spells():
        used["no reading"] = BLIND
        axes.axvspan(start, min(stop, end), facecolor=BLIND, linewidth=0)
    return used


def _rate(axes: Axes, steps: Sequence[Step], end: float) -> None:
    counts = [0] * (int(end) + 1)
    for step in steps:
        if 0 <= step.start <= end:
            counts[int(step.start)] += 1
    axes.fill_between(range(len(counts)), counts, step="post", color="#6aa84f", linewidth=0)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("steps / s")
    axes.set_xlabel("seconds")
