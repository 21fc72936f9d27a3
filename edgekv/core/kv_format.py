"""How keys and values are kept, and how large a pool of them is. Runs in: anywhere; owns: nothing.

KV pool = segments of blocks of `block_size` tokens, each K and V of all layers
"""

from dataclasses import dataclass
from typing import Literal, Protocol

SEGMENT_BYTES = 64 << 20
SCALE_BYTES = 2  # float16

KVFormatName = Literal["float32", "bfloat16", "float16", "fp8", "int8", "int4"]
KVDtypeName = Literal["float32", "bfloat16", "float16", "int8"]  # those that are served
KVScales = Literal["none", "token", "channel"]
KVServer = Literal["any", "native", "none"]


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
    """How keys and values are kept: bits of an element, and which float16 scales go with a block of one head.

    `scales`: "token" is one for each token of the keys and one of the values; "channel" is KIVI's (arXiv:2402.02750),
    one for each channel of a block's keys and for each token of its values. `served`: which engine can keep them so
    today: any, that of the native CPU kernels alone, or none yet.
    """

    name: KVFormatName
    bits: int
    scales: KVScales
    served: KVServer

    def block_bytes(self, shape: KVShape, block_size: int) -> int:
        """Bytes of one block: K and V of `block_size` tokens in every layer, with their scales."""
        elements = shape.head_dim * block_size
        counts: dict[KVScales, int] = {"none": 0, "token": 2 * block_size, "channel": shape.head_dim + block_size}
        scale_bytes = counts[self.scales] * SCALE_BYTES
        return shape.num_layers * shape.num_kv_heads * (2 * -(-elements * self.bits // 8) + scale_bytes)

    def is_served(self, *, native: bool) -> bool:
        """Whether an engine with or without the native CPU kernels can keep them so."""
        return self.served == "any" or (native and self.served == "native")


KV_FORMATS: dict[KVFormatName, KVFormat] = {
    made.name: made
    for made in (
        KVFormat("float32", 32, scales="none", served="any"),
        KVFormat("bfloat16", 16, scales="none", served="any"),
        KVFormat("float16", 16, scales="none", served="any"),
        KVFormat("fp8", 8, scales="none", served="none"),  # e4m3: its exponent is scale enough
        KVFormat("int8", 8, scales="token", served="native"),
        KVFormat("int4", 4, scales="channel", served="none"),
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


def segment_blocks(block_bytes: int, limit_bytes: int = SEGMENT_BYTES) -> int:
    """Blocks of one segment: the largest power of two that stays within `limit_bytes`, at least 1."""
    return 1 << max(0, (limit_bytes // block_bytes).bit_length() - 1)


def plan_kv(shape: KVShape, *, kv_format: KVFormatName, block_size: int, budget_bytes: int) -> KVPlan:
    """The pool that `budget_bytes` hold: whole blocks only."""
    block_bytes = KV_FORMATS[kv_format].block_bytes(shape, block_size)
    return KVPlan(
        bytes_per_token=-(-block_bytes // block_size),
        block_size=block_size,
        block_bytes=block_bytes,
        segment_blocks=segment_blocks(block_bytes),
        num_blocks=max(0, budget_bytes) // block_bytes,
    )


def context_need_bytes(shape: KVShape, *, kv_format: KVFormatName, block_size: int, context_tokens: int) -> int:
    """Bytes of the blocks of one sequence that fills the context."""
    return -(-context_tokens // block_size) * KV_FORMATS[kv_format].block_bytes(shape, block_size)
