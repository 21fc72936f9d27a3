"""Who owns the device's memory, as /api/edgekv/memory and /metrics tell it, and what clients hear when it is short."""

from dataclasses import replace

import pytest
import trio
from openai import OpenAI, RateLimitError
from prometheus_client.parser import text_string_to_metric_families

from edgekv.actors.service import MemoryEvent, MemoryView
from edgekv.actors.stream import Failed
from edgekv.core.pressure import Decision, PoolFacts
from edgekv.core.reading import Holder, Reading
from edgekv.core.spill import Condition, State
from edgekv.core.step import MemoryStats, PoolStats, SpeculationState, SpeculationStats
from edgekv.http.memory import owners
from edgekv.http.settings import ApiKey
from tests.http.fakes import ScriptedService, calling, card, running

MIB, GIB = 1 << 20, 1 << 30

FACTS = PoolFacts(
    kv_bytes=6 * GIB, leased_bytes=9 * GIB, segment_bytes=64 * MIB, ceiling_bytes=8 * GIB, floor_bytes=128 * MIB,
    given_back_bytes=2 * GIB, taken_bytes=1 * GIB, num_resizes=5,
)  # fmt: skip
MEMORY = MemoryStats(
    leases={"weights": 2 * GIB, "workspace": 1 * GIB, "kv.target": 6 * GIB},
    budget_bytes=10 * GIB, wanted_budget_bytes=9 * GIB, facts=FACTS,
    earmarks={"prefix.pinned": ("kv.target", 128 * MIB)}, held=True,
)  # fmt: skip
READING = Reading(
    total_bytes=16 * GIB, used_bytes=13 * GIB, own_bytes=9 * GIB, source="nvml", at=5.0, spilled_own_bytes=3 * MIB,
    holders=(Holder(7, "game", 4 * GIB), Holder(8, "compositor", None)),
)  # fmt: skip
DECISION = Decision(
    condition=Condition(State.PRESSURE, "700 MiB free, headroom 983 MiB"), budget_bytes=9 * GIB,
    others_bytes=4 * GIB, others_peak_bytes=5 * GIB, hold=True, patience_s=20.0, next_poll_s=0.1,
)  # fmt: skip
VIEW = MemoryView(
    device="GeForce RTX 4080", headroom_bytes=GIB, reading=READING, age_s=0.25, decision=DECISION, memory=MEMORY,
    pool=PoolStats(total_blocks=100, free_blocks=60, cached_blocks=15, active_blocks=25, block_size=16),
    events=(MemoryEvent(1_700_000_000.0, "shrunk", 2 * GIB, "gave 2 GiB back"),),
)  # fmt: skip


async def test_the_statement_says_who_owns_every_byte():
    async with calling(ScriptedService(watched=VIEW)) as http:
        told = (await http.get("/api/edgekv/memory")).json()
    assert (told["device"], told["state"], told["reason"]) == (
        "GeForce RTX 4080",
        "pressure",
        "700 MiB free, headroom 983 MiB",
    )
    assert told["owners"] == {
        "weights": 2 * GIB, "workspace": GIB, "kv.target": 6 * GIB, "unleased": 0, "others": 4 * GIB, "free": 3 * GIB,
    }  # fmt: skip
    assert sum(told["owners"].values()) == told["reading"]["total_bytes"] == 16 * GIB
    assert told["reading"]["holders"] == [
        {"pid": 7, "name": "game", "num_bytes": 4 * GIB},
        {"pid": 8, "name": "compositor", "num_bytes": None},
    ]
    assert (told["reading"]["age_s"], told["reading"]["spilled_own_bytes"], told["headroom_bytes"]) == (
        0.25,
        3 * MIB,
        GIB,
    )
    assert told["ledger"]["leased_bytes"] == 9 * GIB
    assert (told["ledger"]["budget_bytes"], told["ledger"]["wanted_budget_bytes"]) == (10 * GIB, 9 * GIB)
    assert told["ledger"]["earmarks"] == {"prefix.pinned": {"within": "kv.target", "num_bytes": 128 * MIB}}
    assert told["ledger"]["held"] is True
    assert (told["decision"]["others_peak_bytes"], told["decision"]["patience_s"]) == (5 * GIB, 20.0)
    assert (told["pool"]["active_blocks"], told["pool"]["ceiling_bytes"], told["pool"]["num_resizes"]) == (
        25,
        8 * GIB,
        5,
    )
    assert told["events"] == [
        {"at": 1_700_000_000.0, "kind": "shrunk", "num_bytes": 2 * GIB, "detail": "gave 2 GiB back"}
    ]


