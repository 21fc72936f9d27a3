"""How a plan looks: a bar and a table of owners, formats, the fastest it could be, and what would make it fit.

Runs in: the main thread; owns: nothing.
"""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from edgekv.cli.assumed import checkpoint_json, kind_sizes, missing_weights
from edgekv.cli.console import stdout, table
from edgekv.cli.draft_view import draft_cost, draft_json, draft_lines
from edgekv.cli.owners import WIDEST_BAR, Owned, owner_bar, owner_table
from edgekv.cli.remedies import OWN_KERNELS, kernels_have, kv_formats, remedies
from edgekv.config.units import format_size
from edgekv.core.draft_plan import DraftPlan
from edgekv.core.dtype_choice import DTYPE_BYTES
from edgekv.core.kv_format import KV_FORMATS, SCALE_BYTES
from edgekv.core.memory_plan import MemoryPlan
from edgekv.core.model_shape import WeightBytes, beyond_window_bytes, decode_read_bytes

if TYPE_CHECKING:
    from edgekv.cli.plan import Asked
    from edgekv.model.spec import ModelSpec


def print_plan(asked: "Asked", spec: "ModelSpec", reason: str, result: MemoryPlan) -> None:
    """The plan for a person."""
    console, place, kv = stdout(), asked.settings.place, result.kv
    parameters = f"{spec.num_parameters / 1e9:.3f} B parameters"
    console.print(f"[bold]{spec.architecture}[/], {parameters}, in {result.dtype} ({reason})", soft_wrap=True)
    free = f", {format_size(place.free_bytes)} free" if result.others_bytes else ""
    notes = "; ".join(note for note in (place.note, _of_card(asked)) if note)
    where = f"on {place.title}: {format_size(result.total_bytes)} in all{free}"
    console.print(where + (f" ({notes})" if notes else ""), soft_wrap=True)
    for told in (asked.table, *(() if asked.draft is None else (asked.draft.table,))):
        for line in missing_weights(told):
            console.print(line, soft_wrap=True)
    console.print()
    shares = plan_shares(asked, spec, result)
    console.print(owner_bar(shares, min(console.width, WIDEST_BAR)))
    console.print(owner_table(shares, result.total_bytes), soft_wrap=False)
    console.print()
    formula = f"2 × {spec.num_layers} layers × {spec.num_kv_heads} KV heads × {_head(spec, result)} bytes"
    console.print(f"one token: {kv.bytes_per_token:,} bytes ({format_size(kv.bytes_per_token)}) = {formula}")
    for line in kv.capacity_lines(result.context_tokens):
        console.print(line)
    if result.ceiling_blocks > kv.num_blocks:
        most = result.ceiling_blocks * kv.block_size
        console.print(f"It may grow to {most:,} tokens when other programs leave the card.")
    cost = draft_cost(asked.settings, spec, result, asked.table)
    for line in draft_lines(asked.settings, asked.draft, result, cost):
        console.print(line, soft_wrap=True)
    if asked.pinned_blocks:
        names = ", ".join(f"{name} {num_tokens:,} tokens" for name, num_tokens in asked.pinned.items())
        size = format_size(asked.pinned_blocks * kv.block_bytes)
        console.print(f"pinned: {escape(names)}; {size} of the pool", soft_wrap=True)
    if (note := window_note(spec, result)) is not None:
        console.print(note, soft_wrap=True)
    if kv.num_blocks:
        console.print()
        _print_formats(asked, spec, result)
        _print_speed(asked, spec, result)
    found = remedies(asked.settings, spec, result, asked.table, asked.draft)
    if not result.fits:
        console.print()
        console.print(f"[bold yellow]does not fit:[/] {_shortfall(result)}", soft_wrap=True)
        for remedy in found:
            mark = "[yellow]·[/]" if not remedy.fits else "[green]✓[/]" if remedy.is_here else "[dim]○[/]"
            console.print(f" {mark} {escape(str(remedy))}", soft_wrap=True)


