"""The plan of a device's memory: what each part takes, and what is left or missing.

    device memory = others + headroom + budget              (less where `vram_budget` allows less)
    budget        = runtime + weights + workspace + graphs + draft (weights, workspace, KV) + KV pool + unused

Runs in: anywhere; owns: nothing.
"""

from dataclasses import dataclass

from edgekv.core.draft_plan import DraftPlan
from edgekv.core.dtype_choice import DeviceKind, DtypeName
from edgekv.core.kv_format import KVDtypeName, KVPlan
from edgekv.core.model_shape import WeightBytes


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
