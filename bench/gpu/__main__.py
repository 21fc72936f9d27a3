"""Measure a card with edgekv's kernels and engine: `python -m bench.gpu` or `make bench-gpu`.

    python -m bench.gpu                 everything, in about four minutes; --limit says when to stop
    python -m bench.gpu --quick         fewer shapes and samples
    python -m bench.gpu --only decode   sections whose names begin so; bandwidth is always measured
    python -m bench.gpu --out           write bench/results/<date>-<card>.md as well
    python -m bench.gpu --on-host       run everything on fibers, with tiny shapes and no figures

Each figure is a share of what the card's own memory was found to do in the same run. What cannot be measured says why.
"""

import argparse
import datetime
import faulthandler
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from bench.gpu import bandwidth, decode, launches, linear, prefill, small
from bench.gpu.bench import Bench, NotMeasured, told
from bench.gpu.machine import describe, describe_load
from bench.gpu.rig import CardRig, HostRig, Rig
from bench.gpu.row import Row, Section
from bench.gpu.sizes import FULL, ON_HOST, QUICK, Sizes
from bench.gpu.table import heading, line, markdown

RESULTS = Path(__file__).parents[1] / "results"
LIMIT_S = 240.0
_GRACE_S = 60.0  # for what runs when the time is up
_LEAST_LEFT_S = 5.0

Measure = Callable[[Bench], Iterator[Row]]


@dataclass(frozen=True, slots=True)
class Planned:
    """A measurement, and what it is called where it comes to nothing."""

    name: str
    measure: Measure


def plan(bench: Bench) -> dict[str, list[Planned]]:
    """All of them by section; the first section is what the others are shares of."""
    sizes = bench.sizes
    large, small_layers = sizes.layers[0], [layer for layer in sizes.layers if layer[0] == "small"]
    return {
        "bandwidth": [
            Planned("read and copy", bandwidth.measure_bandwidth),
            Planned("product", bandwidth.measure_product),
        ],
        "launches": [Planned("launches", launches.measure_launches)],
        "decode attention": [
            *(
                Planned(f"{sequences} x {context:,}", partial(_of(decode.measure_decode), sequences, context))
                for sequences, context in sizes.contexts
            ),
            Planned("orders of layers and blocks", decode.measure_orders),
        ],
        "products of one token": [
            Planned(f"{kind} [{rows:,}, {cols:,}]", partial(_of(linear.measure_gemv), kind, rows, cols))
            for kind, rows, cols in sizes.layers
        ],
        "prefill attention": [
            Planned(f"{tokens:,} after {before:,}", partial(_of(prefill.measure_prefill), before, tokens))
            for before, tokens in sizes.chunks
        ],
        "end to end": _end_to_end(bench),
        "products of more": [
            *(
                Planned(f"[{rows:,}, {cols:,}]", partial(_of(linear.measure_batched), rows, cols))
                for _, rows, cols in (large, *small_layers[-1:])
            ),
            Planned("dequantised", partial(_of(linear.measure_dequant), *large[1:])),
        ],
        "small kernels": [
            Planned("norms, gates, turns", small.measure_fused),
            Planned("kv_append", small.measure_append),
        ],
        "sampler": [
            Planned(f"{rows} rows", partial(_of(small.measure_sampler), rows)) for rows in sizes.sampled
        ],
    }


def _end_to_end(bench: Bench) -> list[Planned]:
    """Whole models, which need what edgekv depends on."""
    try:
        from bench.gpu.end_to_end import measure_model, measure_transformers
        from bench.gpu.random_model import models
    except ImportError as error:
        return [Planned("whole models", partial(_fail, f"{error}"))]
    planned = []
    for made in models(bench):
        planned.append(Planned(made.title, partial(_of(measure_model), made)))
        planned.append(Planned(f"{made.title}, transformers", partial(_of(measure_transformers), made)))
    return planned


