"""The guard reads, decides and orders in time, whatever the driver and the engine do, and never stands in the way."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import trio
import trio.testing

from edgekv.actors.engine import Phase
from edgekv.actors.service import MemoryView
from edgekv.actors.stream import TokenStream
from edgekv.actors.vram import BLIND_S, LEAST_PERIOD_S
from edgekv.core.pressure import CALM_S, FROZEN_S, WATCHFUL_S, Decision
from edgekv.core.sequence import FinishReason
from edgekv.core.spill import State
from edgekv.core.step import Finished, Resize, StepPlan
from tests.actors.fakes import FakeCore, Rig, make_draft, makes, read_all, token_ids
from tests.actors.guarded import UNIX_TIME, Guarded
from tests.actors.simulated_card import BLOCK_SIZE, GIB, MIB, SEGMENT_BYTES, SimulatedCard, SimulatedEngine

Clock = trio.testing.MockClock
ONE_STEP_S = 0.01


async def finish(streams: list[TokenStream], max_tokens: int, within_s: float = 600) -> None:
    """All of them end by themselves, with all their tokens."""
    for stream in streams:
        events = await read_all(stream, within_s)
        assert events[-1] == Finished(stream.sequence_id, FinishReason.LENGTH)
        assert len(token_ids(events)) == max_tokens


async def until(server: Guarded, wanted: Callable[[MemoryView], bool]) -> None:
    """The guard's view is as wanted."""
    with trio.fail_after(60):
        await server.watch.view.wait_for(wanted)


async def phase(server: Guarded, wanted: Phase) -> None:
    with trio.fail_after(60):
        await server.engine.status.wait_for(lambda status: status.phase is wanted)


def orders_of(server: Guarded, monkeypatch: pytest.MonkeyPatch) -> list[Resize]:
    """What the engine is told from now on."""
    orders: list[Resize] = []
    insist = server.engine.insist

    def listen(message: Any) -> None:
        if isinstance(message, Resize):
            orders.append(message)
        insist(message)

    monkeypatch.setattr(server.engine, "insist", listen)
    return orders


async def test_a_calm_card_is_read_once_a_second_and_ten_times_while_requests_are_open(autojump_clock: Clock) -> None:
    async with Guarded(SimulatedCard(others_bytes=8 * GIB)).running() as server:
        await trio.sleep(3)
        before = server.card.num_reads
        await trio.sleep(30)
        assert server.card.num_reads - before == pytest.approx(30 / CALM_S, abs=1)
        streams = await server.service.open([make_draft(1000)])
        before = server.card.num_reads
        await trio.sleep(5)
        assert server.card.num_reads - before == pytest.approx(5 / WATCHFUL_S, abs=2)
        await finish(streams, 1000)


async def test_the_first_request_does_not_wait_for_the_next_reading_to_be_due(autojump_clock: Clock) -> None:
    async with Guarded(SimulatedCard(others_bytes=8 * GIB)).running() as server:
        await trio.sleep(5.3)
        opened_at = trio.current_time()
        streams = await server.service.open([make_draft(50)])
        await until(server, lambda view: view.reading is not None and view.reading.at >= opened_at)
        assert trio.current_time() - opened_at <= LEAST_PERIOD_S
        await finish(streams, 50)


async def test_sequences_that_wait_for_an_empty_pool_need_not_wait_until_all_is_well(autojump_clock: Clock) -> None:
    """Between headroom and calm nothing else grows."""
    card = SimulatedCard()
    async with Guarded(card).running() as server:
        streams = await server.service.open([make_draft(300, prompt_tokens=100 + i) for i in range(4)])
        await trio.sleep(1)
        headroom, other_leases = server.policy.headroom, card.own_bytes - card.kv_bytes
        card.others_bytes = card.total_bytes - other_leases - headroom.critical_bytes
        await trio.sleep(20)
        assert card.kv_bytes == 0
        card.others_bytes = card.total_bytes - other_leases - headroom.num_bytes - headroom.width_bytes // 2
        await finish(streams, 300)
        assert all(event.detail.split(":")[0] != "ok" for event in server.told("state"))


