"""Rows as text while they come, and as a Markdown file in the end. Runs in: anywhere; owns: nothing.

Where times mean nothing (on fibers), no figure is shown.
"""

from collections.abc import Sequence

from bench.gpu.row import Row, Section, Target

_HEAD = ("median", "p10", "rate", "share", "target", "note")
_WIDTHS = (56, 11, 11, 14, 24, 22)


def heading(title: str) -> str:
    """Above a section's lines."""
    return "\n" + _line((title.upper(), *_HEAD))


def line(row: Row, *, has_times: bool) -> str:
    """One row, in columns."""
    if row.reason:
        return _line((row.name, f"not measured: {row.reason}"))
    return _line(_cells(row, has_times=has_times))


def markdown(sections: Sequence[Section], about: Sequence[str], command: str, *, has_times: bool) -> str:
    """A file of results."""
    text = [f"# {about[0].partition(',')[0]}: kernels and engine", "", *(f"- {each}" for each in about), ""]
    text += [f"`{command}`", ""]
    text += [
        "Medians, and the best tenth. Shares of read and of copy are of what was measured in this run; `x` is how many "
        "times as long the other takes. Targets: what is to be shipped / what is aimed at.",
    ]
    for section in sections:
        text += ["", f"## {section.title}", "", "| what | median | p10 | rate | share | target | note |"]
        text.append("|---|---:|---:|---:|---:|---|---|")
        for row in section.rows:
            cells = (row.name, *[""] * 5, f"not measured: {row.reason}")
            if not row.reason:
                cells = _cells(row, has_times=has_times)
            text.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(text) + "\n"


def _cells(row: Row, *, has_times: bool) -> tuple[str, ...]:
    if not has_times:
        return row.name, "-", "-", "-", "-", _aims(row.target), "ran"
    median = p10 = share = ""
    if row.times is not None:
        median, p10 = _seconds(row.times.median), _seconds(row.times.p10)
    if row.share is not None:
        share = f"{row.share:.2f} {row.of}"
    return row.name, median, p10, row.rate, share, f"{_aims(row.target)} {row.met}".strip(), row.note


def _aims(target: Target | None) -> str:
    if target is None:
        return ""
    if target.is_most:
        return f"<= {_seconds(target.ship)} / {_seconds(target.aim)}"
    return f">= {target.ship:.2f} / {target.aim:.2f}"


def _seconds(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1 or unit == "us":
            return f"{seconds * factor:,.2f} {unit}"
    raise AssertionError(seconds)


def _line(cells: Sequence[str]) -> str:
    padded = [cell.ljust(width) for cell, width in zip(cells, _WIDTHS, strict=False)]
    return " ".join([*padded, *cells[len(_WIDTHS) :]]).rstrip()
