"""How much fits: the arithmetic that `edgekv plan` prints and the loader follows. Runs in: anywhere; owns: nothing.

Both use these functions with the same inputs, so what is promised before loading is what is there afterwards.

    device memory = others + headroom + budget              (less where `vram_budget` allows less)
    budget        = runtime + weights + workspace + graphs + draft (weights, workspace, KV) + KV pool + unused
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from edgekv.core.dtype_choice import DTYPE_BYTES as DTYPE_BYTES
from edgekv.core.dtype_choice import DeviceKind as DeviceKind
from edgekv.core.dtype_choice import DtypeChoice as DtypeChoice
from edgekv.core.dtype_choice import DtypeName as DtypeName
from edgekv.core.dtype_choice import choose_dtype as choose_dtype
from edgekv.core.kv_format import (
    CARD_PAGE_BYTES,
    KV_FORMATS,
    KVDtypeName,
    KVFormatName,
    KVPlan,
    context_need_bytes,
    plan_kv,
)
from edgekv.core.kv_format import KVShape as KVShape
from edgekv.core.kv_format import kv_bytes_per_token as kv_bytes_per_token

MIB = 1 << 20
GIB = 1 << 30

GATHER_BYTES = 8 * MIB
CAPPED_SCORES = 4 << 20  # scores that soft-capped attention writes out at a time
MAIN_MEMORY_KV_BYTES = 4 * GIB  # a share that leaves a desktop with 16 GiB its memory
DRAFT_KV_BYTES = 1 * GIB
# A captured graph keeps its kernels' launch parameters on the card; activations are the workspace's (an estimate).
GRAPH_NODE_BYTES = 32 << 10
GRAPH_NODES_PER_LAYER = 12

# What a process holds before any weight: on a card the driver's context and the libraries' code (an estimate: 300 to
# 600 MiB are reported); in main memory the interpreter with torch (170 MiB of its own with torch 2.13).
RUNTIME_BYTES: dict[DeviceKind, int] = {"cpu": 192 * MIB, "card": 512 * MIB}


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

    @property
    def windows(self) -> Sequence[int | None]:
        """How far back each layer looks; None for all of it."""

    @property
    def attention_softcap(self) -> float | None:
        """Whether attention scores are capped: those are computed in float32."""


@dataclass(frozen=True, slots=True)
class WeightBytes:
    """What weights take: `total` in memory, of which a decode step reads `step`.

    Of an embedding that is not the output head too, a step reads one row. `kinds`: bytes in memory by what they are
    kept in, the most first.
    """

    total: int
    step: int
    kinds: dict[str, int]

    @classmethod
    def assumed(cls, shape: ModelShape, dtype: DtypeName) -> "WeightBytes":
        """Of every parameter in `dtype`, all of them read."""
        total = shape.num_parameters * DTYPE_BYTES[dtype]
        return cls(total, total, {dtype: total})


@dataclass(frozen=True, slots=True)
class Draft:
    """A draft model to plan for.

    None: `kv_bytes`, its pool, is chosen; `weights` are all its parameters in `dtype`, which `kv_format` is too.
    `workspace_bytes`: of one of its steps, captured ones with it; None for an estimate. `kv_alignment`: see
    `KVFormat.block_bytes`.
    """

    shape: ModelShape
    dtype: DtypeName
    kv_bytes: int | None = None
    weights: WeightBytes | None = None
    workspace_bytes: int | None = None
    kv_format: KVDtypeName | None = None
    kv_alignment: int = 1


@dataclass(frozen=True, slots=True)
class DraftPlan:
    """What a draft model takes beside the target."""

    weights: WeightBytes
    kv: KVPlan
    dtype: DtypeName
    kv_dtype: KVDtypeName
    workspace_bytes: int = 0

    @property
    def weight_bytes(self) -> int:
        """In memory."""
        return self.weights.total

    @property
    def num_bytes(self) -> int:
        """Weights, workspace and KV pool."""
        return self.weight_bytes + self.workspace_bytes + self.kv.pool_bytes


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Where every byte of the `device` goes. `kv` holds no block where the model leaves no room for one.

    `others_bytes` is what other programs held when it was planned; `most_bytes` the most that edgekv may have in all,
    None for no such limit. `ceiling_blocks` is what the pool may grow to when others leave.
    """

    device: DeviceKind
    total_bytes: int
    others_bytes: int
    headroom_bytes: int
    most_bytes: int | None
    runtime_bytes: int
    weights: WeightBytes
    workspace_bytes: int
    graphs_bytes: int
    kv: KVPlan
    ceiling_blocks: int
    context_tokens: int
    dtype: DtypeName
    kv_dtype: KVDtypeName
    draft: DraftPlan | None = None

    @property
    def weight_bytes(self) -> int:
        """Of the weights, in memory."""
        return self.weights.total

    @property
    def budget_bytes(self) -> int:
        """All that may be leased: what others and the headroom leave, at most `most_bytes`."""
        return max(0, self._room_bytes if self.most_bytes is None else min(self._room_bytes, self.most_bytes))

    @property
    def withheld_bytes(self) -> int:
        """Room that there is and that `most_bytes` leaves to others."""
        return max(0, self._room_bytes - self.budget_bytes)

    @property
    def fixed_bytes(self) -> int:
        """Everything that is leased but the KV pool."""
        draft = 0 if self.draft is None else self.draft.num_bytes
        return self.runtime_bytes + self.weight_bytes + self.workspace_bytes + self.graphs_bytes + draft

    @property
    def leases(self) -> dict[str, int]:
        """Bytes by the name of the lease that they go on; those of no bytes are left out."""
        draft = self.draft
        leases = {
            "runtime": self.runtime_bytes,
            "weights": self.weight_bytes,
            "workspace": self.workspace_bytes,
            "graphs": self.graphs_bytes,
            "weights.draft": 0 if draft is None else draft.weight_bytes,
            "workspace.draft": 0 if draft is None else draft.workspace_bytes,
            "kv.draft": 0 if draft is None else draft.kv.pool_bytes,
            "kv.target": self.kv.pool_bytes,
        }
        return {name: num_bytes for name, num_bytes in leases.items() if num_bytes}

    @property
    def ceiling_bytes(self) -> int:
        """The most that the pool may have."""
        return self.ceiling_blocks * self.kv.block_bytes

    @property
    def free_bytes(self) -> int:
        """What of the budget stays unused; negative by what is missing."""
        return min(self._room_bytes, self.budget_bytes) - self.fixed_bytes - self.kv.pool_bytes

    @property
    def missing_bytes(self) -> int:
        """Memory that all but the pool, and one block of it, would need beyond what there is."""
        return max(0, self.fixed_bytes + self.kv.block_bytes - min(self._room_bytes, self.budget_bytes))

    @property
    def fits(self) -> bool:
        """Whether all of it can be leased, and a request of the whole context be served."""
        return self.missing_bytes == 0 and self.free_bytes >= 0 and self.kv.pool_tokens >= self.context_tokens

    @property
    def _room_bytes(self) -> int:
        return self.total_bytes - self.others_bytes - self.headroom_bytes


