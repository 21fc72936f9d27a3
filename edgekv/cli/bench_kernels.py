"""`edgekv bench kernels`: the CPU kernels by themselves. Runs in: the main thread; owns: the memory they work on.

A linear layer over few tokens and attention over a long context are as fast as memory is read: their rows say which
share of the read bandwidth, measured right before and after, they reach. Over many tokens arithmetic is what counts.
"""

import json
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from edgekv.cli.bench_engine import numbers, progress_on
from edgekv.cli.console import print_json, stdout, table
from edgekv.cli.percentile import percentile

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgekv.cli.bandwidth import ReadMeter
    from edgekv.engine.measure_kernels import AttentionCase, LinearCase
    from edgekv.kernels.cpu.program import Pool

FORMATS = "bf16,q8_0,q4_0,affine4_64,q4_K,q6_K"
SHAPES = "2048x2048,16384x2048,2048x8192,14336x4096"  # [outputs]x[inputs] of models of one and of eight billion
HEADS = "32/8x64,32/8x128"  # query heads / kv heads x head dim

CHUNK_TOKENS = 512


def bench_kernels(
    formats: str = typer.Option(FORMATS, help="How the weights are stored; '': no linear layers."),
    shapes: str = typer.Option(SHAPES, help="Outputs x inputs of linear layers."),
    tokens: str = typer.Option("1,8,16,512", help="Tokens in the step."),
    heads: str = typer.Option(HEADS, help="Query heads / kv heads x head dim of attention; '': none."),
    kv_dtypes: str = typer.Option("bfloat16,int8", help="Keys and values."),
    context: int = typer.Option(2048, min=2, help="Tokens of each sequence in attention."),
    batch: str = typer.Option("1,8,16", help="Sequences that decode at once."),
    torch: bool = typer.Option(True, help="Measure torch's path beside."),
    threads: int | None = typer.Option(None, min=1, help="By default as many as the server takes."),
    tier: str | None = typer.Option(None, help="An instruction set that is not the best, of those that run here."),
    as_json: bool = typer.Option(False, "--json", help="Print the result as JSON."),
    out: Path | None = typer.Option(None, help="Append the result to this file, one JSON object a line."),
) -> None:
    """Measure the CPU kernels against the memory's bandwidth and against torch."""
    sizes = [dimensions(text, "--shapes", 2) for text in shapes.split(",") if text]
    layers = [
        (query, kv, dim)
        for text in heads.split(",")
        if text
        for query, kv, dim in [dimensions(text.replace("/", "x"), "--heads", 3)]
    ]
    wanted = Wanted(
        formats=tuple(text for text in formats.split(",") if text),
        shapes=tuple(sizes),
        tokens=numbers(tokens, "--tokens"),
        layers=tuple(layers),
        kv_dtypes=tuple(text for text in kv_dtypes.split(",") if text),
        context=context,
        batches=numbers(batch, "--batch"),
    )
    result = measure(wanted, torch, threads, tier, progress_on(not as_json))
    if as_json:
        print_json(result)
    else:
        show(result)
    if out is not None:
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")


def dimensions(text: str, option: str, count: int) -> tuple[int, ...]:
    """So many numbers with an x between."""
    found = numbers(text.replace("x", ","), option)
    if len(found) != count:
        raise typer.BadParameter(f"{option}: {text!r} has {len(found)} numbers, not {count}")
    return found