def plan_shares(asked: "Asked", spec: "ModelSpec", result: MemoryPlan) -> list[Owned]:
    """Every byte of the device by owner, under the names of the ledger."""
    kv, draft, settings = result.kv, result.draft, asked.settings
    blocks = f"{kv.num_blocks:,} blocks of {kv.block_size} tokens in {len(kv.segments)} segments"
    usual = settings.place.reserve_bytes is None
    how = {
        "runtime": "interpreter and torch" if settings.place.kind == "cpu" else "driver's context, an estimate",
        "weights": _plain(spec, result) or _kinds(result.weights),
        "workspace": "scratch of one step, at most",
        "graphs": "captured decode steps, an estimate",
        "weights.draft": "" if draft is None else f"the draft, in {_draft_kinds(draft)}",
        "workspace.draft": "scratch of one of its steps, at most",
        "kv.draft": "" if draft is None else f"{draft.kv.pool_tokens:,} tokens of the draft in {draft.kv_dtype}",
        "kv.target": blocks,
    }
    leases = {"kv.target": 0} | result.leases
    order = [name for name in how if name in leases]
    shares = [Owned(name, leases[name], how[name]) for name in order]
    if result.free_bytes >= 0:
        shares.append(Owned("unused", result.free_bytes))
    if result.withheld_bytes:
        shares.append(Owned("withheld", result.withheld_bytes, "beyond vram_budget"))
    left = "left to others: 512 MiB or 6 %" if usual else "left to others: desktop_reserve"
    shares.append(Owned("headroom", result.headroom_bytes, left))
    if result.others_bytes:
        shares.append(Owned("others", result.others_bytes, "other programs now" if asked.is_here else "as asked"))
    return shares


def window_note(spec: "ModelSpec", result: MemoryPlan) -> str | None:
    """What layers with a window keep beyond it; None for models that have none, or contexts within it."""
    windows = sorted({window for window in spec.windows if window is not None})
    beyond = _beyond_window(spec, result)
    if not windows or not beyond:
        return None
    count = sum(window is not None for window in spec.windows)
    width = " or ".join(f"{window:,}" for window in windows)
    return (
        f"window: {count} of {spec.num_layers} layers look back {width} tokens; "
        f"of a full context {format_size(beyond)} lie behind that and are kept all the same"
    )


def fastest_decode(asked: "Asked", spec: "ModelSpec", result: MemoryPlan, context_tokens: int) -> float | None:
    """Tokens a second that one request could have at most; None where the bandwidth is not known."""
    if asked.card is None:
        return None
    read = decode_read_bytes(
        spec,
        weights=result.weights,
        kv_format=result.kv_dtype,
        block_size=result.kv.block_size,
        context_tokens=context_tokens,
    )
    return asked.card.bandwidth / read


def plan_json(asked: "Asked", spec: "ModelSpec", result: MemoryPlan) -> dict[str, Any]:
    """The plan for programs."""
    kv, place, card = result.kv, asked.settings.place, asked.card
    document = asdict(result)
    document["kv"] |= {
        "segments": len(kv.segments), "pool_tokens": kv.pool_tokens, "pool_bytes": kv.pool_bytes,
        "max_concurrency": round(kv.max_concurrency(result.context_tokens), 4),
        "ceiling_tokens": result.ceiling_blocks * kv.block_size,
        "beyond_window_bytes": _beyond_window(spec, result),
    }  # fmt: skip
    cost = draft_cost(asked.settings, spec, result, asked.table)
    document["draft"] = draft_json(asked.settings, asked.draft, result.draft, cost)
    return {
        "architecture": spec.architecture, "num_parameters": spec.num_parameters, "device": place.kind,
        "title": place.title, "checkpoint": checkpoint_json(asked.table),
        **document, "weight_bytes": result.weight_bytes,
        "budget_bytes": result.budget_bytes, "leases": result.leases,
        "withheld_bytes": result.withheld_bytes, "free_bytes": result.free_bytes,
        "missing_bytes": result.missing_bytes, "fits": result.fits,
        "kv_formats": [asdict(row) for row in kv_formats(asked.settings, result, spec)],
        "pinned": {
            "tokens": asked.pinned,
            "num_bytes": asked.pinned_blocks * kv.block_bytes,
        },
        "card": None if card is None else asdict(card),
        "decode_upper_bound_tokens_per_s": None if card is None else {
            "start_of_context": fastest_decode(asked, spec, result, 0),
            "end_of_context": fastest_decode(asked, spec, result, result.context_tokens),
        },
        "remedies": [asdict(remedy) for remedy in remedies(asked.settings, spec, result, asked.table, asked.draft)],
    }  # fmt: skip


