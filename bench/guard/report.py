"""What a person is shown of played traces: one table, and what was broken. Runs in: anywhere; owns: nothing."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from bench.guard.measure import Answers, Figures
from bench.guard.trace import Trace

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Result:
    """One played trace. `fault` says why it could not be played to its end."""

    trace: Trace
    figures: Figures | None
    answers: Answers
    fault: str | None = None

    def broken(self) -> Iterator[str]:
        """Each promise that was not kept, in words with numbers."""
        if self.fault is not None:
            yield self.fault
        answers, figures = self.answers, self.figures
        if answers.lost:
            yield f"{answers.lost} requests lost"
        if answers.changed:
            yield f"{answers.changed} answers changed"
        if self.trace.clients and not answers.finished:
            yield "no request was finished"
        if figures is None:
            return
        if figures.spilled_steps:
            yield f"{figures.spilled_steps} steps ran with up to {_mib(figures.spilled_bytes)} spilled"
        if figures.lag_s > figures.lag_allowed_s:
            yield f"given back after {_ms(figures.lag_s)}, at most {_ms(figures.lag_allowed_s)} promised"
        if figures.reversals > figures.reversals_allowed:
            yield f"{figures.reversals} growths soon given back, at most {figures.reversals_allowed} can be forced"
        if figures.hasty_growths:
            yield f"{figures.hasty_growths} times grown again right after giving back"
        if figures.reached_bytes > 0:
            yield f"grew {_mib(figures.reached_bytes)} into others' room"

    def as_json(self) -> dict[str, Any]:
        """For other programs."""
        return {
            "trace": self.trace.name,
            "vendor": self.trace.vendor,
            "duration_s": self.trace.duration_s,
            "clients": self.trace.clients,
            "figures": None if self.figures is None else asdict(self.figures),
            "answers": asdict(self.answers),
            "broken": list(self.broken()),
        }


def table(results: Sequence[Result]) -> Table:
    """A row a trace; what breaks a promise is red."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    made.add_column("trace", no_wrap=True)
    columns = (
        "spilled\nat a step", "lost", "changed", "given back\nafter ms", "allowed", "rever-\nsals", "allowed",
        "hasty", "into others'\nroom MiB", "others\ndenied ms", "pool of\nideal %", "steps", "longest\nms",
        "longest\npause s", "answers", "told to\nwait",
    )  # fmt: skip
    for column in columns:
        made.add_column(column, justify="right", no_wrap=True)
    made.add_column("")
    for result in results:
        made.add_row(*_row(result))
    return made


def _row(result: Result) -> list[str]:
    answers, figures = result.answers, result.figures
    verdict = "[red]broken[/]" if any(result.broken()) else "[green]kept[/]"
    if figures is None:
        return [result.trace.name, "", _red(answers.lost), _red(answers.changed), *[""] * 11, "", "", verdict]
    over = figures.lag_s > figures.lag_allowed_s
    return [
        result.trace.name,
        _red(round(figures.spilled_bytes / MIB)),
        _red(answers.lost),
        _red(answers.changed),
        _red(round(1000 * figures.lag_s), over),
        str(round(1000 * figures.lag_allowed_s)),
        _red(figures.reversals, figures.reversals > figures.reversals_allowed),
        str(figures.reversals_allowed),
        _red(figures.hasty_growths),
        _red(round(figures.reached_bytes / MIB)),
        str(round(1000 * figures.denied_s)),
        str(round(100 * figures.share_of_ideal)),
        f"{figures.steps:,}",
        str(round(1000 * figures.longest_step_s)),
        f"{figures.longest_pause_s:.1f}",
        str(answers.finished),
        str(answers.refused),
        verdict,
    ]


def _red(number: int, is_bad: bool | None = None) -> str:
    bad = number > 0 if is_bad is None else is_bad
    return f"[red]{number}[/]" if bad else str(number)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / MIB:,.0f} MiB"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.0f} ms"