async def test_requests_that_come_and_go_quickly_do_not_make_it_read_without_pause(autojump_clock: Clock) -> None:
    async with Guarded(SimulatedCard(others_bytes=8 * GIB)).running() as server:
        await trio.sleep(5)
        before, began = server.card.num_reads, trio.current_time()
        for _ in range(100):
            await finish(await server.service.open([make_draft(1)]), 1)
        elapsed_s = trio.current_time() - began
        assert server.card.num_reads - before <= elapsed_s / LEAST_PERIOD_S + 2


async def test_a_game_that_starts_gets_its_memory_within_a_period_and_a_step_and_nobody_loses_a_request(
    autojump_clock: Clock,
) -> None:
    card = SimulatedCard()
    async with Guarded(card).running() as server:
        streams = await server.service.open([make_draft(1500, prompt_tokens=200 + i) for i in range(12)])
        await trio.sleep(3)
        kv_before = card.kv_bytes
        card.others_bytes += 9 * GIB
        began = trio.current_time()
        await until(server, lambda view: any(event.kind == "shrunk" for event in view.events))
        given_back = kv_before - card.kv_bytes
        assert given_back >= 2 * GIB
        assert card.total_bytes - card.own_bytes - card.others_bytes >= server.policy.headroom.critical_bytes
        heard_after_s = trio.current_time() - began
        assert heard_after_s <= 2 * WATCHFUL_S + 2 * ONE_STEP_S, "a period and a step to shrink, a period to hear of it"
        (shrunk,) = server.told("shrunk")
        assert shrunk.num_bytes == given_back
        assert shrunk.at == pytest.approx(UNIX_TIME + trio.current_time())
        tokens = server.simulated.core.scheduler.cache.pool.total_blocks * BLOCK_SIZE
        assert shrunk.detail == (
            f"gave {given_back / GIB:.2f} GiB back: others took 9.00 GiB; "
            f"the pool has {tokens:,} tokens now"
        )
        await finish(streams, 1500)
        server.simulated.segments.check_integrity()


async def test_when_the_game_ends_the_pool_grows_back_and_says_so_once(autojump_clock: Clock) -> None:
    card = SimulatedCard(others_bytes=12 * GIB)
    async with Guarded(card, engine=SimulatedEngine(card, pool_segments=16)).running() as server:
        await trio.sleep(5)
        assert server.told("grown") == []
        card.others_bytes = 2 * GIB
        await trio.sleep(60)
        assert card.kv_bytes == 128 * SEGMENT_BYTES, "its ceiling"
        (grown,) = server.told("grown")
        assert grown.num_bytes == 112 * SEGMENT_BYTES
        assert grown.detail == ("took 7.00 GiB that others left; the pool has 32,768 tokens now")


async def test_memory_can_be_taken_to_the_last_segment_under_open_streams_and_all_of_them_finish(
    autojump_clock: Clock,
) -> None:
    card = SimulatedCard()
    async with Guarded(card).running() as server:
        streams = await server.service.open([make_draft(600, prompt_tokens=100 + i) for i in range(24)])
        for _ in range(2):
            await trio.sleep(1.5)
            card.others_bytes = card.total_bytes - card.fixed_bytes
            await trio.sleep(2)
            assert card.kv_bytes == 0
            stats = server.service.stats()
            assert stats is not None
            assert (stats.pool.total_blocks, stats.running) == (0, 0)
            steps = stats.steps
            await trio.sleep(5)
            stats = server.service.stats()
            assert stats is not None
            assert stats.steps == steps
            card.others_bytes = 2 * GIB
            await until(server, lambda view: card.kv_bytes > 8 * SEGMENT_BYTES)
        await finish(streams, 600)
        assert server.admission.num_open == 0
        server.simulated.segments.check_integrity()


