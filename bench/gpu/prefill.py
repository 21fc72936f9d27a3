"""Attention of chunks of prompts: by our own kernel and by gathering for torch's, against torch's over whole contexts.

Runs in: the main thread; owns: nothing.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.bench import Bench, Calls, NotMeasured
from bench.gpu.paged import PagedCache
from bench.gpu.row import Row, Target, Times, best, of_flops, ratio
from edgekv.kernels.attn import gather_dequant, prefill_paged
from edgekv.kernels.attn.gpu_layout import GpuKvFormat

GATHERED, OWN = Target(0.90, 0.95), Target(0.70, 0.90)
CALLS = 4  # timed together
_WAYS = ("grouped", "expanded")


def measure_prefill(bench: Bench, before: int, tokens: int) -> Iterator[Row]:
    """One sequence that has `before` tokens in the cache, and `tokens` new ones."""
    heads, context = bench.sizes.heads, before + tokens
    wide = GpuKvFormat.BF16 if bench.rig.card.has_bf16_units else GpuKvFormat.F16
    q = bench.normal(tokens, heads.queries, heads.dim)
    turned = q.transpose(0, 1).unsqueeze(0)  # [1, heads, tokens, dim]
    keys, values = (bench.normal(heads.keys, context, heads.dim) for _ in range(2))
    kept: list[object] = []
    caches: dict[GpuKvFormat, PagedCache] = {}

    def paged(kv_format: GpuKvFormat) -> PagedCache:
        if kv_format not in caches:
            caches[kv_format] = PagedCache(bench, kv_format, 1, context, layers=1)
        return caches[kv_format]

    def contiguous(way: str) -> Calls:
        sides = [_as_heads(side, heads.queries, way).contiguous() for side in (keys, values)]
        return [partial(_attend, turned, *sides, way)] * CALLS

    def own(kv_format: GpuKvFormat) -> Calls:
        return [_own(bench, paged(kv_format), q, before, kept)] * CALLS

    def gathered(kv_format: GpuKvFormat, way: str) -> Calls:
        gather = _gather(bench, paged(kv_format), kept)
        return [partial(_gather_and_attend, *gather, turned, heads.queries, way)] * CALLS

    works: dict[str, Callable[[], Calls]] = {f"contiguous {way}": partial(contiguous, way) for way in _WAYS}
    for kv_format in (wide, GpuKvFormat.INT8):
        works[f"paged {kv_format.name}"] = partial(own, kv_format)
        works |= {f"gathered {kv_format.name} {way}": partial(gathered, kv_format, way) for way in _WAYS}
    found = bench.compare(works)
    size = f"{tokens:,} after {before:,}"
    flops = 4 * heads.queries * heads.dim * (tokens * before + tokens * (tokens + 1) // 2)
    theirs = [found.times[name] for name in works if name.startswith("contiguous") and name in found.times]
    if not theirs:
        raise NotMeasured(next(iter(found.reasons.values())))
    flash = best(theirs)
    yield Row(
        f"{size}, SDPA, contiguous", flash, of_flops(flops, flash.median), bench.share_of_flops(flops, flash),
        "of a large product",
    )  # fmt: skip
    for kv_format in (wide, GpuKvFormat.INT8):
        for said, names, target in (
            ("prefill_paged", (f"paged {kv_format.name}",), OWN),
            ("gather and SDPA", tuple(f"gathered {kv_format.name} {way}" for way in _WAYS), GATHERED),
        ):
            title = f"{size}, {kv_format.name.lower()}, {said}"
            got = [found.times[name] for name in names if name in found.times]
            if not got:
                yield Row(title, reason=found.reasons[names[0]])
                continue
            times: Times = best(got)
            aimed = target if kv_format is wide else None
            yield Row(title, times, of_flops(flops, times.median), ratio(flash, times), "x contiguous", aimed)


def _as_heads(side: Tensor, heads: int, way: str) -> Tensor:
    """[1, kv_heads or heads, context, dim] of [kv_heads, context, dim]."""
    if way == "grouped":
        return side.unsqueeze(0)
    return side.repeat_interleave(heads // len(side), 0).unsqueeze(0)


def _attend(q: Tensor, keys: Tensor, values: Tensor, way: str) -> Tensor:
    """The new tokens are the last ones of the context."""
    options: dict[str, Any] = {"enable_gqa": True} if way == "grouped" else {}
    tokens, context = q.shape[2], keys.shape[2]
    if tokens == context:
        return F.scaled_dot_product_attention(q, keys, values, is_causal=True, **options)
    from torch.nn.attention.bias import causal_lower_right

    mask = causal_lower_right(tokens, context)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, **options)


def _own(bench: Bench, paged: PagedCache, q: Tensor, before: int, kept: list[object]) -> Callable[[], None]:
    out, (tokens, heads, dim) = torch.empty_like(q), q.shape
    counted = np.empty(2, np.int32)
    prefill_paged.count_tiles(np.array([tokens], np.int32), heads // paged.layout.num_kv_heads, counted)
    tiles = torch.from_numpy(counted).to(bench.device)
    numbers = [torch.tensor([each], dtype=torch.int32, device=bench.device) for each in (0, tokens, before + tokens)]
    kept += [out, numbers, tiles]
    return bench.launches(
        [
            prefill_paged.prepare(
                paged.cache, 0, q, out, block_table=paged.block_table, first_rows=numbers[0], lengths=numbers[1],
                tiles=tiles, contexts=numbers[2], scale=dim**-0.5,
            )
        ]
    )  # fmt: skip


def _gather(bench: Bench, paged: PagedCache, kept: list[object]) -> tuple[Callable[[], None], Tensor, Tensor]:
    """What gathers the context, and where it comes to: [kv_heads, context, dim] each."""
    heads = bench.sizes.heads
    keys, values = (bench.empty(heads.keys, paged.context, heads.dim) for _ in range(2))
    first = torch.zeros(1, dtype=torch.int32, device=bench.device)
    kept.append(first)
    launch = bench.launches(
        [
            gather_dequant.prepare(
                paged.cache, 0, keys, values, block_table=paged.block_table, contexts=paged.contexts,
                first_rows=first, max_blocks=paged.block_table.shape[1],
            )
        ]
    )  # fmt: skip
    return launch, keys, values


def _gather_and_attend(
    gather: Callable[[], None], keys: Tensor, values: Tensor, q: Tensor, heads: int, way: str
) -> Tensor:
    gather()
    return _attend(q, _as_heads(keys, heads, way), _as_heads(values, heads, way), way)
