"""`edgekv bench engine`: the engine by itself, in this process. Runs in: the main thread; owns: the engine.

Each row of decoding says how many bytes its steps had to read (the weights once, the keys and values of every sequence
once), how fast these went by, and what share that is of the read bandwidth that was measured right before and after it.
"""

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer
from rich.markup import escape

from edgekv.cli.bench_speculation import Asked, asked_chats, encoded, measure_speculation, speculating
from edgekv.cli.console import print_json, stderr, stdout, table
from edgekv.cli.operation_times import Profile
from edgekv.cli.percentile import percentile
from edgekv.cli.speculation_view import show_speculation

if TYPE_CHECKING:
    from edgekv.cli.bandwidth import ReadMeter
    from edgekv.core.kv_format import KVDtypeName
    from edgekv.engine.assemble import Assembly
    from edgekv.engine.measure import EngineMeter, StepTime
    from edgekv.engine.settings import EngineSettings
    from edgekv.model.matrix_layout import WeightsName

T = TypeVar("T")

MARGIN_TOKENS = 64


def bench_engine(
    model: str = typer.Argument("demo", help="A model folder, a .gguf file, or 'demo'."),
    contexts: str = typer.Option("128,2048", help="Tokens behind each sequence where decoding is measured; '': none."),
    batch: str | None = typer.Option(
        None, help="Sequences that decode at once; by default 1,8,16, with --speculate 1,4,8."
    ),
    prefill: str = typer.Option("512,2048", help="Tokens of the prompts to measure; '': none."),
    weights: str = typer.Option("auto", help="auto, or what to quantise to: int8, int4."),
    kernels: str = typer.Option("auto", help="auto, native or torch."),
    kv_dtype: str = typer.Option("auto", help="Keys and values: auto, a dtype, int8, on a card fp8 or int4."),
    steps: int = typer.Option(32, min=1, help="Decoding steps of a sample."),
    repeat: int = typer.Option(3, min=1, help="Samples of each row, or rounds over the prompts."),
    step_tokens: int = typer.Option(512, min=16, help="The most tokens in a step: the size of a long prompt's chunks."),
    profile: bool = typer.Option(False, help="Also where the time of each row's steps went, by operation."),
    seed: int | None = typer.Option(None, help="Of random prompts and sampled answers; by default a new one."),
    speculate: bool = typer.Option(False, "--speculate", help="Instead: answers with and without speculation."),
    draft: str | None = typer.Option(
        None, help="With --speculate, who drafts: a model's path, 'demo' or 'ngram'; the demo model has its draft."
    ),
    prompts: Path | None = typer.Option(
        None, help="With --speculate, what to ask: a prompt a line, or a chat as JSON; the demo model has its own."
    ),
    fixed: str = typer.Option(
        "", help="With --speculate, also so many tokens always, whether or not it pays: 1,2,4,8."
    ),
    max_tokens: int = typer.Option(200, min=1, help="With --speculate, the longest answer."),
    warm_up: int = typer.Option(1, min=0, help="With --speculate, rounds before those that count."),
    label: str = typer.Option("", help="A name for the result."),
    as_json: bool = typer.Option(False, "--json", help="Print the result as JSON."),
    out: Path | None = typer.Option(None, help="Append the result to this file, one JSON object a line."),
) -> None:
    """Measure the engine itself, without HTTP: prompts and decoding against the memory's bandwidth."""
    progress = progress_on(not as_json)
    batches = numbers(batch or ("1,4,8" if speculate else "1,8,16"), "--batch")
    if not speculate and (draft is not None or prompts is not None or fixed):
        raise typer.BadParameter("--draft, --prompts and --fixed go with --speculate")
    name, settings = _settings(model, weights, kernels, kv_dtype, step_tokens)
    if speculate:
        from edgekv.config.settings import MAX_PROPOSED

        asked = Asked(batches, numbers(fixed, "--fixed", MAX_PROPOSED), max_tokens, warm_up, repeat, profile)
        settings = speculating(settings, draft)
        asked_of = encoded(settings, asked_chats(name, prompts, settings), max_tokens)
        longest = max(map(len, asked_of)) + max_tokens
        room = _with_room(settings, context=longest, tokens=max(batches) * (longest + MARGIN_TOKENS))
        room = replace(room, max_sequences=max(settings.max_sequences, *batches))
        found = measure_speculation(room, asked_of, asked, seed, progress)
    else:
        counts = (numbers(contexts, "--contexts"), batches, numbers(prefill, "--prefill"))
        wanted = Wanted(*counts, steps, repeat, profile)
        room = _with_room(settings, context=wanted.most_context, tokens=wanted.most_tokens)
        room = replace(room, max_sequences=max(batches, default=1), draft=None)
        found = measure(room, wanted, seed, progress)
    result = {"label": label, "model": model, "weights": weights, **found}
    if as_json:
        print_json(result)
    elif speculate:
        show_speculation(result)
    else:
        show(result)
    if out is not None:
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")