def _print_formats(asked: "Asked", spec: "ModelSpec", result: MemoryPlan) -> None:
    rows = table("KV format", "a token", "tokens", f"of {result.context_tokens:,}", "")
    rows.columns[4].justify = "left"
    kind = asked.settings.place.kind
    own = OWN_KERNELS[kind] if kernels_have(asked.settings, spec) else "not for this model"
    for row in kv_formats(asked.settings, result, spec):
        lacking = own if kind in KV_FORMATS[row.name].engines else "on a card"
        is_planned = row.name == result.kv_dtype
        rows.add_row(
            row.name,
            format_size(row.bytes_per_token),
            f"{row.pool_tokens:,}",
            f"{row.pool_tokens / result.context_tokens:.2f}x",
            "← this plan" if is_planned else "" if row.served else lacking,
            style="bold" if is_planned else None if row.served else "dim",
        )
    stdout().print(rows)


def _print_speed(asked: "Asked", spec: "ModelSpec", result: MemoryPlan) -> None:
    first, last = (fastest_decode(asked, spec, result, tokens) for tokens in (0, result.context_tokens))
    if first is None or last is None or asked.card is None:
        return
    console = stdout()
    alone = "" if asked.settings.draft is None else ", without proposals"
    console.print()
    console.print(
        f"decode, one request{alone}: at most {first:,.0f} tokens/s, {last:,.0f} at the end of a full context: an "
        f"upper bound from the card's specification ({asked.card.bandwidth / 1e9:,.0f} GB/s ÷ the bytes that a "
        "token reads), not a measurement",
        soft_wrap=True,
    )


def _head(spec: "ModelSpec", result: MemoryPlan) -> str:
    """What a head takes of a token, but for what blocks are padded with."""
    kept = KV_FORMATS[result.kv_dtype]
    scales = {"none": "", "token": f" + {SCALE_BYTES} of a scale", "pair": f" + {2 * SCALE_BYTES} of scale and zero"}
    if not scales[kept.scales]:
        return f"{spec.head_dim} × {kept.bits // 8}"
    elements = f"{spec.head_dim}" if kept.bits == 8 else f"{spec.head_dim} × {kept.bits / 8:g}"
    return f"({elements}{scales[kept.scales]})"


def _plain(spec: "ModelSpec", result: MemoryPlan) -> str | None:
    if set(result.weights.kinds) != {result.dtype}:
        return None
    return f"{spec.num_parameters:,} × {DTYPE_BYTES[result.dtype]} bytes"


def _draft_kinds(draft: DraftPlan) -> str:
    return draft.dtype if set(draft.weights.kinds) == {draft.dtype} else _kinds(draft.weights)


def _kinds(weights: WeightBytes) -> str:
    """What weights are kept in, without norms and the like."""
    large = {name: num_bytes for name, num_bytes in weights.kinds.items() if 100 * num_bytes >= weights.total}
    return kind_sizes(large)


def _of_card(asked: "Asked") -> str:
    if asked.is_here or asked.card is None:
        return ""
    shared = ", shared with the machine" if asked.card.unified else ""
    return f"{asked.card.bandwidth / 1e9:,.0f} GB/s{shared}; as specified by {asked.card.source}"


def _shortfall(result: MemoryPlan) -> str:
    if result.missing_bytes:
        return f"the model needs {format_size(result.missing_bytes)} more than there is"
    if result.free_bytes < 0:
        asked, less = format_size(result.kv.pool_bytes), format_size(-result.free_bytes)
        return f"a KV pool of {asked} is {less} more than there is room for"
    return f"a request of {result.context_tokens:,} tokens needs more than the pool's {result.kv.pool_tokens:,}"


def _beyond_window(spec: "ModelSpec", result: MemoryPlan) -> int:
    return beyond_window_bytes(
        spec, kv_format=result.kv_dtype, block_size=result.kv.block_size, context_tokens=result.context_tokens
    )
