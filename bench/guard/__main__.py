"""Play traces against the real server and print one table. See bench/traces/README.md.

    python -m bench.guard bench/traces/*.json [--json FILE] [--plots FOLDER] [--keep FOLDER]

Exit status 1 if any promise is broken, 2 if a trace cannot be read.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from bench.guard.play import play, undisturbed
from bench.guard.processes import NotServing
from bench.guard.report import Result, table
from bench.guard.trace import DEFAULT_CLIENTS, Trace, TraceError, load_trace


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.guard", description="Play traces of a device's memory against the real server."
    )
    parser.add_argument("traces", nargs="+", type=Path, metavar="FILE", help="traces; see bench/traces/README.md")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here as well")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write a picture of each trace here")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep each run's history and the server's log here")
    args = parser.parse_args()
    try:
        traces = [load_trace(path) for path in args.traces]
    except TraceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="guard-") as scratch:
        folder = args.keep or Path(scratch)
        try:
            results = play_all(traces, folder, args.plots)
        except NotServing as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    told = Console() if sys.stdout.isatty() else Console(width=200)
    told.print(table(results))
    broken = [f"{result.trace.name}: {promise}" for result in results for promise in result.broken()]
    for line in broken:
        told.print(f"[red]broken:[/] {line}", soft_wrap=True)
    for result in results:
        for fault in result.answers.faults:
            told.print(f"  {result.trace.name}: {fault}", soft_wrap=True, markup=False)
    if args.json is not None:
        args.json.write_text(json.dumps([result.as_json() for result in results], indent=2) + "\n", encoding="utf-8")
    return 1 if broken else 0


def play_all(traces: list[Trace], folder: Path, plots: Path | None) -> list[Result]:
    """Each in turn, with a bar that says where it is. Raises NotServing where not even undisturbed answers come."""
    says = TextColumn("{task.fields[says]}")
    columns = (TextColumn("{task.description:<16}"), BarColumn(), TimeRemainingColumn(), says)
    console = Console(stderr=True)
    results = []
    with Progress(*columns, console=console, transient=True) as bar:
        whole = bar.add_task("all traces", total=sum(trace.duration_s for trace in traces), says="")
        done_s = 0.0

        def show(at: float, words: str) -> None:
            bar.update(whole, completed=done_s + at, says=words)

        clients = max((trace.clients for trace in traces), default=DEFAULT_CLIENTS) or 1
        expected = undisturbed(_fresh(folder / "undisturbed"), clients, show)
        for index, trace in enumerate(traces):
            bar.update(whole, description=trace.name)
            picture = plots / f"{trace.name}.png" if plots is not None else None
            result = play(trace, expected, _fresh(folder / f"{index:02d}-{trace.name}"), show, picture)
            results.append(result)
            done_s += trace.duration_s
            verdict = "; ".join(result.broken()) or "kept"
            console.print(f"{trace.name}: {verdict}", markup=False, highlight=False, soft_wrap=True)
    return results


def _fresh(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


if __name__ == "__main__":
    sys.exit(main())