@dataclass(frozen=True, slots=True)
class Wanted:
    """The rows: every context with every batch, and the prompts; `repeat` samples of `steps` steps each."""

    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    prompts: tuple[int, ...]
    steps: int
    repeat: int
    profile: bool = False

    @property
    def most_context(self) -> int:
        """Tokens of the longest sequence."""
        longest = max((context + self.steps * self.repeat for context in self.contexts), default=0)
        return max(longest, *self.prompts, 1) + MARGIN_TOKENS

    @property
    def most_tokens(self) -> int:
        """Tokens that the KV pool must hold at once, with a block to spare for each sequence."""
        return max(self.batches, default=1) * (self.most_context + MARGIN_TOKENS)


def numbers(text: str, option: str, most: int | None = None) -> tuple[int, ...]:
    """Whole numbers from 1 to `most` with commas between."""
    try:
        found = tuple(int(word) for word in text.split(",") if word.strip())
    except ValueError:
        found = (0,)
    if any(number < 1 or (most is not None and number > most) for number in found):
        highest = "" if most is None else f" to {most}"
        raise typer.BadParameter(f"{option} takes numbers from 1{highest} with commas between, not {text!r}")
    return found


def chosen(known: Mapping[str, T], name: str, option: str) -> T:
    """What a name stands for."""
    if name not in known:
        raise typer.BadParameter(f"{option} is one of {', '.join(known)}, not {name!r}")
    return known[name]


