"""The pool of a card's kernels: segments of blocks, and the table of their addresses on the card.

Runs in: engine thread; owns: the cache's memory. The layout is drawn in kernels/attn/gpu_layout.py.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from edgekv.core.kv_format import KVFormatName, KVShape
from edgekv.engine.kv_pool import BlockMemory
from edgekv.engine.segment_memory import SegmentMemory
from edgekv.kernels.attn.gpu_layout import BlockOrder, GpuCache, GpuKvFormat, GpuLayout
from edgekv.model.card_memory import MOST_SEGMENTS

CARD_FORMATS: dict[KVFormatName, GpuKvFormat] = {
    "float32": GpuKvFormat.F32,
    "bfloat16": GpuKvFormat.BF16,
    "float16": GpuKvFormat.F16,
    "fp8": GpuKvFormat.E4M3,
    "int8": GpuKvFormat.INT8,
    "int4": GpuKvFormat.INT4,
}


@dataclass(frozen=True, slots=True, eq=False)
class CardSegment:
    """One allocation of whole blocks, [bytes] uint8."""

    data: Tensor
    num_blocks: int


class CardKVPool(BlockMemory[CardSegment]):
    """Keys and values in one of the kernels' formats, a block one run of bytes.

    The kernels select the slots that a sequence has and never multiply by zero, so what an earlier owner left in the
    others, NaN too, reaches no result; nothing is cleared.
    """

    def __init__(
        self,
        shape: KVShape,
        *,
        kv_format: KVFormatName,
        device: torch.device,
        block_size: int,
        segment_blocks: int,
        table: Tensor | None = None,
    ) -> None:
        """An empty pool; `table` [segments] int64 is where the addresses go. Raises ValueError for unserved sizes."""
        super().__init__(shape, device=device, block_size=block_size, segment_blocks=segment_blocks)
        layout = GpuLayout(
            CARD_FORMATS[kv_format], BlockOrder.BLOCK_MAJOR, shape.num_layers, shape.num_kv_heads, shape.head_dim,
            block_size, segment_blocks,
        )  # fmt: skip
        self.kv_format: KVFormatName = kv_format
        if table is None:
            table = torch.zeros(MOST_SEGMENTS, dtype=torch.int64, device=device)
        self._bytes: dict[int, Tensor] = {}
        self.cache = GpuCache(layout, self._bytes, table)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: K and V of `block_size` tokens in every layer, with scales and padding."""
        return self.cache.layout.block_stride

    def _allocate(self, num_blocks: int) -> tuple[SegmentMemory, CardSegment]:
        shape = (num_blocks * self.block_bytes,)
        memory = SegmentMemory(shape, dtype=torch.uint8, device=self.device, commit=False)
        assert memory.data is not None
        return memory, CardSegment(memory.data, num_blocks)

    def _note_change(self) -> None:
        super()._note_change()
        # In place: kernels were told of this table, and graphs hold its address.
        self._bytes.clear()
        addresses = torch.zeros(len(self.cache.table), dtype=torch.int64)
        for index, segment in self.allocated.items():
            self._bytes[index] = segment.data
            addresses[index] = segment.data.data_ptr()
        # On the stream, behind every step that was told of the old ones.
        self.cache.table.copy_(addresses)

    def _copy(
        self, source: CardSegment, source_block: int, target: CardSegment, target_block: int, num_tokens: int
    ) -> None:
        # Whole blocks: one run of bytes each, and what is past num_tokens is nobody's.
        self._block(target, target_block).copy_(self._block(source, source_block))

    def _poison(self, segment: CardSegment, block: int) -> None:
        self._block(segment, block).fill_(0xFF)  # a NaN in every floating-point format

    def _block(self, segment: CardSegment, block: int) -> Tensor:
        return segment.data[block * self.block_bytes : (block + 1) * self.block_bytes]
