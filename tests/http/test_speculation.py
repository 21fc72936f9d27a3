"""How speculation goes, as /api/edgekv/memory and /metrics tell it."""

from dataclasses import asdict, replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from edgekv.core.step import PoolStats, SpeculationState, SpeculationStats
from tests.http.fakes import ScriptedService, calling

DRAFTS = SpeculationStats(
    method="model", state=SpeculationState.ON, tokens=3.25, acceptance=0.62, speedup=1.5, verifications=20, pauses=4,
    yields=3, returns=2, read_tokens=700,
    pool=PoolStats(total_blocks=40, free_blocks=25, cached_blocks=10, active_blocks=5, block_size=16),
    drafter="small", most_tokens=8, tokens_a_step=2.75,
)  # fmt: skip
NEW = replace(
    DRAFTS, method="ngram", tokens=0.0, acceptance=None, speedup=None, pool=None, drafter=None, tokens_a_step=None
)


async def metrics_of(stats: SpeculationStats | None) -> dict[tuple[str, str], float]:
    """Values by name and state, for those of speculation."""
    async with calling(ScriptedService(speculation=stats)) as http:
        text = (await http.get("/metrics")).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    told = [each for each in samples if any(word in each.name for word in ("spec", "draft"))]
    assert all(each.labels["model_name"] == "scripted" for each in told)
    return {(each.name, each.labels.get("state", "")): each.value for each in told}


async def test_the_counters_have_vllms_names_and_the_rest_its_own():
    assert await metrics_of(DRAFTS) == {
        ("vllm:spec_decode_num_drafts_total", ""): 20,
        ("vllm:spec_decode_num_draft_tokens_total", ""): 50,
        ("vllm:spec_decode_num_accepted_tokens_total", ""): 31,
        ("edgekv_speculation_pauses_total", ""): 4,
        ("edgekv_speculation_yields_total", ""): 3,
        ("edgekv_speculation_returns_total", ""): 2,
        ("edgekv_draft_read_tokens_total", ""): 700,
        ("edgekv_speculation_tokens", ""): 3.25,
        ("edgekv_speculation_acceptance", ""): 0.62,
        ("edgekv_speculation_speedup", ""): 1.5,
        ("edgekv_speculation_tokens_a_step", ""): 2.75,
        ("edgekv_draft_kv_blocks", ""): 40,
        ("edgekv_draft_kv_blocks_free", ""): 25,
        ("edgekv_draft_kv_blocks_cached", ""): 10,
        ("edgekv_draft_kv_blocks_active", ""): 5,
        ("edgekv_speculation_state", "on"): 1,
        ("edgekv_speculation_state", "paused"): 0,
        ("edgekv_speculation_state", "yielded"): 0,
        ("edgekv_speculation_state", "off"): 0,
    }


async def test_what_was_not_measured_is_not_made_up():
    names = {name for name, _ in await metrics_of(NEW)}
    assert "edgekv_speculation_tokens" in names
    measured = {f"edgekv_speculation_{name}" for name in ("acceptance", "speedup", "tokens_a_step")}
    assert not names & {*measured, "edgekv_draft_kv_blocks"}
    assert await metrics_of(None) == {}


@pytest.mark.parametrize("state", list(SpeculationState))
async def test_one_state_at_a_time(state: SpeculationState) -> None:
    told = await metrics_of(replace(DRAFTS, state=state))
    states = {of: value for (name, of), value in told.items() if name == "edgekv_speculation_state"}
    assert states == {each.value: float(each is state) for each in SpeculationState}


async def test_the_statement_says_how_it_goes():
    async with calling(ScriptedService(speculation=replace(DRAFTS, detail="why"))) as http:
        told = (await http.get("/api/edgekv/memory")).json()["speculation"]
    assert told == asdict(DRAFTS) | {"state": "on", "detail": "why", "proposed_tokens": 50, "accepted_tokens": 31}
    async with calling() as http:
        assert (await http.get("/api/edgekv/memory")).json()["speculation"] is None
