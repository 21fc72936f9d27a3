"""kv_append.h: a step's queries, keys and values are normalised, rotated, and written; keys and values into the cache.

Runs in: engine thread; owns: nothing.
"""

from collections.abc import Iterator, Sequence
from ctypes import Structure, c_float, c_int32, c_int64, c_uint64
from dataclasses import dataclass

import torch
from torch import Tensor

from edgekv.kernels.attn.gpu_layout import GpuCache, GpuKvFormat, GpuLayout
from edgekv.kernels.attn.kv_args import EkKv, cache_layouts, kv_args, kv_defines, row_stride
from edgekv.kernels.attn.kv_codec import encode, hadamard_rotated
from edgekv.kernels.common.prepared import Prepared, address_of, blocks_of
from edgekv.kernels.rt.registry import KernelSpec

THREADS = 128
_SIXTEEN_OF_A_LANE = (GpuKvFormat.E4M3, GpuKvFormat.INT8, GpuKvFormat.INT4)  # EK_KV_ELEMS; others have 8


class EkKvAppend(Structure):
    """The kernel's arguments."""

    _fields_ = (
        ("kv", EkKv),
        ("q", c_uint64),
        ("k", c_uint64),
        ("v", c_uint64),
        ("q_stride", c_int64),
        ("k_stride", c_int64),
        ("v_stride", c_int64),
        ("q_out", c_uint64),
        ("q_out_stride", c_int64),
        ("q_norm", c_uint64),
        ("k_norm", c_uint64),
        ("rope", c_uint64),
        ("rope_rows", c_uint64),
        ("positions", c_uint64),
        ("table_rows", c_uint64),
        ("block_table", c_uint64),
        ("tokens", c_int32),
        ("q_heads", c_int32),
        ("table_stride", c_int32),
        ("rope_dim", c_int32),
        ("hadamard", c_int32),
        ("eps", c_float),
    )


@dataclass(frozen=True, slots=True, eq=False)
class QkNorm:
    """RMSNorm of each head of queries and of keys: x / sqrt(mean x² + eps) · weight, [head_dim] float32 each."""

    q: Tensor
    k: Tensor
    eps: float


@dataclass(frozen=True, slots=True, eq=False)
class RopeTable:
    """Cosines and sines, `angles` [rows, 2, rope_dim / 2] float32, and the row of each token, [tokens] int32.

    `rows` None: token t has row t. The first rope_dim dimensions of a head are rotated, number i of their first half
    with number i of their second.
    """

    angles: Tensor
    rows: Tensor | None = None

    @property
    def rope_dim(self) -> int:
        """Dimensions that are rotated."""
        return 2 * self.angles.shape[2]


def spec(layout: GpuLayout, act: torch.dtype) -> KernelSpec:
    """For caches of this kind, and queries, keys and values of type `act`."""
    return KernelSpec("attn/kv_append.h", "ek_kv_append", THREADS, EkKvAppend, kv_defines(layout, act))


def variants() -> Iterator[KernelSpec]:
    """Those that stand for all in the compile matrix: each cache, and each width of activations."""
    for layout in cache_layouts():
        yield spec(layout, torch.float32 if layout.kv_format is GpuKvFormat.F32 else torch.bfloat16)
    for layout in cache_layouts(GpuKvFormat.INT4):
        yield spec(layout, torch.float16)