@pytest.mark.parametrize("pool_share", [0.1, 1.0])
async def test_a_step_that_finds_no_memory_before_the_guard_has_seen_who_took_it_costs_time_and_nothing_else(
    autojump_clock: Clock, pool_share: float
) -> None:
    card = SimulatedCard()

    def on_step(plan: StepPlan) -> None:
        if plan.chunks and card.total_bytes - card.own_bytes - card.others_bytes < 200 * MIB:
            raise torch.OutOfMemoryError("the card is full")

    engine = SimulatedEngine(card, pool_segments=64, ceiling_segments=64, on_step=on_step)
    async with Guarded(card, engine=engine).running() as server:
        engine.core.clock = trio.current_time
        most, pool_tokens = card.kv_bytes, server.service.card().pool_tokens
        max_tokens = int(pool_share * (pool_tokens - 100))
        streams = await server.service.open([make_draft(max_tokens)])
        await trio.sleep(2)
        card.others_bytes = card.total_bytes - card.own_bytes - 100 * MIB
        await trio.sleep(10)
        assert card.kv_bytes < most
        card.others_bytes = 2 * GIB
        await finish(streams, max_tokens)
        await trio.sleep(30)
        assert card.kv_bytes == most


async def test_no_step_runs_while_memory_of_ours_is_out_of_the_card(autojump_clock: Clock) -> None:
    card = SimulatedCard()
    during_spill: list[float] = []

    def on_step(plan: StepPlan) -> None:
        if plan.chunks and card.stray_bytes and trio.current_time() > spilled_at + WATCHFUL_S + ONE_STEP_S:
            during_spill.append(trio.current_time())

    spilled_at = float("inf")
    async with Guarded(card, engine=SimulatedEngine(card, on_step=on_step)).running() as server:
        streams = await server.service.open([make_draft(2000) for _ in range(8)])
        await trio.sleep(2)
        card.stray_bytes, spilled_at = 200 * MIB, trio.current_time()
        kv_before = card.kv_bytes
        await trio.sleep(2)
        assert card.stray_bytes == 0
        assert card.kv_bytes <= kv_before - 200 * MIB
        assert during_spill == []
        assert "200 MiB of ours are in system memory" in server.told("shrunk")[0].detail
        assert [event.num_bytes for event in server.told("state")] == [200 * MIB, 0]
        await finish(streams, 2000)


# ---- drivers that do not answer


async def test_a_driver_that_hangs_costs_growth_and_nothing_else(
    autojump_clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    card = SimulatedCard(others_bytes=12 * GIB)
    async with Guarded(card, engine=SimulatedEngine(card, pool_segments=16)).running() as server:
        streams = await server.service.open([make_draft(900)])
        await trio.sleep(0.5)
        card.others_bytes = 2 * GIB
        hung_at = trio.current_time()
        card.hangs_until = hung_at + 20
        await trio.sleep(1)
        view = server.service.memory()
        assert view is not None
        assert view.reading is not None
        assert view.reading.stale
        assert view.problem == "simulated: has not answered for 0.25 s"
        assert view.age_s == pytest.approx(trio.current_time() - view.reading.at)
        assert server.told("stale") == [], "it is too early to worry a person"
        await finish(streams, 900)
        await trio.sleep_until(hung_at + 19)
        assert card.kv_bytes == 16 * SEGMENT_BYTES
        (stale,) = server.told("stale")
        assert FROZEN_S < stale.at - UNIX_TIME - hung_at + 0.1 < FROZEN_S + 1
        assert server.service.health().status == "ok"
        await trio.sleep_until(hung_at + 21)
        assert [event.kind for event in server.events if event.kind in ("stale", "fresh")] == ["stale", "fresh"]
        await trio.sleep(30)
        assert card.kv_bytes == 128 * SEGMENT_BYTES
        assert card.num_opens == 1
    assert "memory: read again, by simulated" not in caplog.text  # info
    assert "memory: last read 2." in caplog.text


async def test_blind_for_half_a_minute_it_says_that_it_is_degraded_and_serves_on(autojump_clock: Clock) -> None:
    card = SimulatedCard()
    async with Guarded(card).running() as server:
        card.is_gone = True
        await trio.sleep(BLIND_S - 1)
        assert server.service.health().status == "ok"
        await trio.sleep(3)
        assert server.service.health().status == "degraded"
        await finish(await server.service.open([make_draft(30)]), 30)
        card.is_gone = False
        await trio.sleep(12)
        assert server.service.health().status == "ok"


async def test_a_card_that_could_never_be_read_is_told_too(autojump_clock: Clock) -> None:
    card = SimulatedCard(is_gone=True)
    server = Guarded(card)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.watch.run)
        server.engine.status.set(replace(server.engine.status.value, phase=Phase.SERVING))
        await trio.sleep(BLIND_S - 1)
        assert server.service.health().status == "ok"
        await trio.sleep(2)
        assert server.service.health().status == "degraded"
        view = server.service.memory()
        assert view is not None
        assert (view.reading, view.problem) == (None, "simulated: the driver has gone")
        nursery.cancel_scope.cancel()