@dataclass(frozen=True, slots=True)
class Wanted:
    """Every format with every shape and number of tokens, and every layer's attention with every kind of cache."""

    formats: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    tokens: tuple[int, ...]
    layers: tuple[tuple[int, int, int], ...]
    kv_dtypes: tuple[str, ...]
    context: int
    batches: tuple[int, ...]

    def linears(self) -> "list[LinearCase]":
        """Those whose columns are whole blocks. Raises BadParameter for a format that there is not."""
        from edgekv.engine.measure_kernels import LinearCase
        from edgekv.kernels.quant.encodings import ENCODINGS

        known(self.formats, ENCODINGS)
        return [
            LinearCase(name, rows, cols, count)
            for name in self.formats
            for rows, cols in self.shapes
            for count in self.tokens
            if cols % ENCODINGS[name].block_cols == 0
        ]

    def decodes(self) -> "list[AttentionCase]":
        """One more token of each of several sequences."""
        return [case for batch in self.batches for case in self._attentions(batch, self.context - 1, 1)]

    def prompts(self) -> "list[AttentionCase]":
        """A chunk of a prompt: its first, and its last."""
        chunk = min(CHUNK_TOKENS, self.context)
        starts = dict.fromkeys((0, self.context - chunk))
        return [case for start in starts for case in self._attentions(1, start, chunk)]

    def _attentions(self, batch: int, context: int, tokens: int) -> "list[AttentionCase]":
        from edgekv.engine.measure_kernels import AttentionCase
        from edgekv.kernels.cpu.cache import FORMATS as KV_FORMATS

        known(self.kv_dtypes, KV_FORMATS)
        shapes = [(kv_dtype, *layer) for layer in self.layers for kv_dtype in self.kv_dtypes]
        return [AttentionCase(*shape, batch, context, tokens) for shape in shapes]


def known(names: Sequence[str], there: Collection[str]) -> None:
    """Raises BadParameter for the first name that is not there."""
    for name in names:
        if name not in there:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(there)}")


def measure(
    wanted: Wanted, torch_too: bool, threads: int | None, tier: str | None, progress: "Callable[[str], None]"
) -> dict[str, Any]:
    """Every row. Raises KernelsUnavailable where there is no library."""
    from edgekv.cli.bandwidth import ReadMeter
    from edgekv.cli.machine import LoadWatch, machine_line
    from edgekv.kernels.cpu.formats import panel_format
    from edgekv.kernels.cpu.library import load_library
    from edgekv.kernels.cpu.program import Pool
    from edgekv.kernels.cpu.threads import default_threads
    from edgekv.kernels.quant.encodings import ENCODINGS

    linears, decodes, prompts = wanted.linears(), wanted.decodes(), wanted.prompts()
    watch = LoadWatch()
    pool = Pool(load_library(), threads or default_threads(), tier=tier)
    rows = _Rows(pool, ReadMeter(pool), torch_too, progress)
    result = {
        "machine": machine_line(),
        "kernels": f"native ({pool.tier}, {pool.threads} threads)",
        "linear": [{"panels": panel_format(ENCODINGS[case.encoding]).name, **rows.linear(case)} for case in linears],
        "attention_decode": [rows.attention(case) for case in decodes],
        "attention_prefill": [rows.attention(case) for case in prompts],
        "read_gb_s": round(max(rows.bandwidths, default=0.0) / 1e9, 2),
    }
    others = watch.read()
    return {
        **result, "others_cores": round(others.busy_cores, 2), "stolen_cores": round(others.stolen_cores, 2),
    }  # fmt: skip


