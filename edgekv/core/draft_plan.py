"""A draft model's share of the memory that its target leaves. Runs in: anywhere; owns: nothing."""

from dataclasses import dataclass

from edgekv.config.units import GIB
from edgekv.core.demand import Demand
from edgekv.core.dtype_choice import DtypeName
from edgekv.core.kv_format import KVDtypeName, KVPlan
from edgekv.core.model_shape import ModelShape, WeightBytes

DRAFT_KV_BYTES = 1 * GIB
WEIGHTS_LEASE, WORKSPACE_LEASE, DRAFT_KV_LEASE = DRAFT_LEASES = ("weights.draft", "workspace.draft", "kv.draft")


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

    def demand(self, target: Demand) -> Demand:
        """What is asked of it beside a `target`: sequences and steps like the target's, as far as its positions go."""
        return Demand(
            shape=self.shape,
            device=target.device,
            dtype=self.dtype,
            kv_dtype=self.kv_format or self.dtype,
            block_size=target.block_size,
            context_tokens=min(target.context_tokens, self.shape.max_position_embeddings),
            max_sequences=target.max_sequences,
            max_step_tokens=target.max_step_tokens,
            kv_alignment=self.kv_alignment,
        )


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


def plan_draft(draft: Draft, target: Demand, *, free_bytes: int) -> DraftPlan:
    """A draft's share of `free_bytes`, which the target's weights and workspace leave.

    Unless told otherwise its pool gets DRAFT_KV_BYTES, at most a quarter of what is left, and never more than
    `target.max_sequences` full contexts could use.
    """
    demand = draft.demand(target)
    weights = draft.weights or WeightBytes.assumed(draft.shape, draft.dtype)
    workspace = demand.workspace_bytes if draft.workspace_bytes is None else draft.workspace_bytes
    kv_bytes = draft.kv_bytes
    if kv_bytes is None:
        left = free_bytes - weights.total - workspace
        kv_bytes = min(DRAFT_KV_BYTES, demand.max_sequences * demand.one_context_bytes, max(0, left) // 4)
    return DraftPlan(weights, demand.pool(kv_bytes), draft.dtype, demand.kv_dtype, workspace)
