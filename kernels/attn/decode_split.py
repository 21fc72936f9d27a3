"""decode_split.h: attention of queries to their paged contexts, cut into parts that lse_merge puts together.

Runs in: engine thread; owns: nothing.
"""

import math
from collections.abc import Iterator, Sequence
from ctypes import Structure, c_float, c_int32, c_int64, c_uint64

import torch
from torch import Tensor

from edgekv.kernels.attn import gather_dequant
from edgekv.kernels.attn.gpu_layout import GpuCache, GpuKvFormat, GpuLayout
from edgekv.kernels.attn.kv_args import EkKv, cache_layouts, kv_args, kv_defines, row_stride
from edgekv.kernels.attn.splits import Parts
from edgekv.kernels.common.prepared import Prepared, address_of
from edgekv.kernels.rt.registry import KernelSpec

LOG2E = math.log2(math.e)
MOST_GROUP = 16
MOST_PARTS = 65535  # the second dimension of a grid


class EkDecodeSplit(Structure):
    """The kernel's arguments."""

    _fields_ = (
        ("kv", EkKv),
        ("q", c_uint64),
        ("out", c_uint64),
        ("block_table", c_uint64),
        ("table_rows", c_uint64),
        ("contexts", c_uint64),
        ("begins", c_uint64),
        ("sinks", c_uint64),
        ("cut", c_uint64),
        ("slots", c_uint64),
        ("part_values", c_uint64),
        ("part_states", c_uint64),
        ("q_stride", c_int64),
        ("queries", c_int32),
        ("table_stride", c_int32),
        ("window", c_int32),
        ("always_parts", c_int32),
        ("q_scale", c_float),
        ("softcap", c_float),
    )


