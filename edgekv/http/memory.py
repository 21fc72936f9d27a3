"""/api/edgekv/memory: who owns which byte of the device, as JSON. Runs in: anywhere; owns: nothing."""

from typing import Any

from edgekv.actors.service import MemoryView
from edgekv.core.reading import Reading
from edgekv.core.step import EngineStats, MemoryStats, PoolStats
from edgekv.http.speculation import speculation_json

UNLEASED, OTHERS, FREE = "unleased", "others", "free"


def owners(reading: Reading, memory: MemoryStats | None) -> dict[str, int]:
    """The device's bytes by owner: our leases by name, `unleased`, `others` and `free`, which make up all of it.

    What is leased and not touched yet is its lease's; what is ours beyond the leases is `unleased`.
    """
    leases = {} if memory is None else memory.leases
    leased = sum(leases.values())
    others = reading.others_bytes(leased)
    own = leased if reading.own_bytes is None else reading.own_bytes
    shares = {**leases, UNLEASED: max(0, own - leased), OTHERS: others}
    # Others may take, between two readings, what is leased and not touched: then there is no free memory, not less.
    return {**shares, FREE: max(0, reading.total_bytes - sum(shares.values()))}


def memory_json(view: MemoryView | None, stats: EngineStats | None) -> dict[str, Any]:
    """The whole statement; what is not known is null. `view`: None where nobody watches the device."""
    memory = view.memory if view is not None else None
    pool = view.pool if view is not None else None
    if stats is not None:
        memory, pool = memory or stats.memory, pool or stats.pool
    reading = None if view is None else view.reading
    decision = None if view is None else view.decision
    return {
        "device": None if view is None else view.device,
        "headroom_bytes": None if view is None else view.headroom_bytes,
        "state": None if decision is None else decision.condition.state.value,
        "reason": None if decision is None else decision.condition.reason,
        "problem": None if view is None else view.problem,
        "owners": None if reading is None else owners(reading, memory),
        "reading": None if reading is None or view is None else _reading(reading, view.age_s),
        "decision": None if decision is None else {
            "budget_bytes": decision.budget_bytes,
            "others_bytes": decision.others_bytes,
            "others_peak_bytes": decision.others_peak_bytes,
            "patience_s": decision.patience_s,
            "hold": decision.hold,
            "spilled_bytes": decision.condition.spilled_bytes,
            "unreturned_bytes": decision.unreturned_bytes,
            "next_poll_s": decision.next_poll_s,
        },
        "ledger": None if memory is None else _ledger(memory),
        "pool": None if pool is None else _pool(pool, memory),
        "speculation": speculation_json(stats),
        "events": [
            {"at": event.at, "kind": event.kind, "num_bytes": event.num_bytes, "detail": event.detail}
            for event in (() if view is None else view.events)
        ],
    }  # fmt: skip


def _reading(reading: Reading, age_s: float | None) -> dict[str, Any]:
    return {
        "source": reading.source,
        "age_s": age_s,
        "stale": reading.stale,
        "unified": reading.unified,
        "total_bytes": reading.total_bytes,
        "used_bytes": reading.used_bytes,
        "free_bytes": reading.free_bytes,
        "own_bytes": reading.own_bytes,
        "spilled_own_bytes": reading.spilled_own_bytes,
        "gtt_used_bytes": reading.gtt_used_bytes,
        "evicted_ms": reading.evicted_ms,
        "major_faults": reading.major_faults,
        "holders": [
            {"pid": holder.pid, "name": holder.name, "num_bytes": holder.num_bytes} for holder in reading.holders
        ],
    }


def _ledger(memory: MemoryStats) -> dict[str, Any]:
    return {
        "budget_bytes": memory.budget_bytes,
        "wanted_budget_bytes": memory.wanted_budget_bytes,
        "leased_bytes": sum(memory.leases.values()),
        "leases": memory.leases,
        "earmarks": {
            name: {"within": within, "num_bytes": num_bytes} for name, (within, num_bytes) in memory.earmarks.items()
        },
        "held": memory.held,
    }


def _pool(pool: PoolStats, memory: MemoryStats | None) -> dict[str, Any]:
    blocks = {
        "block_size": pool.block_size,
        "total_blocks": pool.total_blocks,
        "free_blocks": pool.free_blocks,
        "cached_blocks": pool.cached_blocks,
        "active_blocks": pool.active_blocks,
    }
    if memory is None:
        return blocks
    facts = memory.facts
    return blocks | {
        "kv_bytes": facts.kv_bytes,
        "ceiling_bytes": facts.ceiling_bytes,
        "floor_bytes": facts.floor_bytes,
        "segment_bytes": facts.segment_bytes,
        "given_back_bytes": facts.given_back_bytes,
        "taken_bytes": facts.taken_bytes,
        "num_resizes": facts.num_resizes,
    }