def workspace_bytes(
    shape: ModelShape,
    *,
    device: DeviceKind,
    dtype_bytes: int,
    kv_dtype: KVDtypeName,
    context_tokens: int,
    max_step_tokens: int,
    max_sampled: int,
) -> int:
    """An upper estimate of what one step allocates: activations, attention's scratch, and logits with their sorting.

    The widest moment of a layer holds the residual twice, q, k, v and the attention's output, or gate, up and their
    product; twice that, because an allocator keeps the one while the next is being made. Attention gathers one layer's
    K and V of the longest context, through a second buffer of that size; of shorter ones a few MiB at a time.
    Converted to float32 they are kept a third time, with queries and results: float16 on a CPU, and where scores are
    soft-capped, which also writes a tile of scores and its softmax. A card's attention wants its mask written out.
    """
    heads = (2 * shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    widest = 2 * shape.hidden_size + max(heads, 3 * shape.intermediate_size)
    activations = 2 * max_step_tokens * widest * dtype_bytes
    kv_bytes = KV_FORMATS[kv_dtype].bits // 8
    gathered = max(GATHER_BYTES, 2 * shape.num_kv_heads * shape.head_dim * kv_bytes * context_tokens)
    attention = 2 * gathered
    capped = shape.attention_softcap is not None
    if kv_bytes < 4 and (capped or (device == "cpu" and kv_dtype == "float16")):
        attention += gathered * 4 // kv_bytes + 3 * 4 * max_step_tokens * shape.num_heads * shape.head_dim
    if capped:
        attention += 2 * 4 * min(CAPPED_SCORES, shape.num_heads * max_step_tokens * context_tokens)
    if device == "card":
        attention += max_step_tokens * context_tokens * kv_bytes
    logits = max_sampled * shape.vocab_size * (4 + 4 + 8)  # float32, its softmax, and int64 sorting indices
    return activations + attention + logits


def graphs_bytes(shape: KVShape, *, device: DeviceKind, max_sequences: int) -> int:
    """What captured decode graphs would keep on a card, one for each power of two of sequences: an estimate."""
    if device == "cpu":
        return 0
    return shape.num_layers * GRAPH_NODES_PER_LAYER * GRAPH_NODE_BYTES * max_sequences.bit_length()


def headroom_bytes(total_bytes: int) -> int:
    """What is left to others and to surprises (Linux): 512 MiB or 6 %, whichever is more."""
    return max(512 * MIB, total_bytes * 6 // 100)


def decode_read_bytes(
    shape: ModelShape, *, weights: WeightBytes, kv_format: KVFormatName, block_size: int, context_tokens: int
) -> int:
    """The least that one decode step of one sequence reads: its weights once, and the keys and values it sees."""
    layer_token = KV_FORMATS[kv_format].block_bytes(shape, block_size) / block_size / shape.num_layers
    seen = sum(min(context_tokens, window or context_tokens) for window in shape.windows)
    return weights.step + int(layer_token * seen)


def beyond_window_bytes(shape: ModelShape, *, kv_format: KVFormatName, block_size: int, context_tokens: int) -> int:
    """What of a full context lies behind the windows of layers that have one: kept today, and never read again."""
    layer_block = KV_FORMATS[kv_format].block_bytes(shape, block_size) // shape.num_layers
    blocks = sum(max(0, context_tokens - window) // block_size for window in shape.windows if window is not None)
    return blocks * layer_block


def auto_kv_budget(*, device: DeviceKind, free_bytes: int, one_context_bytes: int, max_sequences: int) -> int:
    """The KV budget when none is set. `free_bytes`: what weights, workspace and headroom leave.

    A card is there for this: all of it. Main memory is shared: MAIN_MEMORY_KV_BYTES, or one full context where that is
    more; never more than half of what is free, nor than `max_sequences` full contexts, which is all that could be used.
    """
    if device == "card":
        return max(0, free_bytes)
    wanted = max(one_context_bytes, MAIN_MEMORY_KV_BYTES)
    return max(0, min(wanted, free_bytes // 2, max_sequences * one_context_bytes))


def plan_draft(
    draft: Draft,
    *,
    device: DeviceKind,
    free_bytes: int,
    block_size: int,
    context_tokens: int,
    max_sequences: int,
    max_step_tokens: int,
) -> DraftPlan:
    """A draft's share of `free_bytes`, which the target's weights and workspace leave.

    Unless told otherwise its pool gets DRAFT_KV_BYTES, at most a quarter of what is left, and never more than
    `max_sequences` full contexts could use.
    """
    weights = draft.weights or WeightBytes.assumed(draft.shape, draft.dtype)
    kv_format: KVDtypeName = draft.kv_format or draft.dtype
    context = min(context_tokens, draft.shape.max_position_embeddings)
    workspace = draft.workspace_bytes
    if workspace is None:
        workspace = workspace_bytes(
            draft.shape,
            device=device,
            dtype_bytes=DTYPE_BYTES[draft.dtype],
            kv_dtype=kv_format,
            context_tokens=context,
            max_step_tokens=max_step_tokens,
            max_sampled=max_sequences,
        )
    kv_bytes = draft.kv_bytes
    if kv_bytes is None:
        one = context_need_bytes(
            draft.shape,
            kv_format=kv_format,
            block_size=block_size,
            context_tokens=context,
            alignment=draft.kv_alignment,
        )
        left = free_bytes - weights.total - workspace
        kv_bytes = min(DRAFT_KV_BYTES, max_sequences * one, max(0, left) // 4)
    kv = plan_kv(
        draft.shape,
        kv_format=kv_format,
        block_size=block_size,
        budget_bytes=kv_bytes,
        alignment=draft.kv_alignment,
        page_bytes=CARD_PAGE_BYTES if device == "card" else 1,
    )
    return DraftPlan(weights, kv, draft.dtype, kv_format, workspace)


def plan_memory(
    shape: ModelShape,
    *,
    device: DeviceKind,
    total_bytes: int,
    dtype: DtypeName,
    kv_dtype: KVDtypeName,
    block_size: int,
    context_tokens: int,
    max_sequences: int,
    max_step_tokens: int,
    weights: WeightBytes | None = None,
    workspace: int | None = None,
    graphs: int | None = None,
    free_bytes: int | None = None,
    reserve_bytes: int | None = None,
    most_bytes: int | None = None,
    runtime_bytes: int | None = None,
    kv_budget: int | float | None = None,
    draft: Draft | None = None,
    kv_alignment: int = 1,
    max_proposed: int = 0,
) -> MemoryPlan:
    """Share the device's `total_bytes` out.

    Args:
        shape: the model.
        device: whether it is main memory or a card.
        total_bytes: all memory of the device.
        dtype: what the model computes in.
        kv_dtype: what its keys and values are kept in.
        block_size: tokens in a block.
        context_tokens: the longest request, prompt and output.
        max_sequences: sequences in one step.
        max_step_tokens: tokens in one step.
        weights: what the weights take; None for every parameter in `dtype`.
        workspace: bytes of one step; None for an estimate of what torch allocates.
        graphs: bytes of captured decode steps; None for an estimate.
        free_bytes: what of it no program holds; None for all.
        reserve_bytes: what to leave to others; None for the usual headroom of the whole device.
        most_bytes: the most that may be leased in all; None for no limit.
        runtime_bytes: what the process holds before the weights; None for an estimate.
        kv_budget: the pool in bytes (int), as a share of what is free (float), or None to choose.
        draft: a draft model beside it.
        kv_alignment: of the parts of a block, see `KVFormat.block_bytes`.
        max_proposed: proposed tokens in one step, of which each has logits of its own.
    """
    free = total_bytes if free_bytes is None else free_bytes
    kept_free = headroom_bytes(total_bytes) if reserve_bytes is None else reserve_bytes
    runtime = RUNTIME_BYTES[device] if runtime_bytes is None else runtime_bytes
    weights = weights or WeightBytes.assumed(shape, dtype)
    if workspace is None:
        workspace = workspace_bytes(
            shape,
            device=device,
            dtype_bytes=DTYPE_BYTES[dtype],
            kv_dtype=kv_dtype,
            context_tokens=context_tokens,
            max_step_tokens=max_step_tokens,
            max_sampled=max_sequences + max_proposed,
        )
    if graphs is None:
        graphs = graphs_bytes(shape, device=device, max_sequences=max_sequences)
    room, most = free - kept_free, total_bytes if most_bytes is None else most_bytes
    left = min(room, most) - runtime - weights.total - workspace - graphs
    drafted = None
    if draft is not None:
        drafted = plan_draft(
            draft,
            device=device,
            free_bytes=left,
            block_size=block_size,
            context_tokens=context_tokens,
            max_sequences=max_sequences,
            max_step_tokens=max_step_tokens,
        )
        left -= drafted.num_bytes
    if kv_budget is None:
        one_context = context_need_bytes(
            shape, kv_format=kv_dtype, block_size=block_size, context_tokens=context_tokens, alignment=kv_alignment
        )
        budget = auto_kv_budget(
            device=device, free_bytes=left, one_context_bytes=one_context, max_sequences=max_sequences
        )
    else:
        budget = kv_budget if isinstance(kv_budget, int) else int(free * kv_budget)
    kv = plan_kv(
        shape,
        kv_format=kv_dtype,
        block_size=block_size,
        budget_bytes=budget,
        alignment=kv_alignment,
        page_bytes=CARD_PAGE_BYTES if device == "card" else 1,
    )
    ceiling = kv.num_blocks
    if kv_budget is None and device == "card":
        # What others hold now may be free later; their room is grown into then, and never before.
        grown = left + min(total_bytes - kept_free, most) - min(room, most)
        ceiling = max(ceiling, grown // kv.block_bytes)
    return MemoryPlan(
        device=device,
        total_bytes=total_bytes,
        others_bytes=total_bytes - free,
        headroom_bytes=kept_free,
        most_bytes=most_bytes,
        runtime_bytes=runtime,
        weights=weights,
        workspace_bytes=workspace,
        graphs_bytes=graphs,
        kv=kv,
        ceiling_blocks=ceiling,
        context_tokens=context_tokens,
        dtype=dtype,
        kv_dtype=kv_dtype,
        draft=drafted,
    )
