"""What the HTTP side is told while the engine loads, serves, restarts and ends."""

from dataclasses import replace

import pytest
import trio
import trio.testing

from edgekv.actors.engine import EngineStatus, Phase
from edgekv.actors.fault import DEVICE_LOST, DRAINING
from edgekv.actors.messages import Expire
from edgekv.actors.service import Service
from edgekv.actors.stream import Failed
from edgekv.core.step import Finished, StepReport
from edgekv.engine.driver import LoadProgress
from edgekv.errors import ContextLengthExceeded, NotServing, QueueFull
from tests.actors.fakes import FakeCore, Rig, check_whole, make_card, make_draft, makes, read_all


@pytest.fixture
def rig() -> Rig:
    return Rig(makes(FakeCore()))


def put(rig: Rig, phase: Phase, **fields: object) -> None:
    rig.engine.status.set(EngineStatus(phase, trio.current_time(), **fields))  # type: ignore[arg-type]


async def refusal(service: Service) -> NotServing:
    with pytest.raises(NotServing) as caught:
        await service.open([make_draft()])
    return caught.value


async def test_before_the_model_is_loaded_there_is_no_card_and_nothing_opens(rig: Rig) -> None:
    with pytest.raises(NotServing) as caught:
        rig.service.card()
    assert caught.value.code == "model_loading"
    assert (await refusal(rig.service)).code == "model_loading"
    assert rig.service.health().status == "loading"
    assert rig.service.stats() is None


async def test_retry_after_while_loading_is_what_is_left_of_the_loading(
    rig: Rig, autojump_clock: trio.testing.MockClock
) -> None:
    put(rig, Phase.LOADING, progress=LoadProgress(0, 4000, "weights"))
    assert (await refusal(rig.service)).retry_after_s == 5
    await trio.sleep(10)
    put_at = rig.engine.status.value.since
    rig.engine.status.set(EngineStatus(Phase.LOADING, put_at, progress=LoadProgress(1000, 4000, "weights")))
    error = await refusal(rig.service)
    assert error.retry_after_s == pytest.approx(30)
    assert "weights, 25 % of 4,000 bytes" in str(error)
    assert "25 %" in rig.service.health().detail
    rig.engine.status.set(EngineStatus(Phase.LOADING, put_at, progress=LoadProgress(4000, 4000, "warm-up")))
    assert (await refusal(rig.service)).retry_after_s == 1
    rig.engine.status.set(EngineStatus(Phase.LOADING, put_at, progress=LoadProgress(1, 4000, "weights")))
    assert (await refusal(rig.service)).retry_after_s == 600


@pytest.mark.parametrize(
    ("phase", "health", "code"),
    [
        (Phase.RESTARTING, "loading", "engine_restarting"),
        (Phase.DRAINING, "draining", "draining"),
        (Phase.FAILED, "failed", "device_lost"),
    ],
)
async def test_each_phase_has_its_word_and_its_code(rig: Rig, phase: Phase, health: str, code: str) -> None:
    put(rig, phase, detail="/a/path", failure=DEVICE_LOST, card=make_card())
    assert rig.service.health().status == health
    assert (await refusal(rig.service)).code == code
    assert "/a/path" not in rig.service.health().detail
    assert rig.service.card() == make_card()


async def test_streams_come_in_the_order_of_the_drafts_with_ids_of_their_own(rig: Rig) -> None:
    async with rig.running():
        first = await rig.service.open([make_draft(1), make_draft(2)])
        second = await rig.service.open([make_draft(3)])
        assert [stream.sequence_id for stream in first + second] == [1, 2, 3]
        assert [len(await read_all(stream)) for stream in first + second] == [3, 4, 5]


async def test_what_is_refused_leaves_nothing_behind() -> None:
    core = FakeCore()
    async with Rig(makes(core), max_queue=2).running() as rig:
        with pytest.raises(ContextLengthExceeded):
            await rig.service.open([make_draft(1), make_draft(100_000)])
        streams = await rig.service.open([make_draft(5)])
        with pytest.raises(QueueFull):
            await rig.service.open([make_draft(1), make_draft(1)])
        with pytest.raises(ValueError, match="no drafts"):
            await rig.service.open([])
        await read_all(streams[0])
        assert core.submitted == [streams[0].sequence_id]
        assert rig.admission.num_open == 0


async def test_who_has_started_makes_room_in_the_queue() -> None:
    async with Rig(makes(FakeCore()), max_queue=1).running() as rig:
        for _ in range(5):
            (stream,) = await rig.service.open([make_draft(10_000)])
            await stream.take()
        assert (rig.admission.num_open, rig.admission.num_waiting) == (5, 0)


