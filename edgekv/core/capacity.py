"""How much fits: the arithmetic that `edgekv plan` prints and the loader follows. Runs in: anywhere; owns: nothing.

Both use these functions with the same inputs, so what is promised before loading is what is there afterwards.

    device memory = headroom + weights + workspace + KV pool
    KV pool       = segments of blocks of `block_size` tokens, each K and V of all layers
"""

from dataclasses import dataclass
from typing import Literal, Protocol

MIB = 1 << 20
GIB = 1 << 30

SEGMENT_BYTES = 64 * MIB
GATHER_BYTES = 8 * MIB
EXACT_WEIGHT_BYTES = 1 * GIB
MAIN_MEMORY_KV_BYTES = 4 * GIB  # a share that leaves a desktop with 16 GiB its memory

DtypeName = Literal["float32", "bfloat16", "float16"]
DeviceKind = Literal["cpu", "card"]

DTYPE_BYTES: dict[DtypeName, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


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


class ModelShape(KVShape, Protocol):
    """What the weights and the workspace depend on as well."""

    @property
    def num_parameters(self) -> int:
        """Weights in all."""

    @property
    def vocab_size(self) -> int:
        """Columns of the logits."""

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""

    @property
    def intermediate_size(self) -> int:
        """Width of the MLP."""

    @property
    def num_heads(self) -> int:
        """Query heads."""

    @property
    def max_position_embeddings(self) -> int:
        """The longest context that the model knows."""


@dataclass(frozen=True, slots=True)
class DtypeChoice:
    """What to compute in, and why."""

    name: DtypeName
    reason: str


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


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Where every byte of the device goes. `kv` holds no block where the model leaves no room for one."""

    total_bytes: int
    headroom_bytes: int
    weight_bytes: int
    workspace_bytes: int
    kv: KVPlan
    context_tokens: int
    dtype: DtypeName
    kv_dtype: DtypeName

    @property
    def free_bytes(self) -> int:
        """What stays unused; negative by what is missing."""
        used = self.headroom_bytes + self.weight_bytes + self.workspace_bytes + self.kv.pool_bytes
        return self.total_bytes - used

    @property
    def missing_bytes(self) -> int:
        """Memory that the weights and one block's worth of context would need beyond what there is."""
        needed = self.headroom_bytes + self.weight_bytes + self.workspace_bytes + self.kv.block_bytes
        return max(0, needed - self.total_bytes)

    @property
    def fits(self) -> bool:
        """Whether a request of the whole context can be served."""
        return self.missing_bytes == 0 and self.kv.pool_tokens >= self.context_tokens


def kv_bytes_per_token(shape: KVShape, dtype_bytes: int) -> int:
    """Bytes of K and V that one token keeps, over all layers."""
    return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * dtype_bytes


def segment_blocks(block_bytes: int, limit_bytes: int = SEGMENT_BYTES) -> int:
    """Blocks of one segment: the largest power of two that stays within `limit_bytes`, at least 1."""
    return 1 << max(0, (limit_bytes // block_bytes).bit_length() - 1)


def plan_kv(shape: KVShape, *, kv_dtype_bytes: int, block_size: int, budget_bytes: int) -> KVPlan:
    """The pool that `budget_bytes` hold: whole blocks only."""
    bytes_per_token = kv_bytes_per_token(shape, kv_dtype_bytes)
    block_bytes = bytes_per_token * block_size
    return KVPlan(
        bytes_per_token=bytes_per_token,
        block_size=block_size,
        block_bytes=block_bytes,
        segment_blocks=segment_blocks(block_bytes),
        num_blocks=max(0, budget_bytes) // block_bytes,
    )


def workspace_bytes(
    shape: ModelShape,
    *,
    dtype_bytes: int,
    kv_dtype_bytes: int,
    context_tokens: int,
    max_step_tokens: int,
    max_sequences: int,
) -> int:
    """An upper estimate of what one step allocates: activations, attention's scratch, and logits with their sorting.

    The widest moment of a layer holds the residual twice, q, k, v and the attention's output, or gate, up and their
    product; twice that, because an allocator keeps the one while the next is being made. Attention gathers one layer's
    K and V of the longest context, through a second buffer of that size; of shorter ones a few MiB at a time.
    """
    heads = (2 * shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    widest = 2 * shape.hidden_size + max(heads, 3 * shape.intermediate_size)
    activations = 2 * max_step_tokens * widest * dtype_bytes
    layer_context = 2 * shape.num_kv_heads * shape.head_dim * kv_dtype_bytes * context_tokens
    logits = max_sequences * shape.vocab_size * (4 + 4 + 8)  # float32, its softmax, and int64 sorting indices
    return activations + 2 * max(GATHER_BYTES, layer_context) + logits


def headroom_bytes(total_bytes: int) -> int:
    """What is left to others and to surprises (Linux): 512 MiB or 6 %, whichever is more."""
    return max(512 * MIB, total_bytes * 6 // 100)


def context_need_bytes(shape: KVShape, *, kv_dtype_bytes: int, block_size: int, context_tokens: int) -> int:
    """Bytes of the blocks of one sequence that fills the context."""
    blocks = -(-context_tokens // block_size)
    return blocks * block_size * kv_bytes_per_token(shape, kv_dtype_bytes)


def auto_kv_budget(*, device: DeviceKind, free_bytes: int, one_context_bytes: int, max_sequences: int) -> int:
    """The KV budget when none is set. `free_bytes`: what weights, workspace and headroom leave.

    A card is there for this: all of it. Main memory is shared: MAIN_MEMORY_KV_BYTES, or one full context where that is
    more; never more than half of what is free, nor than `max_sequences` full contexts, which is all that could be used.
    """
    if device == "card":
        return max(0, free_bytes)
    wanted = max(one_context_bytes, MAIN_MEMORY_KV_BYTES)
    return max(0, min(wanted, free_bytes // 2, max_sequences * one_context_bytes))


def choose_dtype(checkpoint: DtypeName, num_parameters: int, device: DeviceKind) -> DtypeChoice:
    """What a model computes in when nothing is set."""
    if device == "card":
        return DtypeChoice(checkpoint, "as the checkpoint")
    if num_parameters * DTYPE_BYTES[checkpoint] <= EXACT_WEIGHT_BYTES:
        return DtypeChoice("float32", "a small model on the CPU: exact, and the same in any batch")
    if checkpoint == "float16":
        return DtypeChoice("bfloat16", "float16 is slow on CPUs; the checkpoint's float16 is rounded to bfloat16")
    return DtypeChoice(checkpoint, "as the checkpoint")


def plan_memory(
    shape: ModelShape,
    *,
    device: DeviceKind,
    total_bytes: int,
    dtype: DtypeName,
    kv_dtype: DtypeName,
    block_size: int,
    context_tokens: int,
    max_sequences: int,
    max_step_tokens: int,
    kv_budget: int | float | None = None,
) -> MemoryPlan:
    """Share `total_bytes` out. `kv_budget`: bytes (int), a share of the total (float), or None to choose."""
    headroom = headroom_bytes(total_bytes)
    weights = shape.num_parameters * DTYPE_BYTES[dtype]
    workspace = workspace_bytes(
        shape,
        dtype_bytes=DTYPE_BYTES[dtype],
        kv_dtype_bytes=DTYPE_BYTES[kv_dtype],
        context_tokens=context_tokens,
        max_step_tokens=max_step_tokens,
        max_sequences=max_sequences,
    )
    free = total_bytes - headroom - weights - workspace
    if kv_budget is None:
        one_context = context_need_bytes(
            shape, kv_dtype_bytes=DTYPE_BYTES[kv_dtype], block_size=block_size, context_tokens=context_tokens
        )
        budget = auto_kv_budget(
            device=device, free_bytes=free, one_context_bytes=one_context, max_sequences=max_sequences
        )
    else:
        budget = kv_budget if isinstance(kv_budget, int) else int(total_bytes * kv_budget)
    kv = plan_kv(shape, kv_dtype_bytes=DTYPE_BYTES[kv_dtype], block_size=block_size, budget_bytes=budget)
    return MemoryPlan(
        total_bytes=total_bytes,
        headroom_bytes=headroom,
        weight_bytes=weights,
        workspace_bytes=workspace,
        kv=kv,
        context_tokens=context_tokens,
        dtype=dtype,
        kv_dtype=kv_dtype,
    )