def rows_per_block(layout: GpuLayout) -> int:
    """EK_APPEND_ROWS: heads of tokens that a thread block has."""
    numbers = 16 if layout.kv_format in _SIXTEEN_OF_A_LANE else 8
    lanes = 1 << (layout.head_dim // numbers - 1).bit_length()
    return THREADS // max(2, lanes)


def prepare(
    cache: GpuCache,
    layer: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_out: Tensor,
    *,
    positions: Tensor,
    block_table: Tensor,
    table_rows: Tensor | None = None,
    norm: QkNorm | None = None,
    rope: RopeTable | None = None,
    hadamard: bool = False,
) -> Prepared:
    """Appends `k` and `v` to `layer` of the cache, and writes the queries to `q_out`.

    Args:
        cache: what to write to.
        layer: of it.
        q: [tokens, heads, head_dim], rows as `row_stride` takes them.
        k: [tokens, kv_heads, head_dim], likewise.
        v: the same.
        q_out: like `q`, and may be `q` itself.
        positions: [tokens] int32, on the device as what follows; a token at a position below 0 is none.
        block_table: [rows, blocks] int32.
        table_rows: [tokens] int32, the row of each token's sequence in `block_table`; None: token t has row t.
        norm: put over queries and keys first.
        rope: queries and keys are then rotated by this.
        hadamard: and by a Hadamard matrix.

    Raises ValueError for what does not fit together.
    """
    tokens, heads, head_dim = q.shape
    kv_shape = (tokens, cache.layout.num_kv_heads, cache.layout.head_dim)
    if k.shape != kv_shape or v.shape != kv_shape or head_dim != cache.layout.head_dim or q_out.shape != q.shape:
        shapes = ", ".join(str(list(each.shape)) for each in (q, k, v, q_out))
        raise ValueError(f"rows of {shapes} are none of a cache of {cache.layout}")
    if rope is not None and (rope.rope_dim > head_dim or not rope.angles.is_contiguous()):
        raise ValueError(f"angles of {tuple(rope.angles.shape)} rotate no heads of {head_dim}")
    args = EkKvAppend(
        kv_args(cache, layer),
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        row_stride(q),
        row_stride(k),
        row_stride(v),
        q_out.data_ptr(),
        row_stride(q_out),
        address_of(norm.q if norm else None),
        address_of(norm.k if norm else None),
        address_of(rope.angles if rope else None),
        address_of(rope.rows if rope else None),
        positions.data_ptr(),
        address_of(table_rows),
        block_table.data_ptr(),
        tokens,
        heads,
        block_table.stride(0),
        rope.rope_dim if rope else 0,
        hadamard,
        norm.eps if norm else 0.0,
    )
    rows = tokens * (heads + 2 * cache.layout.num_kv_heads)
    return Prepared(spec(cache.layout, q.dtype), (blocks_of(rows, rows_per_block(cache.layout)), 1, 1), args)


def reference(
    cache: GpuCache,
    layer: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    positions: Sequence[int],
    tables: Sequence[Sequence[int]],
    table_rows: Sequence[int] | None = None,
    norm: QkNorm | None = None,
    rope: RopeTable | None = None,
    hadamard: bool = False,
) -> Tensor:
    """Append likewise, and answer the queries in float32; those of tokens that are none as they were."""
    layout = cache.layout
    queries, keys = q.float(), k.float()
    if norm is not None:
        queries, keys = (_normalised(x, weight, norm.eps) for x, weight in ((queries, norm.q), (keys, norm.k)))
    if rope is not None:
        angles = rope.angles[: len(q)] if rope.rows is None else rope.angles[rope.rows.clamp(min=0)]
        queries, keys = _rotated(queries, angles), _rotated(keys, angles)
    if hadamard:
        queries, keys = hadamard_rotated(queries), hadamard_rotated(keys)
    key_codes, key_scales = encode(keys, layout.kv_format)
    value_codes, value_scales = encode(v.float(), layout.kv_format)
    for token, position in enumerate(positions):
        if position < 0:
            queries[token] = q[token]
            continue
        row = token if table_rows is None else table_rows[token]
        block = tables[row][position // layout.block_size]
        at = (block & (layout.segment_blocks - 1), slice(None), position % layout.block_size)
        segment = cache.segments[block >> layout.segment_shift]
        (rows_k, rows_v), (scales_k, scales_v) = layout.rows(segment, layer), layout.scales(segment, layer)
        rows_k[at], rows_v[at] = key_codes[token], value_codes[token]
        scales_k[at], scales_v[at] = key_scales[token], value_scales[token]
    return queries


def _normalised(rows: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps) * weight


def _rotated(rows: Tensor, angles: Tensor) -> Tensor:
    """Rows [tokens, heads, head_dim] by `angles` [tokens, 2, rope_dim / 2]."""
    half = angles.shape[2]
    cos, sin = angles.unsqueeze(1).unbind(2)  # [tokens, 1, half] each
    low, high, rest = torch.split(rows, [half, half, rows.shape[-1] - 2 * half], -1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin, rest), -1)
