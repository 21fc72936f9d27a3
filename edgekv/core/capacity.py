"""How much fits: the arithmetic that `edgekv plan` prints and the loader follows. Runs in: anywhere; owns: nothing.

Both use these functions with the same inputs, so what is promised before loading is what is there afterwards.
"""

from edgekv.config.units import GIB, MIB
from edgekv.core.demand import Demand
from edgekv.core.draft_plan import Draft, plan_draft
from edgekv.core.dtype_choice import DeviceKind
from edgekv.core.memory_plan import MemoryPlan
from edgekv.core.model_shape import WeightBytes

MAIN_MEMORY_KV_BYTES = 4 * GIB  # a share that leaves a desktop with 16 GiB its memory

# What a process holds before any weight: on a card the driver's context and the libraries' code (an estimate: 300 to
# 600 MiB are reported); in main memory the interpreter with torch (170 MiB of its own with torch 2.13).
RUNTIME_BYTES: dict[DeviceKind, int] = {"cpu": 192 * MIB, "card": 512 * MIB}


def headroom_bytes(total_bytes: int) -> int:
    """What is left to others and to surprises (Linux): 512 MiB or 6 %, whichever is more."""
    return max(512 * MIB, total_bytes * 6 // 100)


def auto_kv_budget(*, device: DeviceKind, free_bytes: int, one_context_bytes: int, max_sequences: int) -> int:
    """The KV budget when none is set. `free_bytes`: what weights, workspace and headroom leave.

    A card is there for this: all of it. Main memory is shared: MAIN_MEMORY_KV_BYTES, or one full context where that is
    more; never more than half of what is free, nor than `max_sequences` full contexts, which is all that could be used.
    """
    if device == "card":
        return max(0, free_bytes)
    wanted = max(one_context_bytes, MAIN_MEMORY_KV_BYTES)
    return max(0, min(wanted, free_bytes // 2, max_sequences * one_context_bytes))


def plan_memory(
    demand: Demand,
    *,
    total_bytes: int,
    weights: WeightBytes | None = None,
    workspace: int | None = None,
    graphs: int | None = None,
    free_bytes: int | None = None,
    reserve_bytes: int | None = None,
    most_bytes: int | None = None,
    runtime_bytes: int | None = None,
    kv_budget: int | float | None = None,
    draft: Draft | None = None,
) -> MemoryPlan:
    """Share the device's `total_bytes` out.

    Args:
        demand: the model, and what it is to serve on which device.
        total_bytes: all memory of the device.
        weights: what the weights take; None for every parameter in the demand's dtype.
        workspace: bytes of one step; None for an estimate of what torch allocates.
        graphs: bytes of captured decode steps; None for an estimate.
        free_bytes: what of it no program holds; None for all.
        reserve_bytes: what to leave to others; None for the usual headroom of the whole device.
        most_bytes: the most that may be leased in all; None for no limit.
        runtime_bytes: what the process holds before the weights; None for an estimate.
        kv_budget: the pool in bytes (int), as a share of what is free (float), or None to choose.
        draft: a draft model beside it.
    """
    free = total_bytes if free_bytes is None else free_bytes
    kept_free = headroom_bytes(total_bytes) if reserve_bytes is None else reserve_bytes
    runtime = RUNTIME_BYTES[demand.device] if runtime_bytes is None else runtime_bytes
    weights = weights or WeightBytes.assumed(demand.shape, demand.dtype)
    workspace = demand.workspace_bytes if workspace is None else workspace
    graphs = demand.graphs_bytes if graphs is None else graphs
    room, most = free - kept_free, total_bytes if most_bytes is None else most_bytes
    left = min(room, most) - runtime - weights.total - workspace - graphs
    drafted = None
    if draft is not None:
        drafted = plan_draft(draft, demand, free_bytes=left)
        left -= drafted.num_bytes
    if kv_budget is None:
        budget = auto_kv_budget(
            device=demand.device,
            free_bytes=left,
            one_context_bytes=demand.one_context_bytes,
            max_sequences=demand.max_sequences,
        )
    else:
        budget = kv_budget if isinstance(kv_budget, int) else int(free * kv_budget)
    kv = demand.pool(budget)
    ceiling = kv.num_blocks
    if kv_budget is None and demand.device == "card":
        # What others hold now may be free later; their room is grown into then, and never before.
        grown = left + min(total_bytes - kept_free, most) - min(room, most)
        ceiling = max(ceiling, grown // kv.block_bytes)
    return MemoryPlan(
        device=demand.device,
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
        context_tokens=demand.context_tokens,
        dtype=demand.dtype,
        kv_dtype=demand.kv_dtype,
        draft=drafted,
    )
