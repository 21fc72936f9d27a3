"""Where keys and values lie on the card: segments of blocks, and the strides that kernels are launched with.

A segment is one allocation of 2^s blocks, and block id = segment << s | slot. What one layer keeps of one block is

    K         [kv_heads][block_size][head_dim], in the cache's format
    V         the same
    K scales  int8: [kv_heads][block_size] float16; int4: [kv_heads][block_size] { float16 scale, float16 zero }
    V scales  the same

and each of these planes begins at a multiple of 128 bytes. The two orders differ in strides alone:

    block-major  segment [slot][layer][planes]: a block is one run of bytes, to park, move or write to disk
    layer-major  segment [layer][slot][planes]: a layer's blocks lie close together, so that a step touches fewer pages

Runs in: anywhere; owns: nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, IntEnum

import torch
from torch import Tensor

PLANE_ALIGNMENT = 128


class GpuKvFormat(IntEnum):
    """EK_KV of common/kv.h."""

    BF16 = 0
    F16 = 1
    E4M3 = 2
    INT8 = 3
    INT4 = 4
    F32 = 5


_BITS = {
    GpuKvFormat.BF16: 16,
    GpuKvFormat.F16: 16,
    GpuKvFormat.E4M3: 8,
    GpuKvFormat.INT8: 8,
    GpuKvFormat.INT4: 4,
    GpuKvFormat.F32: 32,
}
_SCALE_BYTES = {GpuKvFormat.INT8: 2, GpuKvFormat.INT4: 4}


class BlockOrder(Enum):
    """Which of layer and slot is the outer one in a segment."""

    BLOCK_MAJOR = "block-major"
    LAYER_MAJOR = "layer-major"


@dataclass(frozen=True, slots=True)
class LayerStrides:
    """One layer's planes, in bytes: block `slot` of a segment at `base` has its keys at base + slot · slot_stride +
    k_off, and those of head h another h · head_stride on. The heads of a plane of scales lie end to end.
    """

    slot_stride: int
    k_off: int
    v_off: int
    ks_off: int
    vs_off: int
    head_stride: int


@dataclass(frozen=True, slots=True)
class GpuLayout:
    """The shape of a pool's segments: `segment_blocks` blocks each, or fewer (`segment_bytes`).

    A block takes `block_stride` bytes of the pool, which whoever plans its size has to count alike:

        plane        = kv_heads · block_size · head_dim · bits / 8, rounded up to a multiple of 128
        scale_plane  = kv_heads · block_size · scale_bytes, likewise; scale_bytes is 2 for int8, 4 for int4, else 0
        layer        = 2 · (plane + scale_plane)
        block_stride = num_layers · layer

    `num_layers` counts the layers that keep keys and values.
    """

    kv_format: GpuKvFormat
    order: BlockOrder
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    segment_blocks: int

    def __post_init__(self) -> None:
        """Raises ValueError for sizes that the kernels do not have."""
        if self.block_size not in (16, 32):
            raise ValueError(f"blocks have 16 or 32 tokens, not {self.block_size}")
        if not 32 <= self.head_dim <= 256 or self.head_dim % 32:
            raise ValueError(f"head dim {self.head_dim} is no multiple of 32 up to 256")
        if self.segment_blocks < 1 or self.segment_blocks & (self.segment_blocks - 1):
            raise ValueError(f"segment_blocks must be a power of two, not {self.segment_blocks}")

    @property
    def segment_shift(self) -> int:
        """A block's segment is its id without so many of its lowest bits, which are its slot."""
        return self.segment_blocks.bit_length() - 1

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's key or value of one head, without scales."""
        return self.head_dim * _BITS[self.kv_format] // 8

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales of one token's key or value of one head."""
        return _SCALE_BYTES.get(self.kv_format, 0)

    @property
    def plane_bytes(self) -> int:
        """Bytes of a layer's K (or V) of one block, padded."""
        return _padded(self.num_kv_heads * self.block_size * self.row_bytes)

    @property
    def scale_plane_bytes(self) -> int:
        """Bytes of the scales of a layer's K (or V) of one block, padded."""
        return _padded(self.num_kv_heads * self.block_size * self.scale_bytes)

    @property
    def layer_bytes(self) -> int:
        """Bytes that one layer keeps of one block."""
        return 2 * (self.plane_bytes + self.scale_plane_bytes)

    @property
    def block_stride(self) -> int:
        """Bytes of the pool that one block takes, all layers of it."""
        return self.num_layers * self.layer_bytes

    @property
    def slot_stride(self) -> int:
        """Bytes from a block's first layer to that of the next block of its segment."""
        return self.block_stride if self.order is BlockOrder.BLOCK_MAJOR else self.layer_bytes

    @property
    def layer_stride(self) -> int:
        """Bytes from one layer of a block to its next."""
        return self.layer_bytes if self.order is BlockOrder.BLOCK_MAJOR else self.segment_blocks * self.layer_bytes

    def segment_bytes(self, num_blocks: int | None = None) -> int:
        """Bytes of a segment of so many blocks, all of its blocks if None.

        Raises ValueError for what can be no segment: layer-major ones are whole, since the place of their layers is
        told by `segment_blocks`.
        """
        if num_blocks is None:
            num_blocks = self.segment_blocks
        is_whole = num_blocks == self.segment_blocks
        if not is_whole and (self.order is BlockOrder.LAYER_MAJOR or not 1 <= num_blocks < self.segment_blocks):
            raise ValueError(f"a {self.order.value} segment of {self.segment_blocks} blocks cannot have {num_blocks}")
        return num_blocks * self.block_stride

    def strides(self, layer: int) -> LayerStrides:
        """What a kernel is told of one layer."""
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"there is no layer {layer} of {self.num_layers}")
        first = layer * self.layer_stride
        scales = first + 2 * self.plane_bytes
        return LayerStrides(
            slot_stride=self.slot_stride,
            k_off=first,
            v_off=first + self.plane_bytes,
            ks_off=scales,
            vs_off=scales + self.scale_plane_bytes,
            head_stride=self.block_size * self.row_bytes,
        )

    def rows(self, segment: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """K and V of a segment's bytes, each [slots, kv_heads, block_size, row_bytes]; views."""
        strides = self.strides(layer)
        shape = (self._slots(segment), self.num_kv_heads, self.block_size, self.row_bytes)
        steps = (self.slot_stride, strides.head_stride, self.row_bytes, 1)
        start = segment.storage_offset()
        return (
            segment.as_strided(shape, steps, start + strides.k_off),
            segment.as_strided(shape, steps, start + strides.v_off),
        )

    def scales(self, segment: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Scales of K and V, each [slots, kv_heads, block_size, 0, 1 or 2] float16; views of a segment's bytes."""
        strides, halves = self.strides(layer), segment.view(torch.float16)
        numbers = self.scale_bytes // 2
        shape = (self._slots(segment), self.num_kv_heads, self.block_size, numbers)
        steps = (self.slot_stride // 2, self.block_size * numbers, numbers, 1)
        start = halves.storage_offset()
        return (
            halves.as_strided(shape, steps, start + strides.ks_off // 2),
            halves.as_strided(shape, steps, start + strides.vs_off // 2),
        )

    def _slots(self, segment: Tensor) -> int:
        """Blocks of a segment. Raises ValueError where it cannot have so many bytes."""
        slots, rest = divmod(segment.numel(), self.block_stride)
        if rest or segment.numel() != self.segment_bytes(slots):
            raise ValueError(f"a segment of {segment.numel():,} bytes is no {slots} blocks of {self.block_stride:,}")
        return slots


@dataclass(frozen=True, slots=True, eq=False)
class GpuCache:
    """The segments of one pool as launches and references see them.

    `segments` has the bytes of each by its index, [segment_bytes] uint8; indices may have holes. `table` [indices]
    int64 is the same for kernels: the address of each, 0 where there is none.
    """

    layout: GpuLayout
    segments: Mapping[int, Tensor]
    table: Tensor


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // PLANE_ALIGNMENT) * PLANE_ALIGNMENT
