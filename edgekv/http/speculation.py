"""How speculation goes, as JSON and as metrics (vLLM's names where it has one). Runs in: anywhere; owns: nothing."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from edgekv.core.step import EngineStats, SpeculationState
from edgekv.http.families import of_model


def speculation_json(stats: EngineStats | None) -> dict[str, Any] | None:
    """What `SpeculationStats` says, and what was proposed and accepted in all; null where nobody ever proposes."""
    if stats is None or stats.speculation is None:
        return None
    counts = {"proposed_tokens": stats.proposed_tokens, "accepted_tokens": stats.accepted_tokens}
    return asdict(stats.speculation) | counts


def speculation_metrics(model: str, stats: EngineStats) -> Iterator[Metric]:
    """None where nobody ever proposes."""
    told = stats.speculation
    if told is None:
        return
    counters = [
        ("vllm:spec_decode_num_drafts", "Proposals for a sequence that were verified.", told.verifications),
        ("vllm:spec_decode_num_draft_tokens", "Proposed tokens that were verified.", stats.proposed_tokens),
        ("vllm:spec_decode_num_accepted_tokens", "Proposed tokens that were accepted.", stats.accepted_tokens),
        ("edgekv_speculation_pauses", "Times that speculation stopped because it did not pay.", told.pauses),
        ("edgekv_speculation_yields", "Times that it gave its memory back.", told.yields),
        ("edgekv_speculation_returns", "Times that it had its memory again.", told.returns),
        ("edgekv_draft_read_tokens", "Tokens that the draft model read of what it had not seen.", told.read_tokens),
    ]
    yield from of_model(CounterMetricFamily, model, counters)
    gauges: list[tuple[str, str, float | None]] = [
        ("edgekv_speculation_tokens", "Tokens proposed for a sequence in recent steps.", told.tokens),
        ("edgekv_speculation_acceptance", "Share of proposed tokens accepted, when last tried.", told.acceptance),
        ("edgekv_speculation_speedup", "Tokens a second against those without, when last tried.", told.speedup),
        ("edgekv_speculation_tokens_a_step", "Tokens of a verifying step, when last tried.", told.tokens_a_step),
    ]
    if told.pool is not None:
        pool = told.pool
        gauges += [
            ("edgekv_draft_kv_blocks", "KV blocks of the draft model's pool.", pool.total_blocks),
            ("edgekv_draft_kv_blocks_free", "Of these, those that hold nothing.", pool.free_blocks),
            ("edgekv_draft_kv_blocks_cached", "Of these, those that only its prefix cache holds.", pool.cached_blocks),
            ("edgekv_draft_kv_blocks_active", "Of these, those that sequences hold.", pool.active_blocks),
        ]
    measured = [(name, documentation, value) for name, documentation, value in gauges if value is not None]
    yield from of_model(GaugeMetricFamily, model, measured)
    states = GaugeMetricFamily(
        "edgekv_speculation_state", "1 for the present state of speculation.", labels=["model_name", "state"]
    )
    for state in SpeculationState:
        states.add_metric([model, state.value], int(state is told.state))
    yield states
