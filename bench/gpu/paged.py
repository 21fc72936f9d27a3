"""A used cache on the card: random numbers in blocks of random order, as many layers as no cache of the card holds.

Runs in: the main thread; owns: its memory.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.gpu.bench import Bench, copies_of
from edgekv.kernels.attn import decode_split, lse_merge
from edgekv.kernels.attn.gpu_layout import BlockOrder, GpuCache, GpuKvFormat, GpuLayout
from edgekv.kernels.attn.splits import Splits, cut_of, make_parts
from edgekv.kernels.common.prepared import Prepared

BLOCK_SIZE = 16
SEGMENT_BYTES = 64 << 20
_SCALE = 0.01


class PagedCache:
    """`sequences` of `context` tokens each; `layers` None: enough to fill the bench's arena."""

    def __init__(
        self,
        bench: Bench,
        kv_format: GpuKvFormat,
        sequences: int,
        context: int,
        *,
        order: BlockOrder = BlockOrder.BLOCK_MAJOR,
        layers: int | None = None,
    ) -> None:
        """Raises NotMeasured where the card has no room for it."""
        heads = bench.sizes.heads
        blocks_each = -(-context // BLOCK_SIZE)
        blocks = sequences * blocks_each
        one = GpuLayout(kv_format, order, 1, heads.keys, heads.dim, BLOCK_SIZE, 1)
        self.num_layers = layers or copies_of(bench.sizes.arena_bytes, blocks * one.block_stride, most=64)
        block_bytes = self.num_layers * one.block_stride
        segment_blocks = 1 << max(0, (SEGMENT_BYTES // block_bytes).bit_length() - 1)
        self.layout = GpuLayout(kv_format, order, self.num_layers, heads.keys, heads.dim, BLOCK_SIZE, segment_blocks)
        segments = -(-blocks // segment_blocks)
        bench.need(segments * self.layout.segment_bytes())
        self.segments = {index: self._segment(bench) for index in range(segments)}
        addresses = [segment.data_ptr() for segment in self.segments.values()]
        table = torch.tensor(addresses, dtype=torch.int64, device=bench.device)
        self.cache = GpuCache(self.layout, self.segments, table)
        order_of_blocks = torch.randperm(blocks, generator=torch.Generator().manual_seed(0)).to(torch.int32)
        self.block_table = order_of_blocks.view(sequences, blocks_each).to(bench.device)
        self.contexts = torch.full((sequences,), context, dtype=torch.int32, device=bench.device)
        self.sequences, self.context = sequences, context

    @property
    def layer_bytes(self) -> int:
        """Bytes of keys and values, with scales, that a step has to read in a layer."""
        token = 2 * self.layout.num_kv_heads * (self.layout.row_bytes + self.layout.scale_bytes)
        return self.sequences * self.context * token

    def _segment(self, bench: Bench) -> Tensor:
        """Numbers that are finite, whatever the format."""
        memory = bench.rig.card.allocate(self.layout.segment_bytes())
        match self.layout.kv_format:
            case GpuKvFormat.BF16:
                memory.view(torch.bfloat16).normal_()
            case GpuKvFormat.F16:
                memory.view(torch.float16).normal_()
            case GpuKvFormat.F32:
                memory.view(torch.float32).normal_()
            case _:
                memory.random_(0, 256)
                for layer in range(self.layout.num_layers):
                    for scales in self.layout.scales(memory, layer):
                        scales.fill_(_SCALE)
        return memory


class Decode:
    """A step's attention over such a cache, layer by layer."""

    def __init__(self, bench: Bench, paged: PagedCache) -> None:
        heads = bench.sizes.heads
        self.paged, self._bench = paged, bench
        self._q = bench.normal(paged.sequences, heads.queries, heads.dim)
        self._out = torch.empty_like(self._q)
        splits = Splits(bench.rig.card.decode_blocks, heads.keys, BLOCK_SIZE)
        self._cut = cut_of(splits, [paged.context] * paged.sequences).to(bench.device)
        slots = splits.most_parts(paged.sequences, paged.block_table.shape[1])
        self._parts = make_parts(slots, heads.queries, heads.dim, bench.device)

    def calls(self) -> list[Callable[[], None]]:
        """One for each layer; keep this object for as long as they are made."""
        return [self._bench.launches(self._layer(layer)) for layer in range(self.paged.num_layers)]

    def _layer(self, layer: int) -> list[Prepared]:
        paged = self.paged
        return [
            decode_split.prepare(
                paged.cache, layer, self._q, self._out, block_table=paged.block_table, contexts=paged.contexts,
                cut=self._cut, parts=self._parts, scale=self._q.shape[2] ** -0.5,
            ),
            lse_merge.prepare(self._parts, self._out, slots=self._cut[1:]),
        ]  # fmt: skip