class _Rows:
    """Measures the rows; torch's times of the same work are measured once."""

    def __init__(
        self, pool: "Pool", bandwidth: "ReadMeter", torch_too: bool, progress: "Callable[[str], None]"
    ) -> None:
        from edgekv.engine.measure_kernels import NativeKernels, TorchKernels

        self._native, self._torch = NativeKernels(pool), TorchKernels() if torch_too else None
        self._bandwidth, self._progress = bandwidth, progress
        self._torch_linear: dict[tuple[int, int, int], float] = {}
        self.bandwidths: list[float] = []

    def linear(self, case: "LinearCase") -> dict[str, Any]:
        """A linear layer."""
        self._progress(f"{case.encoding} {case.rows}x{case.cols}, {case.tokens} tokens")
        key = (case.rows, case.cols, case.tokens)
        if self._torch is not None and key not in self._torch_linear:
            self._torch_linear[key] = statistics.median(self._torch.linear(case))
        row = self._row(lambda: self._native.linear(case), case.num_bytes, case.flops, self._torch_linear.get(key))
        return {"encoding": case.encoding, "rows": case.rows, "cols": case.cols, "tokens": case.tokens, **row}

    def attention(self, case: "AttentionCase") -> dict[str, Any]:
        """Attention in one layer."""
        from edgekv.engine.measure_kernels import TORCH_DTYPES

        self._progress(f"attention {case}")
        torch_s = None
        if self._torch is not None and case.kv_dtype in TORCH_DTYPES:
            torch_s = statistics.median(self._torch.attention(case))
        row = self._row(lambda: self._native.attention(case), case.num_bytes, case.flops, torch_s)
        return {
            "kv_dtype": case.kv_dtype, "heads": case.heads, "kv_heads": case.kv_heads, "head_dim": case.head_dim,
            "batch": case.batch, "context": case.context, "tokens": case.tokens, **row,
        }  # fmt: skip

    def _row(
        self, run: "Callable[[], list[float]]", num_bytes: int, flops: int, torch_s: float | None
    ) -> dict[str, Any]:
        before = self._bandwidth.read()
        times = run()
        bandwidth = max(before, self._bandwidth.read())
        self.bandwidths.append(bandwidth)
        median, quick = percentile(times, 50) or 0.0, percentile(times, 10) or 0.0
        return {
            "us": {"p10": round(quick * 1e6, 3), "p50": round(median * 1e6, 3)},
            "calls": len(times),
            "bytes": num_bytes,
            "gb_s": round(num_bytes / median / 1e9, 2),
            "gflop_s": round(flops / median / 1e9, 1),
            "read_gb_s": round(bandwidth / 1e9, 2),
            "of_bandwidth": round(num_bytes / median / bandwidth, 3),
            "of_bandwidth_p10": round(num_bytes / quick / bandwidth, 3),
            "torch_us": None if torch_s is None else round(torch_s * 1e6, 1),
            "times_torch": None if torch_s is None else round(torch_s / median, 2),
        }


def show(result: dict[str, Any]) -> None:
    """For a person."""
    console = stdout()
    console.print(f"{result['kernels']}; memory reads {result['read_gb_s']:.1f} GB/s")
    console.print(result["machine"], style="dim")
    columns = ("us", "p10 us", "GB/s", "of bandwidth", "p10", "GFLOP/s", "torch us", "times faster")
    for name, what, label in (
        ("linear", "linear layer", _linear_label),
        ("attention_decode", "attention, decode", _attention_label),
        ("attention_prefill", "attention, prompts", _attention_label),
    ):
        if result[name]:
            rows = table(what, *columns)
            for row in result[name]:
                rows.add_row(label(row), *_cells(row))
            console.print(rows)
    others, stolen = result["others_cores"], result["stolen_cores"]
    console.print(f"meanwhile others used {others:.2f} cores, other virtual machines {stolen:.2f}")


def _linear_label(row: dict[str, Any]) -> str:
    return f"{row['encoding']} ({row['panels']}) {row['rows']}x{row['cols']}, {row['tokens']} tokens"


def _attention_label(row: dict[str, Any]) -> str:
    shape = f"{row['heads']}/{row['kv_heads']}x{row['head_dim']}"
    work = f"{row['batch']} x {row['context'] + 1}" if row["tokens"] == 1 else f"{row['tokens']} from {row['context']}"
    return f"{row['kv_dtype']} {shape}, {work}"


def _cells(row: dict[str, Any]) -> list[str]:
    torch_us, times = row["torch_us"], row["times_torch"]
    return [
        f"{row['us']['p50']:,.0f}", f"{row['us']['p10']:,.0f}", f"{row['gb_s']:.1f}", f"{row['of_bandwidth']:.0%}",
        f"{row['of_bandwidth_p10']:.0%}", f"{row['gflop_s']:,.0f}", "" if torch_us is None else f"{torch_us:,.0f}",
        "" if times is None else f"{times:.1f}",
    ]  # fmt: skip