async def test_a_device_that_nothing_can_read_is_served_from_and_told_of(autojump_clock: Clock) -> None:
    server = Guarded(SimulatedCard(), sources=[])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.watch.run)
        await trio.sleep(BLIND_S + 2)
        view = server.service.memory()
        assert view is not None
        assert view.problem == "there is no way to read it"
        assert server.watch.is_blind
        nursery.cancel_scope.cancel()


async def test_where_the_best_source_hangs_the_next_is_asked_at_once_and_the_best_again_when_it_is_back(
    autojump_clock: Clock,
) -> None:
    card, other_way = SimulatedCard(), SimulatedCard()
    other_way.fixed_bytes = 0
    sources = [(card.source("amdsmi"), card), (other_way.source("sysfs"), other_way)]
    async with Guarded(card, sources).running() as server:

        def read_by() -> str:
            reading = server.watch.view.value.reading
            assert reading is not None
            assert not reading.stale
            return reading.source

        streams = await server.service.open([make_draft(3000)])
        await trio.sleep(1)
        assert read_by() == "amdsmi"
        hung_at = trio.current_time()
        card.hangs_until = hung_at + 5
        await until(server, lambda view: view.reading is not None and view.reading.source == "sysfs")
        assert trio.current_time() - hung_at <= WATCHFUL_S + 0.25 + 0.01
        assert server.watch.view.value.problem == "amdsmi: has not answered for 0.25 s"
        await trio.sleep(2)
        assert read_by() == "sysfs"
        await trio.sleep(4)
        assert read_by() == "amdsmi"
        assert server.watch.view.value.problem is None
        assert server.told("stale") == []
        card.is_gone = True
        await trio.sleep(0.2)
        assert read_by() == "sysfs"
        await finish(streams, 3000)


# ---- engines that come and go, and its own trouble


