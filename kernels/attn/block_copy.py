"""block_copy.h: blocks of the cache, or their first tokens, from one place to another.

Runs in: engine thread; owns: nothing.
"""

from collections.abc import Iterable, Iterator
from ctypes import Structure, c_int32, c_int64, c_uint64

from torch import Tensor

from edgekv.kernels.attn.gpu_layout import GpuCache, GpuLayout
from edgekv.kernels.common.prepared import Prepared, blocks_of
from edgekv.kernels.rt.registry import KernelSpec

THREADS = 256
CHUNK_BYTES = THREADS * 4 * 16  # what a thread block has under way


class EkCopyPlace(Structure):
    """Where blocks are copied from or to."""

    _fields_ = (
        ("seg", c_uint64),
        ("slot_stride", c_int64),
        ("layer_stride", c_int64),
        ("seg_shift", c_int64),
    )


class EkBlockCopy(Structure):
    """The kernel's arguments."""

    _fields_ = (
        ("source", EkCopyPlace),
        ("target", EkCopyPlace),
        ("copies", c_uint64),
        ("plane_bytes", c_int32),
        ("scale_plane_bytes", c_int32),
        ("head_bytes", c_int32),
        ("scale_head_bytes", c_int32),
        ("token_bytes", c_int32),
        ("scale_token_bytes", c_int32),
        ("kv_heads", c_int32),
        ("chunks", c_int32),
    )


def spec() -> KernelSpec:
    """One kernel for caches of all kinds."""
    return KernelSpec("attn/block_copy.h", "ek_block_copy", THREADS, EkBlockCopy)


def variants() -> Iterator[KernelSpec]:
    """Those that stand for all in the compile matrix."""
    yield spec()


def prepare(source: GpuCache, target: GpuCache, copies: Tensor) -> Prepared:
    """Copies from blocks of `source`, all layers of them, to blocks of `target`, which may be the same cache.

    `copies` [room, 3] int32 is on the device: a source block, a target block, and how many of the first tokens are
    copied, up to a whole block; a source of -1 is none. What else the target holds stays as it is. All are made at
    once: no block may be written twice, or read as well as written.

    The two caches may differ in order and in segments. Raises ValueError for blocks of different shapes.
    """
    layout = source.layout
    if _shape(layout) != _shape(target.layout):
        raise ValueError(f"blocks of {layout} are none of {target.layout}")
    row_bytes = 2 * layout.num_kv_heads * layout.block_size * layout.row_bytes
    chunks = blocks_of(row_bytes, CHUNK_BYTES)
    args = EkBlockCopy(
        _place(source),
        _place(target),
        copies.data_ptr(),
        layout.plane_bytes,
        layout.scale_plane_bytes,
        layout.block_size * layout.row_bytes,
        layout.block_size * layout.scale_bytes,
        layout.row_bytes,
        layout.scale_bytes,
        layout.num_kv_heads,
        chunks,
    )
    return Prepared(spec(), (len(copies), layout.num_layers, chunks), args)


def reference(source: GpuCache, target: GpuCache, copies: Iterable[tuple[int, int, int]]) -> None:
    """The same, one block, layer and plane after the other."""
    for from_block, to_block, tokens in copies:
        if from_block < 0:
            continue
        for layer in range(source.layout.num_layers):
            for read, written in zip(
                _planes(source, from_block, layer), _planes(target, to_block, layer), strict=True
            ):
                written[:, :tokens] = read[:, :tokens]


def _shape(layout: GpuLayout) -> tuple[int, ...]:
    """What blocks have to have in common."""
    return layout.kv_format, layout.num_layers, layout.num_kv_heads, layout.head_dim, layout.block_size


def _place(cache: GpuCache) -> EkCopyPlace:
    layout = cache.layout
    return EkCopyPlace(cache.table.data_ptr(), layout.slot_stride, layout.layer_stride, layout.segment_shift)


def _planes(cache: GpuCache, block: int, layer: int) -> tuple[Tensor, ...]:
    """What a layer keeps of a block: four views [kv_heads, block_size, ...]."""
    layout = cache.layout
    segment, slot = cache.segments[block >> layout.segment_shift], block & (layout.segment_blocks - 1)
    return tuple(side[slot] for side in (*layout.rows(segment, layer), *layout.scales(segment, layer)))
