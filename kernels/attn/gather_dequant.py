"""gather_dequant.h: whole contexts out of the paged cache, as torch's own attention takes them.

Runs in: engine thread; owns: nothing.
"""

from collections.abc import Iterator, Sequence
from ctypes import Structure, c_int32, c_int64, c_uint64

import torch
from torch import Tensor

from edgekv.kernels.attn.gpu_layout import GpuCache, GpuKvFormat, GpuLayout
from edgekv.kernels.attn.kv_args import EkKv, cache_layouts, kv_args, kv_defines
from edgekv.kernels.attn.kv_codec import decode
from edgekv.kernels.common.prepared import Prepared, address_of
from edgekv.kernels.rt.registry import KernelSpec

THREADS = 128


class EkGatherDequant(Structure):
    """The kernel's arguments."""

    _fields_ = (
        ("kv", EkKv),
        ("keys", c_uint64),
        ("values", c_uint64),
        ("block_table", c_uint64),
        ("contexts", c_uint64),
        ("begins", c_uint64),
        ("first_rows", c_uint64),
        ("row_stride", c_int64),
        ("head_stride", c_int64),
        ("table_stride", c_int32),
    )


def spec(layout: GpuLayout, act: torch.dtype) -> KernelSpec:
    """For caches of this kind; `act` is the type of what is written."""
    defines = kv_defines(layout, act)
    return KernelSpec("attn/gather_dequant.h", "ek_gather_dequant", THREADS, EkGatherDequant, defines)


def variants() -> Iterator[KernelSpec]:
    """Those that stand for all in the compile matrix: each cache, and each width of activations."""
    for layout in cache_layouts():
        yield spec(layout, torch.float32 if layout.kv_format is GpuKvFormat.F32 else torch.bfloat16)
    yield spec(next(cache_layouts(GpuKvFormat.INT4)), torch.float32)


def prepare(
    cache: GpuCache,
    layer: int,
    keys: Tensor,
    values: Tensor,
    *,
    block_table: Tensor,
    contexts: Tensor,
    first_rows: Tensor,
    max_blocks: int,
    begins: Tensor | None = None,
) -> Prepared:
    """Writes the tokens `begins` .. `contexts` - 1 of each sequence to rows `first_rows` .. of `keys` and `values`.

    Args:
        cache: what to read.
        layer: of it.
        keys: [kv_heads, rows, head_dim], dense in the last dimension; strides and type as those of `values`.
        values: the same.
        block_table: [sequences, blocks] int32, on the device as what follows.
        contexts: [sequences] int32, tokens of each.
        first_rows: [sequences] int32.
        max_blocks: the most blocks, at least 1, that any sequence has from the one of its first token on.
        begins: [sequences] int32; None is 0 for all.

    Raises ValueError for what does not fit together.
    """
    places = (keys.data_ptr(), values.data_ptr(), keys.stride(0) * keys.itemsize, keys.stride(1) * keys.itemsize)
    are_alike = keys.stride() == values.stride() and keys.shape == values.shape and keys.dtype == values.dtype
    if not are_alike or keys.stride(2) != 1 or any(place % 16 for place in places):
        raise ValueError(f"keys and values with strides {keys.stride()}, {values.stride()} cannot be written together")
    if (keys.shape[0], keys.shape[2]) != (cache.layout.num_kv_heads, cache.layout.head_dim) or max_blocks < 1:
        raise ValueError(f"{max_blocks} blocks of {cache.layout} do not come to keys of {list(keys.shape)}")
    args = EkGatherDequant(
        kv_args(cache, layer),
        keys.data_ptr(),
        values.data_ptr(),
        block_table.data_ptr(),
        contexts.data_ptr(),
        address_of(begins),
        first_rows.data_ptr(),
        keys.stride(1) * keys.itemsize,
        keys.stride(0) * keys.itemsize,
        block_table.stride(0),
    )
    grid = (max_blocks, cache.layout.num_kv_heads, len(contexts))
    return Prepared(spec(cache.layout, keys.dtype), grid, args)


def reference(
    cache: GpuCache, layer: int, table: Sequence[int], context: int, begin: int = 0
) -> tuple[Tensor, Tensor]:
    """Keys and values of one sequence's tokens `begin` .. `context` - 1, [tokens, kv_heads, head_dim] float32 each."""
    layout = cache.layout
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    for at in range(begin // layout.block_size, -(-context // layout.block_size)):
        segment = cache.segments[table[at] >> layout.segment_shift]
        slot = table[at] & (layout.segment_blocks - 1)
        first = at * layout.block_size
        tokens = slice(max(begin - first, 0), min(context - first, layout.block_size))
        pairs = zip(sides, layout.rows(segment, layer), layout.scales(segment, layer), strict=True)
        for side, rows, scales in pairs:
            side.append(decode(rows[slot][:, tokens], scales[slot][:, tokens], layout.kv_format).transpose(0, 1))
    if not sides[0]:
        nothing = torch.empty(0, layout.num_kv_heads, layout.head_dim, device=cache.table.device)
        return nothing, nothing
    return torch.cat(sides[0]), torch.cat(sides[1])