@pytest.mark.parametrize(
    ("reading", "unleased", "others", "free"),
    [
        (READING, 0, 4, 3),
        (replace(READING, own_bytes=11 * GIB), 2, 2, 3),  # more is ours than the leases say
        (replace(READING, own_bytes=8 * GIB), 0, 5, 2),  # leased, and not touched yet
        (replace(READING, own_bytes=1 * GIB, used_bytes=10 * GIB), 0, 9, 0),  # others took what was not touched
        (replace(READING, own_bytes=None), 0, 4, 3),  # a driver that does not tell
    ],
)
def test_owners_add_up_to_the_device_or_to_what_is_promised(
    reading: Reading, unleased: int, others: int, free: int
) -> None:
    told = owners(reading, MEMORY)
    assert (told["unleased"], told["others"], told["free"]) == (unleased * GIB, others * GIB, free * GIB)
    assert sum(told.values()) == max(reading.total_bytes, 9 * GIB + told["others"])


async def test_without_a_guard_the_statement_is_what_the_engine_knows():
    async with calling() as http:
        told = (await http.get("/api/edgekv/memory")).json()
    assert (told["device"], told["state"], told["reading"], told["owners"], told["events"]) == (
        None, None, None, None, [],
    )  # fmt: skip
    assert told["pool"]["total_blocks"] == 100


async def test_the_statement_is_for_those_with_a_key():
    async with calling(api_keys=(ApiKey("laptop", "a long secret"),)) as http:
        assert (await http.get("/api/edgekv/memory")).status_code == 401
        answer = await http.get("/api/edgekv/memory", headers={"authorization": "Bearer a long secret"})
    assert answer.status_code == 200


async def test_the_metrics_follow_the_device():
    async with calling(ScriptedService(watched=VIEW)) as http:
        text = (await http.get("/metrics")).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def values(name: str, label: str) -> dict[str, float]:
        return {s.labels[label]: s.value for s in samples if s.name == name}

    def value(name: str) -> float:
        return next(s.value for s in samples if s.name == name)

    by_owner = values("edgekv_device_memory_bytes", "owner")
    assert by_owner == {name: float(num_bytes) for name, num_bytes in owners(READING, MEMORY).items()}
    assert values("edgekv_device_state", "state") == {
        "ok": 0, "pressure": 1, "critical": 0, "thrash": 0, "spilled": 0,
    }  # fmt: skip
    assert value("edgekv_device_spilled_bytes") == 3 * MIB
    assert value("edgekv_device_headroom_bytes") == GIB
    assert value("edgekv_pool_given_back_bytes_total") == 2 * GIB
    assert value("edgekv_pool_taken_bytes_total") == GIB
    assert value("edgekv_reading_age_seconds") == 0.25
    assert value("edgekv_ledger_budget_bytes") == 10 * GIB
    assert value("edgekv_kv_ceiling_bytes") == 8 * GIB


@pytest.mark.parametrize("method", ["model", "ngram", None])
async def test_what_a_draft_gave_back_reads_nothing(method: str | None) -> None:
    held = replace(MEMORY, leases=MEMORY.leases | {"kv.draft": GIB})
    stats = None if method is None else SpeculationStats(method, SpeculationState.YIELDED)
    for memory, bytes_held in ((MEMORY, 0), (held, GIB)):
        async with calling(ScriptedService(watched=replace(VIEW, memory=memory), speculation=stats)) as http:
            text = (await http.get("/metrics")).text
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        owned = {s.labels["owner"]: s.value for s in samples if s.name == "edgekv_device_memory_bytes"}
        drafts = {name: num_bytes for name, num_bytes in owned.items() if name.endswith(".draft")}
        told = {"kv.draft": bytes_held} if bytes_held else {}
        none = {"weights.draft": 0, "workspace.draft": 0, "kv.draft": 0} if method == "model" else {}
        assert drafts == none | told


