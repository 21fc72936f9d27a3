"""The pool of the native CPU kernels: the same segments and block ids, each block in the layout that they read fastest.

Runs in: engine thread; owns: the cache's memory. The layouts are drawn in kernels/cpu/src/ek.h.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from edgekv.core.kv_format import KV_FORMATS, KVFormatName, KVShape
from edgekv.engine.kv_pool import BlockMemory
from edgekv.engine.segment_memory import SegmentMemory

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, eq=False)
class NativeSegment:
    """One allocation: the planes of every block and, for int8, the scales behind all of them."""

    data: Tensor  # [bytes] uint8
    planes: Tensor  # [layers, 2, kv_heads, blocks, plane bytes] uint8
    scales: Tensor | None  # [layers, 2, kv_heads, blocks, block_size] float16
    num_blocks: int
    address: int


class NativeKVPool(BlockMemory[NativeSegment]):
    """Keys and values in one of the kernels' formats.

    The kernels select the slots that a sequence has and never multiply by zero, so what an earlier owner left in the
    others, NaN too, reaches no result; nothing is cleared.
    """

    def __init__(
        self,
        shape: KVShape,
        *,
        kv_format: KVFormatName,
        block_size: int,
        segment_blocks: int,
        commit: bool = True,
    ) -> None:
        """An empty pool. Raises ValueError for a format or a size that the kernels do not have."""
        super().__init__(shape, device=_CPU, block_size=block_size, segment_blocks=segment_blocks)
        if "cpu" not in KV_FORMATS[kv_format].engines:
            raise ValueError(f"the CPU kernels keep no keys and values in {kv_format}")
        if block_size % 16 or shape.head_dim % 16:
            raise ValueError(f"block size {block_size} and head dim {shape.head_dim} must be multiples of 16")
        self.kv_format: KVFormatName = kv_format
        self._commit = commit
        self._bytes = KV_FORMATS[kv_format].block_bytes(shape, block_size)
        self._plane_bytes = block_size * shape.head_dim * KV_FORMATS[kv_format].bits // 8
        self._is_scaled = KV_FORMATS[kv_format].scales == "token"

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: K and V of `block_size` tokens in every layer, with their scales."""
        return self._bytes

    def _allocate(self, num_blocks: int) -> tuple[SegmentMemory, NativeSegment]:
        memory = SegmentMemory((num_blocks * self._bytes,), dtype=torch.uint8, device=_CPU, commit=self._commit)
        assert memory.data is not None
        planes = self.num_layers * 2 * self.num_kv_heads * num_blocks
        shape = (self.num_layers, 2, self.num_kv_heads, num_blocks)
        end = planes * self._plane_bytes
        scales = memory.data[end:].view(torch.float16).view(*shape, self.block_size) if self._is_scaled else None
        planes_view = memory.data[:end].view(*shape, self._plane_bytes)
        return memory, NativeSegment(memory.data, planes_view, scales, num_blocks, memory.data.data_ptr())

    def _copy(
        self, source: NativeSegment, source_block: int, target: NativeSegment, target_block: int, num_tokens: int
    ) -> None:
        # Whole blocks: in a plane the slots lie side by side, and what is past num_tokens is nobody's.
        target.planes[:, :, :, target_block].copy_(source.planes[:, :, :, source_block])
        if source.scales is not None and target.scales is not None:
            target.scales[:, :, :, target_block].copy_(source.scales[:, :, :, source_block])

    def _poison(self, segment: NativeSegment, block: int) -> None:
        segment.planes[:, :, :, block].fill_(0xFF)  # a NaN in every floating-point format
        if segment.scales is not None:
            segment.scales[:, :, :, block].fill_(torch.nan)
