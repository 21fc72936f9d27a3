"""Make the demo model: corpus, tokenizer, target, draft, manifest and report.

    PYTHONPATH=packaging .venv/bin/python -m demo_model.train                                # what is committed
    PYTHONPATH=packaging .venv/bin/python -m demo_model.train --steps 30 --out /tmp/short    # a quick look

Target and draft are trained side by side, each on one core. A run that was stopped goes on where it was.

Runs in: the process started by hand, which starts one for each model; owns: the output folder. With the default
flags the result is, byte for byte, what the repository holds (README.md says what that depends on).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import queue
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

from .steps import Progress

HERE = Path(__file__).resolve().parent
DEMO = HERE.parents[1] / "edgekv" / "demo"
NAMES = ("target", "draft")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="demo_model.train", description="Train the demo model bundled with edgekv.")
    parser.add_argument("--out", type=Path, default=DEMO, help="folder for target/ and draft/ (default: edgekv/demo)")
    parser.add_argument("--reports", type=Path, help="folder for SHA256SUMS and report.json (default: here, or OUT)")
    parser.add_argument("--work", type=Path, help="folder for checkpoints (default: OUT/.unfinished)")
    parser.add_argument("--only", choices=NAMES, help="train one model; run again without this flag to finish")
    parser.add_argument("--steps", type=int, help="train each model for this many steps instead of the full run")
    parser.add_argument("--no-samples", action="store_true", help="do not print sample answers at the end")
    return parser.parse_args()


def run_child(name: str, steps: int | None, out: Path, work: Path, reports: Queue[tuple[str, Progress]]) -> None:
    """The body of a training process."""
    from .build import build

    build(name, steps, out, work, lambda model, progress: reports.put((model, progress)))


def train_models(names: list[str], steps: int | None, out: Path, work: Path) -> None:
    """Train the models side by side and show how far they are. Raises SystemExit if one of them failed."""
    from rich.console import Console

    from .watch import Watch

    context = multiprocessing.get_context("spawn")
    reports: Queue[tuple[str, Progress]] = context.Queue()
    children = [context.Process(target=run_child, args=(name, steps, out, work, reports)) for name in names]
    for child in children:
        child.start()
    with Watch(Console()) as watch:
        while any(child.is_alive() for child in children) or not reports.empty():
            try:
                watch.after_step(*reports.get(timeout=0.5))
            except queue.Empty:
                continue
    if any(child.exitcode for child in children):
        raise SystemExit("training failed; what is finished is kept, and the same command goes on from there")


def finish(out: Path, work: Path, reports: Path) -> None:
    """Write the manifest and the report, and clear the work folder."""
    from .build import result_path
    from .export import manifest

    results: dict[str, Any] = {name: json.loads(result_path(work, name).read_text()) for name in NAMES}
    reports.mkdir(parents=True, exist_ok=True)
    sums = [f"# {name} corpus {results[name]['corpus_sha256']}" for name in NAMES]
    (reports / "SHA256SUMS").write_text("\n".join([*sums, manifest(out)]))
    (reports / "report.json").write_text(json.dumps(results, indent=2) + "\n")
    for name in NAMES:
        result_path(work, name).unlink()
    work.rmdir()


def print_samples(out: Path) -> None:
    """Greedy answers of both models."""
    from rich.console import Console

    from .samples import answers

    console = Console(highlight=False, markup=False)
    for name in NAMES:
        console.rule(name)
        for prompt, answer, ended in answers(out / name):
            console.print(f"> {prompt}\n{answer}{'' if ended else ' (cut off)'}\n")


def main() -> None:
    """The whole run."""
    args = arguments()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is loaded; kinder to other programs
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    out: Path = args.out
    work: Path = args.work or out / ".unfinished"
    names = [args.only] if args.only else [name for name in NAMES if not (work / f"{name}.json").exists()]
    if names:
        train_models(names, args.steps, out, work)
    if args.only:
        return
    finish(out, work, args.reports or (HERE if out == DEMO else out))
    print((args.reports or (HERE if out == DEMO else out)).joinpath("report.json").read_text())
    if not args.no_samples:
        print_samples(out)


if __name__ == "__main__":
    main()
