"""A pool as it would lie on a card, in main memory, for the attention kernels on fibers.

What nobody has written is NaNs, or whatever else an earlier owner may have left: no result hangs on it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from edgekv.kernels.attn.gpu_layout import BlockOrder, GpuCache, GpuKvFormat, GpuLayout
from edgekv.kernels.attn.kv_codec import encode

POISON = 0xFF  # bytes of it are NaN in all formats of floating point and in scales, but 480 in e4m3
FORMATS = tuple(GpuKvFormat)
HEAD_DIMS = (64, 96, 128, 256)
ACTS = (torch.bfloat16, torch.float16, torch.float32)

# What rounding to a type costs: of the number, and absolute, since float16 has subnormal numbers.
ROUNDING = {torch.bfloat16: (2.0**-8, 0.0), torch.float16: (2.0**-11, 2.0**-25), torch.float32: (2.0**-24, 0.0)}


@dataclass(frozen=True, slots=True)
class Family:
    """What a kernel is compiled for."""

    kv_format: GpuKvFormat
    head_dim: int
    block_size: int
    act: torch.dtype
    group: int = 1

    def __str__(self) -> str:
        act = str(self.act).removeprefix("torch.")
        return f"{self.kv_format.name}-{self.head_dim}-block{self.block_size}-group{self.group}-{act}"

    def layout(
        self,
        *,
        kv_heads: int = 2,
        num_layers: int = 2,
        segment_blocks: int = 8,
        order: BlockOrder = BlockOrder.BLOCK_MAJOR,
    ) -> GpuLayout:
        return GpuLayout(
            self.kv_format, order, num_layers, kv_heads, self.head_dim, self.block_size, segment_blocks
        )


# Each format with each head dim, and what goes round: all groups, small and large ones for each format. Tests take
# theirs from here where they can, since each is compiled.
_GROUPS = ((8, 2, 4, 1), (16, 3, 5, 12), (6, 4, 7, 9), (1, 10, 14, 2), (13, 8, 3, 15), (11, 7, 4, 6))
FAMILIES = {
    (kv_format, head_dim): Family(
        kv_format, head_dim, (16, 32)[((i + j) % 3 + j) % 2], ACTS[(i + j) % 3], _GROUPS[i][j]
    )
    for i, kv_format in enumerate(FORMATS)
    for j, head_dim in enumerate(HEAD_DIMS)
}


@dataclass
class Pool:
    """Segments whose free blocks are handed out in random order; indices in `holes` have no segment.

    `leftovers` is the seed of what lies where nobody has written; None: poison.
    """

    layout: GpuLayout
    num_blocks: int
    seed: int = 0
    holes: Iterable[int] = ()
    leftovers: int | None = None
    segments: dict[int, Tensor] = field(init=False, default_factory=dict)
    free: list[int] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        holes = set(self.holes)
        missing, index = self.num_blocks, 0
        while missing > 0:
            if index not in holes:
                self.segments[index] = torch.full((self.layout.segment_bytes(),), POISON, dtype=torch.uint8)
                missing -= self.layout.segment_blocks
            index += 1
        if self.leftovers is not None:
            self.scribble(torch.Generator().manual_seed(self.leftovers))
        addresses = [self.segments[i].data_ptr() if i in self.segments else 0 for i in range(index)]
        self.cache = GpuCache(self.layout, self.segments, torch.tensor(addresses, dtype=torch.int64))
        blocks = [i << self.layout.segment_shift | slot for i in self.segments for slot in range(self.slots)]
        self.free = [blocks[i] for i in torch.randperm(len(blocks), generator=self.generator).tolist()]

    @property
    def slots(self) -> int:
        return self.layout.segment_blocks

    def scribble(self, generator: torch.Generator) -> None:
        """Random bytes all over."""
        for segment in self.segments.values():
            segment.random_(generator=generator)

    def take(self, tokens: int) -> list[int]:
        """Blocks for so many tokens."""
        return [self.free.pop() for _ in range(-(-tokens // self.layout.block_size))]

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def planes(self, block: int, layer: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Rows and scales of a block's keys, and of its values: views [kv_heads, block_size, ...]."""
        segment, slot = self.segments[block >> self.layout.segment_shift], block & (self.slots - 1)
        rows, scales = self.layout.rows(segment, layer), self.layout.scales(segment, layer)
        return (rows[0][slot], scales[0][slot]), (rows[1][slot], scales[1][slot])

    def write(self, layer: int, table: Sequence[int], keys: Tensor, values: Tensor, first: int = 0) -> None:
        """Put [tokens, kv_heads, head_dim] to the positions from `first` on."""
        size, end = self.layout.block_size, first + len(keys)
        encoded = [encode(side.float().transpose(0, 1), self.layout.kv_format) for side in (keys, values)]
        for at in range(first // size, -(-end // size)):
            begins, ends = max(first, at * size), min(end, (at + 1) * size)
            read, written = slice(begins - first, ends - first), slice(begins - at * size, ends - at * size)
            for (rows, scales), (codes, numbers) in zip(self.planes(table[at], layer), encoded, strict=True):
                rows[:, written], scales[:, written] = codes[:, read], numbers[:, read]

    def fill(self, layer: int, tokens: int) -> list[int]:
        """The table of a new sequence of so many random tokens."""
        table = self.take(tokens)
        shape = (tokens, self.layout.num_kv_heads, self.layout.head_dim)
        self.write(layer, table, self.normal(*shape), self.normal(*shape))
        return table

    def move(self, block: int) -> int:
        """All layers of a block go to a free one, whose number this is."""
        target = self.free.pop()
        for layer in range(self.layout.num_layers):
            for read, written in zip(self.planes(block, layer), self.planes(target, layer), strict=True):
                for source, copy in zip(read, written, strict=True):
                    copy.copy_(source)
        return target

    def remove(self, segment: int) -> None:
        """The memory goes, and what a kernel reads of it is at address 0."""
        del self.segments[segment]
        self.cache.table[segment] = 0
        self.free = [block for block in self.free if block >> self.layout.segment_shift != segment]


def padded(tables: Sequence[Sequence[int]], beside: int = 2) -> Tensor:
    """The tables as one int32 matrix; behind each are numbers of segments that there are not."""
    width = max(map(len, tables)) + beside
    return torch.tensor([[*table, *[2**30] * (width - len(table))] for table in tables], dtype=torch.int32)


def ints(numbers: Iterable[int]) -> Tensor:
    return torch.tensor(list(numbers), dtype=torch.int32)


def rounded(bounds: tuple[float, float], act: torch.dtype) -> tuple[float, float]:
    """Bounds (relative, absolute) of what is rounded to a type in the end."""
    return bounds[0] + ROUNDING[act][0], bounds[1] + ROUNDING[act][1]


def assert_near(
    result: Tensor, expected: Tensor, bounds: Mapping[torch.dtype, tuple[float, float]] | tuple[float, float]
) -> None:
    """Each number is within the bounds (relative, absolute), which may be those of the result's type."""
    relative, absolute = bounds if isinstance(bounds, tuple) else bounds[result.dtype]
    torch.testing.assert_close(result.float(), expected.float(), rtol=relative, atol=absolute)
