"""prefill_paged.h: attention of chunks of new tokens to their paged contexts, by matrix units.

Runs in: engine thread; owns: nothing.
"""

import math
from collections.abc import Iterator, Sequence
from ctypes import Structure, c_float, c_int32, c_int64, c_uint64

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgekv.kernels.attn import gather_dequant
from edgekv.kernels.attn.gpu_layout import GpuCache, GpuKvFormat, GpuLayout
from edgekv.kernels.attn.kv_args import EkKv, cache_layouts, kv_args, kv_defines, row_stride
from edgekv.kernels.common.prepared import Prepared, address_of
from edgekv.kernels.rt.registry import KernelSpec

THREADS = 128
ROWS = 64  # of a thread block, query heads of one kv head counted each
LOG2E = math.log2(math.e)


class EkPrefillPaged(Structure):
    """The kernel's arguments."""

    _fields_ = (
        ("kv", EkKv),
        ("q", c_uint64),
        ("out", c_uint64),
        ("first_rows", c_uint64),
        ("lengths", c_uint64),
        ("tiles", c_uint64),
        ("contexts", c_uint64),
        ("block_table", c_uint64),
        ("sinks", c_uint64),
        ("q_stride", c_int64),
        ("out_stride", c_int64),
        ("table_stride", c_int32),
        ("group", c_int32),
        ("window", c_int32),
        ("q_scale", c_float),
        ("softcap", c_float),
        ("sequences", c_int32),
    )


def spec(layout: GpuLayout, act: torch.dtype, operands: torch.dtype | None = None) -> KernelSpec:
    """For caches of this kind, and queries and results of type `act`.

    `operands` is what is multiplied: float16 or bfloat16, as `act` if None. Turing has no matrix units for bfloat16,
    and gfx10.3 no dot product. Raises ValueError for float32, which the kernel does not have: decode_split attends to
    chunks of that, with `table_rows`.
    """
    operands = operands or act
    if torch.float32 in (act, operands) or layout.kv_format is GpuKvFormat.F32:
        raise ValueError("float32 is not what matrix units multiply")
    defines = kv_defines(layout, act) | {"EK_F16": int(operands == torch.float16)}
    return KernelSpec("attn/prefill_paged.h", "ek_prefill_paged", THREADS, EkPrefillPaged, defines)


def variants(operands: torch.dtype) -> Iterator[KernelSpec]:
    """Those that stand for all in the compile matrix: each cache but that of float32."""
    for layout in cache_layouts():
        if layout.kv_format is not GpuKvFormat.F32:
            yield spec(layout, operands)


def prepare(
    cache: GpuCache,
    layer: int,
    q: Tensor,
    out: Tensor,
    *,
    block_table: Tensor,
    first_rows: Tensor,
    lengths: Tensor,
    tiles: Tensor,
    contexts: Tensor,
    scale: float,
    operands: torch.dtype | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Prepared:
    """Attends.

    Args:
        cache: keys and values, those of the chunks with them. Keys that were rotated (int4) want queries that were.
        layer: of it.
        q: [tokens, heads, head_dim], rows as `row_stride` takes them.
        out: the same, written where a chunk is; not q itself.
        block_table: [sequences, blocks] int32, on the device as what follows.
        first_rows: [sequences] int32, where in `q` a sequence's chunk begins.
        lengths: [sequences] int32, the chunk's tokens; 0 where there is none.
        tiles: [sequences + 1] int32, as `count_tiles` counts them for each step.
        contexts: [sequences] int32, tokens, the chunk's with them.
        scale: of the products.
        operands: what is multiplied, as `spec` takes it.
        window: a query sees itself and the window - 1 tokens before it.
        softcap: scores s become softcap · tanh(s / softcap).
        sinks: [heads] float32, a score of each head that takes a share and has no value.

    Raises ValueError for what does not fit together.
    """
    kv_heads, tokens, sequences = cache.layout.num_kv_heads, len(q), len(contexts)
    group, rest = divmod(q.shape[1], kv_heads)
    if rest or q.shape[2] != cache.layout.head_dim or out.shape != q.shape:
        raise ValueError(f"queries {list(q.shape)} and results {list(out.shape)} are none of {cache.layout}")
    if tiles.shape != (sequences + 1,):
        raise ValueError(f"{len(tiles)} first tiles are none of {sequences} sequences")
    args = EkPrefillPaged(
        kv_args(cache, layer),
        q.data_ptr(),
        out.data_ptr(),
        first_rows.data_ptr(),
        lengths.data_ptr(),
        tiles.data_ptr(),
        contexts.data_ptr(),
        block_table.data_ptr(),
        address_of(sinks),
        row_stride(q),
        row_stride(out),
        block_table.stride(0),
        group,
        window or 0,
        scale * LOG2E if softcap is None else scale / softcap,
        0.0 if softcap is None else softcap * LOG2E,
        sequences,
    )
    most_tiles = tokens * group // ROWS + min(sequences, tokens)  # each chunk has one that is not full
    return Prepared(spec(cache.layout, q.dtype, operands), (most_tiles, kv_heads, 1), args)


def count_tiles(lengths: NDArray[np.int32], group: int, into: NDArray[np.int32]) -> None:
    """The first tile of rows of each chunk of `lengths` [sequences] tokens, and of how many, `into` [sequences + 1]."""
    into[0] = 0
    into[1:] = (-(-lengths * group // ROWS)).cumsum()


def reference(
    cache: GpuCache,
    layer: int,
    q: Tensor,
    tables: Sequence[Sequence[int]],
    first_rows: Sequence[int],
    lengths: Sequence[int],
    contexts: Sequence[int],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The results [tokens, heads, head_dim] in float32, from what the cache holds; NaN for tokens of no chunk."""
    out = torch.full(q.shape, torch.nan, device=q.device)
    for table, row, length, context in zip(tables, first_rows, lengths, contexts, strict=True):
        if not length:
            continue
        before = context - length
        first = 0 if window is None else max(0, before - window + 1)
        keys, values = gather_dequant.reference(cache, layer, table, context, first)
        group = q.shape[1] // keys.shape[1]
        queries = q[row : row + length].float().reshape(length, -1, group, q.shape[2])
        scores = torch.einsum("qhgd,thd->hgqt", queries, keys) * scale  # [kv_heads, group, length, tokens]
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        position = torch.arange(before, context, device=q.device).unsqueeze(1)
        token = torch.arange(first, context, device=q.device)
        seen = token <= position
        if window is not None:
            seen &= token > position - window
        scores = scores.masked_fill(~seen, -math.inf)
        if sinks is not None:
            shared = sinks.view(-1, group, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat((scores, shared), 3)
        weights = scores.softmax(-1)[..., : context - first]
        out[row : row + length] = torch.einsum("hgqt,thd->qhgd", weights, values).flatten(1, 2)
    return out