async def test_being_cancelled_while_opening_admits_nothing() -> None:
    core = FakeCore()
    async with Rig(makes(core)).running() as rig:
        with trio.CancelScope() as scope:
            scope.cancel()
            await rig.service.open([make_draft()])
        await trio.sleep(0.03)
        assert core.submitted == []
        assert rig.admission.num_open == 0


def test_a_prompt_does_not_show_when_a_draft_is_printed() -> None:
    assert "(0, 1, 2, 3)" not in repr(make_draft(prompt_tokens=4))


async def test_a_pool_that_others_shrank_is_429_for_what_fits_it_when_whole_and_400_for_what_never_does(
    rig: Rig,
) -> None:
    put(rig, Phase.SERVING, card=make_card())
    stats = FakeCore().stats()
    rig.engine.stats.set(replace(stats, pool=replace(stats.pool, total_blocks=10, free_blocks=7), most_blocks=1000))
    card = rig.service.card()
    assert (card.pool_tokens, card.most_pool_tokens) == (160, 16_000)
    assert (card.present_tokens, card.limit_tokens) == (160, 16_000)
    with pytest.raises(QueueFull, match=r"down to 160 of 16,000 tokens: this request needs 165 .* and 112 are"):
        await rig.service.open([make_draft(max_tokens=161)])
    with pytest.raises(ContextLengthExceeded, match="maximum context length is 16000 tokens"):
        await rig.service.open([make_draft(max_tokens=16_001)])
    assert len(await rig.service.open([make_draft(max_tokens=156)])) == 1


async def test_a_pool_that_nobody_shrank_has_one_limit(rig: Rig) -> None:
    put(rig, Phase.SERVING, card=make_card(pool_tokens=160))
    with pytest.raises(ContextLengthExceeded, match="maximum context length is 160 tokens"):
        await rig.service.open([make_draft(max_tokens=161)])


async def test_pinned_blocks_are_no_room_that_is_promised_to_anybody(rig: Rig) -> None:
    put(rig, Phase.SERVING, card=make_card())
    stats = FakeCore().stats()
    pool = replace(stats.pool, total_blocks=10, free_blocks=7)
    rig.engine.stats.set(replace(stats, pool=pool, most_blocks=1000, pinned_blocks=4))
    card = rig.service.card()
    assert (card.pool_tokens, card.most_pool_tokens) == (96, 15_936)
    with pytest.raises(QueueFull, match="down to 96 of 15,936 tokens"):
        await rig.service.open([make_draft(max_tokens=100)])
    rig.engine.stats.set(replace(stats, pool=replace(pool, total_blocks=3), most_blocks=1000, pinned_blocks=4))
    assert rig.service.card().pool_tokens == 0


class NeverStarts(FakeCore):
    """An engine whose sequences all wait for memory."""

    def step(self) -> StepReport:
        ended, self._ended = self._ended, []
        return StepReport(self.stats(), finished=tuple(ended))


async def test_who_has_waited_too_long_is_refused_after_all_with_a_time_to_come_back(
    autojump_clock: trio.testing.MockClock,
) -> None:
    core = NeverStarts()
    async with Rig(makes(core), max_wait_s={0: 5.0, 10: 60.0}).running() as rig:
        began = trio.current_time()
        (batch,) = await rig.service.open([make_draft(priority=10)])
        await trio.sleep(1)
        first, second = await rig.service.open([make_draft(), make_draft()])
        for stream in (first, second):
            (end,) = await read_all(stream)
            assert isinstance(end, Failed)
            assert (end.code, end.retry_after_s) == ("kv_cache_full", 10)
            assert "has waited 5 s for 9 tokens of KV cache and could not start. Try again in 10 s" in end.message
        assert trio.current_time() - began == pytest.approx(6)
        await trio.sleep(0.1)
        assert core.aborted == [2, 3]
        assert rig.admission.num_open == 1
        (end,) = await read_all(batch, within_s=100)
        assert trio.current_time() - began == pytest.approx(60)
        assert rig.admission.num_open == 0


async def test_who_has_started_is_never_timed_out(autojump_clock: trio.testing.MockClock) -> None:
    async with Rig(makes(FakeCore()), max_wait_s={0: 1.0}).running() as rig:
        (stream,) = await rig.service.open([make_draft(2000)])
        check_whole(await read_all(stream, within_s=100), 2000)
        rig.engine.insist(Expire(stream.sequence_id, DRAINING))  # too late
        (stream,) = await rig.service.open([make_draft(50)])
        await stream.take()
        rig.engine.insist(Expire(stream.sequence_id, DRAINING))
        assert isinstance((await read_all(stream))[-1], Finished)