def spec(layout: GpuLayout, group: int, act: torch.dtype) -> KernelSpec:
    """For caches of this kind, `group` query heads to a kv head, and queries and results of type `act`.

    Raises ValueError for a group that the kernel does not have.
    """
    if not 1 <= group <= MOST_GROUP:
        raise ValueError(f"{group} query heads of a kv head are not 1 to {MOST_GROUP}")
    sets = -(-group // 4)  # of warps; each set has up to four heads
    warps = sets * {1: 4, 2: 2}.get(sets, 1)
    defines = kv_defines(layout, act) | {"EK_G": group}
    return KernelSpec("attn/decode_split.h", "ek_decode_split", 32 * warps, EkDecodeSplit, defines)


def variants() -> Iterator[KernelSpec]:
    """Those that stand for all in the compile matrix: each cache, and each number of heads that a warp can have."""
    for layout in cache_layouts():
        yield spec(layout, 4, torch.float32 if layout.kv_format is GpuKvFormat.F32 else torch.bfloat16)
    for kv_format in (GpuKvFormat.BF16, GpuKvFormat.INT8):
        layout = next(cache_layouts(kv_format))
        for group in (1, 6, 8, 16):
            yield spec(layout, group, torch.bfloat16)
    yield spec(next(cache_layouts(GpuKvFormat.F16)), 4, torch.float16)


def prepare(
    cache: GpuCache,
    layer: int,
    q: Tensor,
    out: Tensor,
    *,
    block_table: Tensor,
    contexts: Tensor,
    scale: float,
    cut: Tensor | None = None,
    parts: Parts | None = None,
    slots: Tensor | None = None,
    table_rows: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    begins: Tensor | None = None,
    always_parts: bool = False,
) -> Prepared:
    """Attends. What a context of one part comes to is written to `out`, that of more to `parts`, for lse_merge.

    Args:
        cache: keys and values, those of the queries' own tokens with them.
        layer: of it.
        q: [queries, heads, head_dim], rows as `row_stride` takes them; up to 65,535.
        out: [queries, heads, head_dim], contiguous, not `q`.
        block_table: [rows, blocks] int32, on the device as what follows.
        contexts: [queries] int32, tokens; a query with 0 is none, and its result is 0.
        scale: of the products.
        cut: [queries + 2] int32, as `Splits.cut` counts it for each step; None: no context is cut.
        parts: room for all parts that a cut ever has; None without one.
        slots: [queries] int32, where the parts of a query go, one behind the other; None: as the cut counts them.
        table_rows: [queries] int32, the row of each query in `block_table`; None: query i has row i. The tokens of a
            chunk are attended to with one row for all, and contexts of each position + 1.
        window: a query sees itself and the window - 1 tokens before it.
        softcap: scores s become softcap · tanh(s / softcap).
        sinks: [heads] float32, a score of each head that takes a share and has no value. Where a context is not whole
            (`always_parts`), they are lse_merge's.
        begins: [queries] int32, tokens before these are not seen here; None is 0 for all.
        always_parts: write to `parts` even what is whole.

    Raises ValueError for what does not fit together.
    """
    queries, heads, head_dim = q.shape
    group, rest = divmod(heads, cache.layout.num_kv_heads)
    if rest or head_dim != cache.layout.head_dim or out.shape != q.shape or not out.is_contiguous():
        raise ValueError(f"queries {list(q.shape)} and results {list(out.shape)} are none of {cache.layout}")
    blocks = queries if parts is None else parts.slots
    if blocks > MOST_PARTS:
        raise ValueError(f"{blocks:,} parts are more than a grid has rows")
    if (parts is None) != (cut is None) or (always_parts and parts is None):
        raise ValueError("parts need a cut and room")
    if cut is not None and cut.shape != (queries + 2,):
        raise ValueError(f"a cut of {len(cut)} numbers is none of {queries} queries")
    if parts is not None and (parts.values.shape[1:] != (heads, head_dim) or parts.slots < queries):
        raise ValueError(f"parts of {tuple(parts.values.shape)} have no room for {queries} queries of {heads} heads")
    args = EkDecodeSplit(
        kv_args(cache, layer),
        q.data_ptr(),
        out.data_ptr(),
        block_table.data_ptr(),
        address_of(table_rows),
        contexts.data_ptr(),
        address_of(begins),
        address_of(sinks),
        address_of(cut),
        address_of(slots),
        0 if parts is None else parts.values.data_ptr(),
        0 if parts is None else parts.states.data_ptr(),
        row_stride(q),
        queries,
        block_table.stride(0),
        window or 0,
        always_parts,
        scale * LOG2E if softcap is None else scale / softcap,
        0.0 if softcap is None else softcap * LOG2E,
    )
    return Prepared(spec(cache.layout, group, q.dtype), (cache.layout.num_kv_heads, blocks, 1), args)


def reference(
    cache: GpuCache,
    layer: int,
    q: Tensor,
    tables: Sequence[Sequence[int]],
    contexts: Sequence[int],
    *,
    scale: float,
    table_rows: Sequence[int] | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    begins: Sequence[int] | None = None,
) -> Tensor:
    """The results [queries, heads, head_dim] in float32, from what the cache holds."""
    out = torch.zeros(q.shape, device=q.device)
    for i, context in enumerate(contexts):
        table = tables[i if table_rows is None else table_rows[i]]
        begin = 0 if begins is None else begins[i]
        first = begin if window is None else max(begin, context - window)
        if first >= context:
            continue
        keys, values = gather_dequant.reference(cache, layer, table, context, first)
        group = q.shape[1] // keys.shape[1]
        queries = q[i].float().reshape(-1, group, q.shape[2])  # [kv_heads, group, head_dim]
        scores = torch.einsum("hgd,thd->hgt", queries, keys) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if sinks is not None:
            scores = torch.cat((scores, sinks.view(-1, group, 1)), 2)
        weights = scores.softmax(-1)[..., : context - first]
        out[i] = torch.einsum("hgt,thd->hgd", weights, values).flatten(0, 1)
    return out