async def test_nobody_watches_nothing_is_made_up():
    async with calling() as http:
        text = (await http.get("/metrics")).text
    assert "edgekv_device" not in text
    assert "edgekv_ledger" not in text


async def test_a_degraded_server_still_takes_requests():
    async with calling(ScriptedService(degraded="no reading of the device for 40 s")) as http:
        answer = await http.get("/health")
    assert answer.status_code == 200
    assert answer.json() == {"status": "degraded", "detail": "no reading of the device for 40 s"}


TOO_LATE = Failed("kv_cache_full", "This request has waited 600 s. Try again in 42 s.", 41.2)


async def test_who_has_waited_too_long_gets_429_and_when_to_come_back():
    async with calling(ScriptedService(fails_after=0, failure=TOO_LATE)) as http:
        answer = await http.post("/v1/completions", json={"prompt": "abc"})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "42")
    assert answer.json()["error"] == {
        "message": TOO_LATE.message, "type": "rate_limit_error", "param": None, "code": "kv_cache_full",
    }  # fmt: skip


async def test_a_stream_that_has_waited_too_long_ends_with_the_error():
    async with running(ScriptedService(fails_after=0, failure=TOO_LATE)) as server:

        def ask() -> str:
            with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
                stream = client.chat.completions.create(
                    model="scripted", messages=[{"role": "user", "content": "Hi"}], stream=True
                )
                with pytest.raises(Exception, match="This request has waited 600 s") as caught:
                    list(stream)
            return str(getattr(caught.value, "code", None))

        assert await trio.to_thread.run_sync(ask) == "kv_cache_full"


async def test_openais_client_sees_a_rate_limit():
    async with running(ScriptedService(fails_after=0, failure=TOO_LATE)) as server:

        def ask() -> None:
            with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
                client.completions.create(model="scripted", prompt="Hi")

        with pytest.raises(RateLimitError, match="Try again in 42 s"):
            await trio.to_thread.run_sync(ask)


async def test_an_answer_without_max_tokens_is_clipped_to_the_pool_as_it_is():
    service = ScriptedService(served=card(pool_tokens=100, most_pool_tokens=5000))
    async with calling(service) as http:
        answer = await http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x" * 40}]})
        assert answer.status_code == 200
        [draft] = service.drafts
        assert draft.needed_tokens == 100
        # Nothing is left of the pool as it is: whether it may wait for more is the service's to say.
        await http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x" * 200}]})
        assert service.drafts[-1].sampling.max_tokens == 1
        over = await http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x" * 5000}]})
    assert (over.status_code, over.json()["error"]["code"]) == (400, "context_length_exceeded")


MISS = "diverged: at token 3 of block 2 from the longest match"


async def test_an_answer_says_why_the_prefix_cache_gave_no_more():
    service = ScriptedService(cached_tokens=32, miss=MISS)
    chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    async with calling(service) as http:
        whole = (await http.post("/v1/chat/completions", json=chat)).json()
        text = (await http.post("/v1/completions", json={"prompt": ["a", "b"], "n": 2, "max_tokens": 2})).json()
    told = {"prefix_miss": MISS, "cached_tokens": 32}
    assert whole["edgekv"] == told
    assert whole["usage"]["prompt_tokens_details"] == {"cached_tokens": 32}
    assert text["edgekv"] == {"prompts": [told, told]}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("with_usage", [False, True])
async def test_a_streams_last_chunk_says_it_too(path: str, with_usage: bool) -> None:
    body = {"max_tokens": 4, "stream": True, "stream_options": {"include_usage": with_usage}}
    body |= {"messages": [{"role": "user", "content": "Hi"}]} if "chat" in path else {"prompt": "Hi"}
    async with calling(ScriptedService(cached_tokens=32, miss=MISS)) as http:
        lines = (await http.post(path, json=body)).text.split("\n\n")
    chunks = [line for line in lines if '"edgekv"' in line]
    assert len(chunks) == 1
    assert lines[-3:] == [chunks[0], "data: [DONE]", ""]
    assert f'"edgekv":{{"prefix_miss":"{MISS}","cached_tokens":32}}' in chunks[0]