async def test_an_engine_hears_of_the_budget_once_and_then_only_of_what_changes(
    autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = SimulatedCard(others_bytes=12 * GIB)
    server = Guarded(card, engine=SimulatedEngine(card, pool_segments=16))
    orders = orders_of(server, monkeypatch)
    async with server.running():
        await trio.sleep(20)
        assert orders == [Resize(card.total_bytes - server.policy.headroom.num_bytes - 12 * GIB)]
        card.others_bytes += 10 * MIB
        await trio.sleep(5)
        assert len(orders) == 1
        card.others_bytes += 100 * MIB
        await trio.sleep(5)
        assert orders[1:] == [Resize(card.total_bytes - server.policy.headroom.num_bytes - card.others_bytes)]


async def test_a_new_life_of_the_engine_starts_with_memory_of_its_own(
    autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = SimulatedCard(others_bytes=12 * GIB)
    broken = True

    def on_step(plan: StepPlan) -> None:
        if broken:
            raise ZeroDivisionError("a bug")

    engine = SimulatedEngine(card, pool_segments=16, on_step=on_step)
    async with Guarded(card, engine=engine).running() as server:
        await trio.sleep(2)
        card.others_bytes = 2 * GIB
        await trio.sleep(15)
        first = card.kv_bytes
        assert first == 128 * SEGMENT_BYTES
        await server.service.open([make_draft(10)])
        await phase(server, Phase.RESTARTING)
        view = server.service.memory()
        assert view is not None
        assert (view.memory, view.pool) == (None, None)
        await phase(server, Phase.SERVING)
        broken = False
        assert card.kv_bytes == 16 * SEGMENT_BYTES
        orders = orders_of(server, monkeypatch)
        card.others_bytes = 12 * GIB
        await trio.sleep(1)
        assert [(order.shrink_bytes, order.grow_bytes) for order in orders] == [(0, 0)], "the budget"
        card.others_bytes = 2 * GIB
        await trio.sleep(25)
        assert card.kv_bytes == first, "it grows like the first"
        await finish(await server.service.open([make_draft(10)]), 10)


async def test_an_order_that_died_with_its_engine_does_not_keep_the_next_from_growing(autojump_clock: Clock) -> None:
    card = SimulatedCard(others_bytes=12 * GIB)
    engine = SimulatedEngine(card, pool_segments=16)
    async with Guarded(card, engine=engine).running() as server:
        await trio.sleep(1)
        lives: list[int] = []

        def die(num_bytes: int) -> None:
            lives.append(num_bytes)
            raise ZeroDivisionError("a bug")

        engine.segments.grow = die  # type: ignore[assignment, method-assign]
        card.others_bytes = 2 * GIB
        await phase(server, Phase.RESTARTING)
        await phase(server, Phase.SERVING)
        assert len(lives) == 1
        await trio.sleep(15)
        assert card.kv_bytes == 128 * SEGMENT_BYTES


async def test_a_bug_in_it_is_told_and_it_goes_on_and_lets_steps_go_on_meanwhile(
    autojump_clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    card = SimulatedCard()
    async with Guarded(card).running() as server:
        streams = await server.service.open([make_draft(3000)])
        await trio.sleep(1)
        card.stray_bytes = 100 * MIB
        await until(server, lambda view: view.decision is not None and view.decision.hold)
        observe, crashes = server.policy.observe, 0

        def crash(*args: Any, **kwargs: Any) -> Any:
            nonlocal crashes
            crashes += 1
            raise ZeroDivisionError("a bug in the policy")

        server.policy.observe = crash  # type: ignore[method-assign]
        steps = server.simulated.core.stats().steps
        await trio.sleep(0.4)
        assert crashes == 1
        assert server.simulated.core.stats().steps > steps + 10
        server.policy.observe = observe  # type: ignore[method-assign]
        await trio.sleep(3)
        assert card.stray_bytes == 0
        await finish(streams, 3000)
    assert "the memory guard crashed, restarts in 0.5 s" in caplog.text


async def test_what_it_cannot_tell_of_it_orders_all_the_same(
    autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = SimulatedCard()
    async with Guarded(card).running() as server:
        await trio.sleep(2)
        decided = server.watch._log.decided

        def crash_once(decision: Decision, *args: Any) -> None:
            if decision.shrink_bytes:
                monkeypatch.undo()
                raise ZeroDivisionError("a bug")
            decided(decision, *args)

        monkeypatch.setattr(server.watch._log, "decided", crash_once)
        card.others_bytes = 13 * GIB
        await trio.sleep(5)
        assert card.spilled_bytes == 0
        assert card.total_bytes - card.own_bytes - card.others_bytes >= server.policy.headroom.critical_bytes


async def test_all_that_is_known_is_in_one_view(autojump_clock: Clock) -> None:
    card = SimulatedCard()
    async with Guarded(card).running() as server:
        await trio.sleep(3.5)
        view = server.service.memory()
        assert view is not None
        assert (view.device, view.headroom_bytes) == ("a simulated card", server.policy.headroom.num_bytes)
        assert view.decision is not None
        assert (view.decision.condition.state, view.decision.others_bytes) == (State.OK, 2 * GIB)
        assert view.memory is not None
        assert view.memory.leases == {"weights": 2 * GIB, "kv.target": card.kv_bytes}
        assert view.pool is not None
        assert view.pool.total_blocks * BLOCK_SIZE == server.service.card().pool_tokens
        assert view.age_s == pytest.approx(0.5, abs=0.5)


async def test_without_it_there_is_no_view(autojump_clock: Clock) -> None:
    async with Rig(makes(FakeCore())).running() as rig:
        assert rig.service.memory() is None