def _of(measure: Callable[..., Iterator[Row]]) -> Callable[..., Iterator[Row]]:
    """With the bench as the last argument, so that the others can be given before."""
    return lambda *arguments: measure(arguments[-1], *arguments[:-1])


def _fail(reason: str, bench: Bench) -> Iterator[Row]:
    raise NotMeasured(reason)


def run(bench: Bench, only: Sequence[str], tell: Callable[[str], None]) -> list[Section]:
    """Everything that was asked for, told as it comes."""
    sections = []
    for number, (title, planned) in enumerate(plan(bench).items()):
        if number and only and not any(title.startswith(name) for name in only):
            continue
        section = Section(title)
        sections.append(section)
        tell(heading(title))
        for each in planned:
            for row in measured(bench, each):
                section.rows.append(row)
                tell(line(row, has_times=bench.rig.is_real))
    return sections


def measured(bench: Bench, planned: Planned) -> Iterator[Row]:
    """The rows of one measurement; where it breaks off, a last one says why."""
    if bench.left_s < _LEAST_LEFT_S:
        yield Row(planned.name, reason="the time was up (--limit)")
        return
    try:
        with torch.inference_mode():
            yield from planned.measure(bench)
    except NotMeasured as reason:
        yield Row(planned.name, reason=str(reason))
    except Exception as error:
        # One kernel that does not compile or does not run must not keep the others from being measured.
        yield Row(planned.name, reason=told(error))


def fitted(sizes: Sizes, rig: Rig) -> Sizes:
    """No larger than the card's memory allows."""
    free = rig.free_bytes()
    return replace(
        sizes, arena_bytes=min(sizes.arena_bytes, free // 12), stream_bytes=min(sizes.stream_bytes, free // 4 & -4096)
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 1 where there is no card."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer shapes and samples")
    parser.add_argument("--only", nargs="+", default=[], metavar="SECTION", help="sections whose names begin so")
    parser.add_argument("--limit", type=float, default=LIMIT_S, metavar="S", help="begin nothing more after so long")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found there")
    parser.add_argument("--out", action="store_true", help=f"write {RESULTS.parent.name}/results/<date>-<card>.md")
    parser.add_argument("--on-host", action="store_true", help="on fibers, without figures: to see that it runs")
    options = parser.parse_args(arguments)
    if options.out and options.on_host:
        parser.error("--on-host measures nothing that could be written down")
    if not options.on_host and not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no card; --on-host runs everything without figures", file=sys.stderr)
        return 1
    rig: Rig = HostRig() if options.on_host else CardRig()
    sizes = ON_HOST if options.on_host else QUICK if options.quick else FULL
    bench = Bench(rig, fitted(sizes, rig), options.limit)
    begun = time.perf_counter()
    # A card that hangs must not keep whoever started this.
    faulthandler.dump_traceback_later(options.limit + _GRACE_S, exit=True)
    about = [*describe(rig), f"before: {describe_load(rig)}"]
    print("\n".join(about), flush=True)
    try:
        sections = run(bench, options.only, partial(print, flush=True))
    finally:
        faulthandler.cancel_dump_traceback_later()
    about.append(f"after: {describe_load(rig)}; it took {time.perf_counter() - begun:.0f} s")
    print(f"\n{about[-1]}")
    command = " ".join(("python -m bench.gpu", *(sys.argv[1:] if arguments is None else arguments)))
    if options.json is not None:
        found = [
            {"section": section.title, "rows": [row.document(has_times=rig.is_real) for row in section.rows]}
            for section in sections
        ]
        document = {"about": about, "command": command, "has_times": rig.is_real, "sections": found}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    if options.out:
        slug = re.sub(r"[^a-z0-9]+", "-", about[0].partition(",")[0].lower()).strip("-")
        file = RESULTS / f"{datetime.date.today().isoformat()}-{slug}.md"
        file.write_text(markdown(sections, about, command, has_times=rig.is_real))
        print(f"written: {file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
