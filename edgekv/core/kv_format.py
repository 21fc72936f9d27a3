"""How keys and values are kept, and how large a pool of them is. Runs in: anywhere; owns: nothing.

KV pool = segments of blocks of `block_size` tokens, each K and V of all layers
"""

from dataclasses import dataclass
from typing import Literal, Protocol

SEGMENT_BYTES = 64 << 20
SCALE_BYTES = 2  # float16

KVFormatName = Literal["float32", "bfloat16", "float16", "fp8", "int8", "int4"]
KVDtypeName = KVFormatName
KVScales = Literal["none", "token", "pair"]
KVEngine = Literal["torch", "cpu", "card"]
"""What runs a model: torch, on any device, or the kernels of the processor or of a card."""

CARD_ALIGNMENT = 128
"""A card's kernels want what a layer keeps of a block, keys, values and the scales of each, to begin so."""

CARD_PAGE_BYTES = 2 << 20
"""A card's drivers, and torch's allocator for all that is large, hand out whole pages of so much."""


class KVShape(Protocol):
    """What one token's keys and values depend on."""

    @property
    def num_layers(self) -> int:
        """Layers that keep keys and values."""

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads of a layer."""

    @property
    def head_dim(self) -> int:
        """Elements of one head."""


@dataclass(frozen=True, slots=True)
class KVFormat:
    """How keys and values are kept: the bits of an element, and which float16 numbers each head of a token has besides.

    `scales`: "token" is a scale for its key and one for its value, "pair" a scale and a zero for each. `engines` can
    keep them so.
    """

    name: KVFormatName
    bits: int
    scales: KVScales
    engines: frozenset[KVEngine]

    def block_bytes(self, shape: KVShape, block_size: int, *, alignment: int = 1) -> int:
        """Bytes of one block: K and V of `block_size` tokens in every layer, with their scales.

        `alignment`: of each of the up to four parts that a layer keeps.
        """
        rows = shape.num_kv_heads * block_size
        numbers: dict[KVScales, int] = {"none": 0, "token": 1, "pair": 2}
        parts = (-(-rows * shape.head_dim * self.bits // 8), rows * numbers[self.scales] * SCALE_BYTES)
        return shape.num_layers * 2 * sum(-(-part // alignment) * alignment for part in parts)


_ALL: frozenset[KVEngine] = frozenset(("torch", "cpu", "card"))

KV_FORMATS: dict[KVFormatName, KVFormat] = {
    made.name: made
    for made in (
        KVFormat("float32", 32, scales="none", engines=_ALL),
        KVFormat("bfloat16", 16, scales="none", engines=_ALL),
        KVFormat("float16", 16, scales="none", engines=_ALL),
        KVFormat("fp8", 8, scales="none", engines=frozenset(("card",))),  # e4m3: its exponent is scale enough
        KVFormat("int8", 8, scales="token", engines=frozenset(("cpu", "card"))),
        KVFormat("int4", 4, scales="pair", engines=frozenset(("card",))),
    )
}


@dataclass(frozen=True, slots=True)
class KVPlan:
    """A KV pool that fits a budget. `segments` holds the number of blocks of each; only the last may be smaller."""

    bytes_per_token: int
    block_size: int
    block_bytes: int
    segment_blocks: int
    num_blocks: int

    @property
    def segments(self) -> tuple[int, ...]:
        """Blocks of each segment."""
        whole, rest = divmod(self.num_blocks, self.segment_blocks)
        return (self.segment_blocks,) * whole + ((rest,) if rest else ())

    @property
    def pool_tokens(self) -> int:
        """Tokens that the pool holds."""
        return self.num_blocks * self.block_size

    @property
    def pool_bytes(self) -> int:
        """Bytes that the pool takes."""
        return self.num_blocks * self.block_bytes

    def max_concurrency(self, context_tokens: int) -> float:
        """How many requests of `context_tokens` fit at once."""
        return self.pool_tokens / context_tokens

    def capacity_lines(self, context_tokens: int) -> tuple[str, str]:
        """The two lines that vLLM prints at load, in its words: scripts look for them ("GPU" on every device)."""
        return (
            f"GPU KV cache size: {self.pool_tokens:,} tokens",
            f"Maximum concurrency for {context_tokens:,} tokens per request: "
            f"{self.max_concurrency(context_tokens):.2f}x",
        )


def kv_bytes_per_token(shape: KVShape, dtype_bytes: int) -> int:
    """Bytes of K and V that one token keeps, over all layers."""
    return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * dtype_bytes


def kv_alignment(engine: KVEngine) -> int:
    """What each part of a block is rounded up to, see `KVFormat.block_bytes`."""
    return CARD_ALIGNMENT if engine == "card" else 1


def segment_blocks(block_bytes: int, limit_bytes: int = SEGMENT_BYTES, *, page_bytes: int = 1) -> int:
    """Blocks of one segment: the largest power of two that stays within `limit_bytes`, at least 1.

    Where memory comes in pages, twice or four times as many if that saves more than 1 % of it: nobody counts what lies
    between a segment's end and that of its last page, and a plan is to hold within 1 %.
    """
    usual = 1 << max(0, (limit_bytes // block_bytes).bit_length() - 1)
    for num_blocks in (usual, 2 * usual):
        num_bytes = num_blocks * block_bytes
        if -num_bytes % page_bytes * 100 <= num_bytes:
            return num_blocks
    return 4 * usual


def plan_kv(
    shape: KVShape,
    *,
    kv_format: KVFormatName,
    block_size: int,
    budget_bytes: int,
    alignment: int = 1,
    page_bytes: int = 1,
) -> KVPlan:
    """The pool that `budget_bytes` hold: whole blocks only.

    `alignment`: see `KVFormat.block_bytes`; `page_bytes`: see `segment_blocks`.
    """
    block_bytes = KV_FORMATS[kv_format].block_bytes(shape, block_size, alignment=alignment)
    return KVPlan(
        bytes_per_token=-(-block_bytes // block_size),
        block_size=block_size,
        block_bytes=block_bytes,
        segment_blocks=segment_blocks(block_bytes, page_bytes=page_bytes),
        num_blocks=max(0, budget_bytes) // block_bytes,
    )


def context_need_bytes(
    shape: KVShape, *, kv_format: KVFormatName, block_size: int, context_tokens: int, alignment: int = 1
) -> int:
    """Bytes of the blocks of one sequence that fills the context. `alignment`: see `KVFormat.block_bytes`."""
    block_bytes = KV_FORMATS[kv_format].block_bytes(shape, block_size, alignment=alignment)
    return -(-context_tokens // block_size) * block_bytes