def measure(
    settings: "EngineSettings", wanted: Wanted, seed: int | None, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Build the engine and measure every row."""
    import torch

    from edgekv.cli.bandwidth import read_meter
    from edgekv.cli.machine import LoadWatch, machine_line
    from edgekv.engine.assemble import assemble
    from edgekv.engine.card_runner import CardRunner
    from edgekv.engine.measure import EngineMeter
    from edgekv.errors import EdgeKVError
    from edgekv.model.native_lm import NativeLM

    watch = LoadWatch()
    progress("loading")
    begun = time.perf_counter()
    core, assembly = assemble(settings, lambda done, total, stage: None)
    load_s = time.perf_counter() - begun
    if isinstance(core.runner, CardRunner):
        raise EdgeKVError(
            "a card's engine works while Python does something else, so a stopwatch in Python tells nothing of it: "
            "use make bench-gpu, or --kernels torch for torch's engine on the card"
        )
    settle = None if assembly.place.torch_name == "cpu" else torch.cuda.synchronize
    meter = EngineMeter(core, time.time_ns() if seed is None else seed, settle)
    bandwidth = read_meter(assembly.place.torch_name, native=isinstance(meter.model, NativeLM))
    rows = _Rows(meter, assembly, bandwidth, progress)
    meter.prefill(min(max(wanted.prompts, default=16), settings.max_step_tokens))  # buffers grow with the first
    prompts = [rows.prompt(tokens, wanted.repeat) for tokens in wanted.prompts]
    decodes = [rows.decode(context, batch, wanted) for context in wanted.contexts for batch in wanted.batches]
    others = watch.read()
    return {
        "machine": machine_line(),
        "kernels": assembly.kernels,
        "dtype": assembly.dtype.name,
        "kv_dtype": assembly.memory.kv_dtype,
        "load_s": round(load_s, 2),
        "weight_bytes": rows.weight_bytes,
        "kv_token_bytes": rows.kv_token_bytes,
        "reading": rows.meter_title,
        "read_gb_s": round(max(rows.bandwidths) / 1e9, 2) if rows.bandwidths else None,
        "others_cores": round(others.busy_cores, 2),
        "stolen_cores": round(others.stolen_cores, 2),
        "prefill": prompts,
        "decode": decodes,
    }


class _Rows:
    """Measures the rows of one engine."""

    def __init__(
        self, meter: "EngineMeter", assembly: "Assembly", bandwidth: "ReadMeter", progress: Callable[[str], None]
    ) -> None:
        from edgekv.engine.measure import weight_bytes
        from edgekv.model.native_lm import NativeLM

        self._native = isinstance(meter.model, NativeLM)
        self._meter, self._spec, self._bandwidth, self._progress = meter, assembly.spec, bandwidth, progress
        self.weight_bytes = weight_bytes(meter.model, assembly.spec)
        self.kv_token_bytes = assembly.memory.kv.block_bytes / assembly.memory.kv.block_size
        self.meter_title = bandwidth.title
        self.bandwidths: list[float] = []

    def prompt(self, tokens: int, repeat: int) -> dict[str, Any]:
        """Prompts of so many tokens, one after the other."""
        from edgekv.engine.measure import prefill_flops

        self._progress(f"prefill {tokens}")
        times = [self._meter.prefill(tokens) for _ in range(repeat)]
        totals = [each.total_s for each in times]
        median = statistics.median(totals)
        return {
            "tokens": tokens,
            "tok_s": round(tokens / median, 2),
            "samples_tok_s": [round(tokens / total, 2) for total in totals],
            **_milliseconds("prompt_ms", totals),
            "gflop_s": round(prefill_flops(self._spec, tokens, native=self._native) / median / 1e9, 1),
            **_parts(times),
        }

    def decode(self, context: int, batch: int, wanted: Wanted) -> dict[str, Any]:
        """So many sequences after so many tokens."""
        from edgekv.engine.measure import kv_bytes

        self._progress(f"decode, context {context}, batch {batch}")
        before = self._bandwidth.read()
        profile = Profile(self._meter, wanted.profile)
        times = self._meter.decode(context, batch, wanted.steps * wanted.repeat, profile.start)
        bandwidth = max(before, self._bandwidth.read())
        self.bandwidths.append(bandwidth)
        totals = [step.total_s for step in times]
        samples = [sum(totals[i : i + wanted.steps]) for i in range(0, len(totals), wanted.steps)]
        mean_context = statistics.mean(step.context for step in times) / batch
        cache_bytes = kv_bytes(self._spec, self.kv_token_bytes, round(mean_context)) * batch
        num_bytes = self.weight_bytes + cache_bytes
        median = statistics.median(totals)
        return {
            "context": context,
            "batch": batch,
            "tok_s": round(batch * len(totals) / sum(totals), 2),
            "samples_tok_s": [round(batch * wanted.steps / sample, 2) for sample in samples],
            **_milliseconds("step_ms", totals),
            "bytes": num_bytes,
            "kv_bytes": cache_bytes,
            "gb_s": round(num_bytes / median / 1e9, 2),
            "read_gb_s": round(bandwidth / 1e9, 2),
            "of_bandwidth": round(num_bytes / median / bandwidth, 3),
            **_parts(times),
            **profile.read(len(totals), cache_bytes, bandwidth),
        }


def _settings(model: str, weights: str, kernels: str, kv_dtype: str, step_tokens: int) -> tuple[str, "EngineSettings"]:
    """As `serve` would build it, with the model's name."""
    from edgekv.cli.serve import served_model
    from edgekv.config.settings import Config

    formats: Mapping[str, WeightsName] = {"auto": "auto", "int8": "int8", "int4": "int4"}
    dtypes: Mapping[str, KVDtypeName | None] = {
        "auto": None, "float32": "float32", "bfloat16": "bfloat16", "float16": "float16",
        "int8": "int8", "fp8": "fp8", "int4": "int4",
    }  # fmt: skip
    natives: Mapping[str, bool | None] = {"auto": None, "native": True, "torch": False}
    name, _, settings = served_model(Config(), model)
    return name, replace(
        settings,
        weight_format=chosen(formats, weights, "--weights"),
        native=chosen(natives, kernels, "--kernels"),
        kv_dtype=chosen(dtypes, kv_dtype, "--kv-dtype"),
        max_step_tokens=step_tokens,
    )


def _with_room(settings: "EngineSettings", *, context: int, tokens: int) -> "EngineSettings":
    """With a KV pool that is just large enough for `tokens` at once, and sequences of `context` tokens."""
    from edgekv.model.hf_config import read_spec

    spec = read_spec(settings.folder)
    token_bytes = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * 4  # of the widest dtype
    context_tokens = min(context, spec.max_position_embeddings)
    return replace(settings, kv_budget=token_bytes * tokens, context_tokens=context_tokens)


def show(result: dict[str, Any]) -> None:
    """For a person."""
    console = stdout()
    kernels, loaded = f"{result['kernels']}, KV {result['kv_dtype']}", f"loaded in {result['load_s']} s"
    console.print(f"[bold]{escape(result['model'])}[/], {kernels}, {loaded}")
    console.print(result["machine"], style="dim")
    if result["prefill"]:
        prompts = table("prefill", "tokens/s", "ms", "p10 ms", "GFLOP/s", "outside the model")
        for row in result["prefill"]:
            prompts.add_row(
                f"{row['tokens']:,} tokens", f"{row['tok_s']:,.1f}", f"{row['prompt_ms']['p50']:,.1f}",
                f"{row['prompt_ms']['p10']:,.1f}", f"{row['gflop_s']:,.0f}", f"{row['overhead']:.1%}",
            )  # fmt: skip
        console.print(prompts)
    if result["decode"]:
        decodes = table(
            "decode", "batch", "tokens/s", "step ms", "p10 ms", "MB a step", "GB/s", "of bandwidth", "outside the model"
        )
        for row in result["decode"]:
            decodes.add_row(
                f"context {row['context']:,}", str(row["batch"]), f"{row['tok_s']:,.1f}",
                f"{row['step_ms']['p50']:,.2f}", f"{row['step_ms']['p10']:,.2f}", f"{row['bytes'] / 1e6:,.0f}",
                f"{row['gb_s']:,.1f}", f"{row['of_bandwidth']:.0%}", f"{row['overhead']:.1%}",
            )  # fmt: skip
        console.print(decodes)
        console.print(
            f"{result['weight_bytes'] / 1e6:,.0f} MB of weights and {result['kv_token_bytes'] / 1e3:,.1f} kB for each "
            f"token behind; memory reads {result['read_gb_s']:.1f} GB/s ({result['reading']})"
        )
    for row in result["decode"]:
        if "profile" in row:
            operations = table(f"context {row['context']:,}, batch {row['batch']}", "ms a step", "of bandwidth")
            for name, spent in row["profile"].items():
                share = spent["of_bandwidth"]
                operations.add_row(name, f"{spent['ms']:.3f}", "" if share is None else f"{share:.0%}")
            console.print(operations)
    others, stolen = result["others_cores"], result["stolen_cores"]
    console.print(f"meanwhile others used {others:.2f} cores, other virtual machines {stolen:.2f}")


def _parts(times: "Sequence[StepTime]") -> dict[str, Any]:
    """Microseconds of the parts of a step, medians, and the share of all time that was not the model's."""
    from edgekv.engine.measure import added

    names = ("plan_s", "prepare_s", "model_s", "sample_s", "report_s")
    return {
        "overhead": round(added(list(times)).overhead, 4),
        "parts_us": {
            name.removesuffix("_s"): round(statistics.median(getattr(each, name) for each in times) * 1e6, 1)
            for name in names
        },
    }


def _milliseconds(name: str, seconds: Sequence[float]) -> dict[str, Any]:
    found = {f"p{percent}": percentile(seconds, percent) for percent in (10, 50, 90)}
    return {name: {label: round((value or 0.0) * 1e3, 3) for label, value in found.items()}}


def progress_on(wanted: bool) -> Callable[[str], None]:
    """Tells a person at a terminal what is being measured."""
    console = stderr()

    def tell(text: str) -> None:
        if wanted and console.is_terminal:
            console.print(f"{text} ...", style="dim")

    return tell
