"""`edgekv plan`: where every byte would go, before anything is loaded. Runs in: the main thread; owns: nothing."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from edgekv.cli.console import print_json, stdout, table
from edgekv.config.units import format_size, parse_size, parse_size_or_share

if TYPE_CHECKING:
    from edgekv.core.capacity import DtypeName, MemoryPlan
    from edgekv.model.spec import ModelSpec
    from edgekv.smi.device import Place


def plan(
    model: str = typer.Argument(..., help="A model folder (config.json is enough), or 'demo'."),
    context: int | None = typer.Option(None, min=1, help="Tokens of one request, prompt and answer together."),
    dtype: str = typer.Option("auto", help="What the weights are computed in: auto, float32, bfloat16, float16."),
    kv_dtype: str = typer.Option("auto", help="What keys and values are kept in; auto is the weights' dtype."),
    kv_budget: str | None = typer.Option(None, help="Memory for the KV pool, as 4GiB or 40%; by default chosen."),
    vram: str | None = typer.Option(None, help="Plan for a card with this much memory, as 16GiB."),
    device: str = typer.Option("auto", help="auto or cpu."),
    max_num_seqs: int = typer.Option(16, min=1, help="Sequences in one step."),
    as_json: bool = typer.Option(False, "--json", help="Print the plan as JSON."),
) -> None:
    """Say how many tokens of KV cache a model leaves room for, and where every byte goes."""
    from edgekv.cli.models import resolve_model
    from edgekv.core.capacity import DTYPE_BYTES
    from edgekv.engine.settings import EngineSettings, plan_engine
    from edgekv.model.hf_config import read_spec
    from edgekv.smi.device import Place, choose_place

    if device not in ("auto", "cpu"):
        raise typer.BadParameter("--device is auto or cpu")
    folder = resolve_model(model)
    spec = read_spec(folder)
    place = Place("card", "cuda:0", "a card", _size(vram)) if vram is not None else choose_place(device, {})
    settings = EngineSettings(
        folder=folder,
        place=place,
        dtype=_dtype("--dtype", dtype),
        kv_dtype=_dtype("--kv-dtype", kv_dtype),
        kv_budget=_budget(kv_budget),
        context_tokens=context,
        max_sequences=max_num_seqs,
    )
    choice, result = plan_engine(settings, spec)
    if as_json:
        print_json(_as_json(result, spec, place.kind))
    else:
        _print(result, spec, place, choice.reason, DTYPE_BYTES[result.kv_dtype])
    if not result.fits:
        raise typer.Exit(1)


def _print(result: "MemoryPlan", spec: "ModelSpec", place: "Place", reason: str, kv_dtype_bytes: int) -> None:
    console = stdout()
    console.print(
        f"[bold]{spec.architecture}[/], {spec.num_parameters / 1e9:.3f} B parameters, in {result.dtype} ({reason})"
    )
    where = "free on this machine" if place.kind == "cpu" else "free" if place.title != "a card" else "in all"
    note = f" ({place.note})" if place.note else ""
    console.print(f"on {place.title}: {format_size(result.total_bytes)} {where}{note}")
    console.print()
    shares = table("memory", "bytes", "", "")
    shares.columns[3].justify = "left"
    kv = result.kv
    each = result.weight_bytes // spec.num_parameters
    blocks = f"{kv.num_blocks:,} blocks of {kv.block_size} tokens in {len(kv.segments)} segments"
    rows = [
        ("weights", result.weight_bytes, f"{spec.num_parameters:,} × {each} bytes"),
        ("workspace", result.workspace_bytes, "scratch of one step, at most"),
        ("KV pool", kv.pool_bytes, blocks),
        ("headroom", result.headroom_bytes, "left to others: 512 MiB or 6 %"),
    ]
    if result.free_bytes >= 0:
        rows.append(("unused", result.free_bytes, ""))
    for name, num_bytes, how in rows:
        shares.add_row(name, f"{num_bytes:,}", format_size(num_bytes), how)
    console.print(shares)
    console.print()
    formula = f"2 × {spec.num_layers} layers × {spec.num_kv_heads} KV heads × {spec.head_dim} × {kv_dtype_bytes} bytes"
    console.print(f"one token: {kv.bytes_per_token:,} bytes ({format_size(kv.bytes_per_token)}) = {formula}")
    for line in kv.capacity_lines(result.context_tokens):
        console.print(line)
    if not result.fits:
        console.print()
        console.print(f"[yellow]does not fit:[/] {_remedy(result, spec)}", soft_wrap=True)


def _remedy(result: "MemoryPlan", spec: "ModelSpec") -> str:
    """What would make it fit, in the order of what costs least."""
    from edgekv.core.capacity import DTYPE_BYTES

    kv = result.kv
    if result.missing_bytes:
        lines = [f"the model needs {format_size(result.missing_bytes)} more than there is"]
        if DTYPE_BYTES[result.dtype] > 2:
            half = spec.num_parameters * 2
            lines.append(f"--dtype bfloat16 would take {format_size(result.weight_bytes - half)} off the weights")
        else:
            lines.append("use a smaller model or a card with more memory")
        return "; ".join(lines)
    lines = [f"a request of {result.context_tokens:,} tokens needs more than the pool's {kv.pool_tokens:,}"]
    if kv.pool_tokens:
        lines.append(f"--context {kv.pool_tokens} is the most that fits")
    if DTYPE_BYTES[result.kv_dtype] > 2:
        lines.append(f"--kv-dtype bfloat16 would hold {kv.pool_tokens * 2:,} tokens")
    spare = result.free_bytes // kv.block_bytes * kv.block_size
    if spare + kv.pool_tokens >= result.context_tokens:
        needed = -(-result.context_tokens // kv.block_size) * kv.block_bytes
        lines.append(f"--kv-budget {-(-needed // 2**20)}MiB would hold one such request")
    return "; ".join(lines)


def _as_json(result: "MemoryPlan", spec: "ModelSpec", device: str) -> dict[str, Any]:
    kv = result.kv
    document = asdict(result)
    document["kv"] |= {
        "segments": len(kv.segments), "pool_tokens": kv.pool_tokens, "pool_bytes": kv.pool_bytes,
        "max_concurrency": round(kv.max_concurrency(result.context_tokens), 4),
    }  # fmt: skip
    return {
        "architecture": spec.architecture, "num_parameters": spec.num_parameters, "device": device,
        **document, "free_bytes": result.free_bytes, "missing_bytes": result.missing_bytes, "fits": result.fits,
    }  # fmt: skip


def _dtype(option: str, name: str) -> "DtypeName | None":
    match name:
        case "auto":
            return None
        case "float32" | "bfloat16" | "float16":
            return name
    raise typer.BadParameter(f"{option} {name!r} is not one of auto, float32, bfloat16, float16")


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _budget(text: str | None) -> int | float | None:
    if text is None or text == "auto":
        return None
    try:
        value = parse_size_or_share(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return value if isinstance(value, int) else value.fraction
