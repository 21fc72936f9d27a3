"""What would make a model fit: every remedy is planned like the model itself, so its numbers hold.

Runs in: anywhere; owns: nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgekv.config.units import MIB, format_size
from edgekv.core.capacity import MemoryPlan
from edgekv.core.kv_format import KV_FORMATS, KVFormatName, context_need_bytes, plan_kv
from edgekv.engine.settings import EngineSettings, plan_engine

if TYPE_CHECKING:
    from edgekv.model.spec import ModelSpec

SHORTEST_CONTEXT = 256
QUANTISED_BITS = {"8-bit": 8.5, "4-bit": 4.5}  # of a weight, with a float16 scale for each 32


@dataclass(frozen=True, slots=True)
class Remedy:
    """One change: the options that make it (some have none) and what it brings. `is_here`: whether it can be made."""

    options: str
    brings: str
    fits: bool
    is_here: bool = True

    def __str__(self) -> str:
        return f"{self.options}: {self.brings}" if self.options else self.brings


def remedies(settings: EngineSettings, spec: "ModelSpec", result: MemoryPlan) -> list[Remedy]:
    """What helps, in the order of what costs least; nothing where the model fits."""
    return [] if result.fits else list(_each(settings, spec, result))


def _each(settings: EngineSettings, spec: "ModelSpec", result: MemoryPlan) -> Iterator[Remedy]:
    yield from _other_settings(settings, spec, result)
    longest = longest_context(settings, spec)
    if longest is not None:
        yield Remedy(f"--context {longest}", "the longest that fits as it is", True)
    if result.others_bytes:
        alone = replace(settings, place=replace(settings.place, free_bytes=result.total_bytes))
        if plan_engine(alone, spec)[1].fits:
            yield Remedy("", f"closing other programs, which hold {format_size(result.others_bytes)}, would do", True)
    yield from _planned(result, spec)


def _other_settings(settings: EngineSettings, spec: "ModelSpec", result: MemoryPlan) -> Iterator[Remedy]:
    if settings.draft is not None and result.draft is not None:
        less = format_size(result.draft.num_bytes)
        yield _tried("without --draft", f"{less} less", replace(settings, draft=None), spec)
    if result.kv_dtype == "float32":
        changed = replace(settings, kv_dtype="bfloat16")
        yield _tried("--kv-dtype bfloat16", "half the memory for each token", changed, spec)
    if result.dtype == "float32":
        less = format_size(result.weight_bytes - 2 * spec.num_parameters)
        yield _tried("--dtype bfloat16", f"{less} less for the weights", replace(settings, dtype="bfloat16"), spec)
    if settings.kv_budget is not None and not result.missing_bytes:
        need = context_need_bytes(
            spec, kv_format=result.kv_dtype, block_size=result.kv.block_size, context_tokens=result.context_tokens
        )
        room = result.kv.pool_bytes + result.free_bytes
        budget, brings = -(-need // MIB), "one request of the whole context"
        if result.free_bytes < 0:
            budget, brings = room // MIB, "all that there is room for"
        if need <= room:
            yield _tried(f"--kv-budget {budget}MiB", brings, replace(settings, kv_budget=budget * MIB), spec)


def _tried(options: str, brings: str, settings: EngineSettings, spec: "ModelSpec") -> Remedy:
    made = plan_engine(settings, spec)[1]
    if made.missing_bytes:
        return Remedy(options, f"{brings}; {format_size(made.missing_bytes)} would still be missing", False)
    if made.free_bytes < 0:
        over = format_size(-made.free_bytes)
        return Remedy(options, f"{brings}; the KV budget would still be {over} too much", False)
    brings += f"; the pool would hold {made.kv.pool_tokens:,} tokens"
    if made.fits:
        return Remedy(options, f"{brings}: it fits then", True)
    longest = longest_context(settings, spec)
    return Remedy(options, brings + (f": it fits with --context {longest} then" if longest else ""), False)


def longest_context(settings: EngineSettings, spec: "ModelSpec") -> int | None:
    """The longest context, in whole blocks, of which one request fits; None where that is too short to be of use."""
    size = settings.block_size
    low, high = SHORTEST_CONTEXT // size, (settings.context_tokens or spec.max_position_embeddings) // size
    found = None
    while low <= high:
        middle = (low + high) // 2
        if plan_engine(replace(settings, context_tokens=middle * size), spec)[1].fits:
            found, low = middle * size, middle + 1
        else:
            high = middle - 1
    return found


def _planned(result: MemoryPlan, spec: "ModelSpec") -> Iterator[Remedy]:
    """What this version cannot do yet, and how large a model it can do."""
    kv = result.kv
    if kv.num_blocks and not result.missing_bytes and result.free_bytes >= 0:
        plan = plan_kv(spec, kv_format="int8", block_size=kv.block_size, budget_bytes=kv.pool_bytes)
        brings = f"int8 KV (not available yet) would hold {plan.pool_tokens:,} tokens in the same memory"
        yield Remedy("", brings, plan.pool_tokens >= result.context_tokens, is_here=False)
    need = context_need_bytes(
        spec, kv_format=result.kv_dtype, block_size=kv.block_size, context_tokens=result.context_tokens
    )
    room = result.budget_bytes - (result.fixed_bytes - result.weight_bytes) - need
    for name, bits in QUANTISED_BITS.items():
        weights = int(spec.num_parameters * bits / 8)
        tokens = max(0, room + need - weights) // kv.block_bytes * kv.block_size
        if weights < result.weight_bytes and tokens:
            brings = f"{name} weights (not available yet) would take {format_size(weights)} and leave {tokens:,} tokens"
            yield Remedy("", brings, tokens >= result.context_tokens, is_here=False)
    if room > 0 and result.weight_bytes > room:
        each = result.weight_bytes / spec.num_parameters
        most = f"{room / each / 1e9:.1f} B parameters in {result.dtype}"
        yield Remedy("", f"a model of at most {most} leaves room for this context", True)


def kv_formats(result: MemoryPlan, spec: "ModelSpec") -> list[tuple[KVFormatName, int, int, bool]]:
    """Each format of keys and values: name, bytes a token, tokens in the pool's memory, whether it can be served."""
    rows: list[tuple[KVFormatName, int, int, bool]] = []
    for name, form in KV_FORMATS.items():
        kv = plan_kv(spec, kv_format=name, block_size=result.kv.block_size, budget_bytes=result.kv.pool_bytes)
        rows.append((name, kv.bytes_per_token, kv.pool_tokens, form.served))
    return rows
