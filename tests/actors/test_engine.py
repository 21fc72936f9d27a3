"""Every accepted sequence ends exactly once, with its tokens in order, whatever becomes of the engine."""

import contextlib
import logging
import random
from collections.abc import Callable
from functools import partial
from typing import NoReturn

import pytest
import trio
import trio.testing

from edgekv.actors.engine import Phase
from edgekv.actors.fault import DEVICE_LOST, DRAINING, GAVE_UP, NOT_LOADED, RESTARTING, is_device_error
from edgekv.actors.kernel import ActorGone, Restarts
from edgekv.actors.messages import Drain, Submit
from edgekv.actors.service import SequenceDraft
from edgekv.actors.stream import Failed, StreamEvent, TokenStream
from edgekv.core.sequence import FinishReason, SequenceSpec
from edgekv.core.step import Finished, Resize
from edgekv.engine.driver import DeviceLost, InlineDriver, MakeDriver, ThreadDriver
from edgekv.errors import ModelError, NotServing, QueueFull
from tests.actors.fakes import (
    FakeCore,
    Forward,
    OutOfBlocks,
    Rig,
    check_whole,
    make_card,
    make_draft,
    makes,
    read_all,
    run_seeded,
    slow,
    token_ids,
)

LENGTH, ABORT, OOM = FinishReason.LENGTH, FinishReason.ABORT, FinishReason.OUT_OF_MEMORY


@pytest.fixture(params=[InlineDriver, ThreadDriver])
def make_driver(request: pytest.FixtureRequest) -> MakeDriver:
    return request.param  # type: ignore[no-any-return]


def at_step(number: int, error: Exception) -> Forward:
    """A forward pass that raises the `number`-th time it is called."""
    calls = 0

    def forward(batch: list[SequenceSpec]) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            raise error

    return forward


async def four_streams(rig: Rig) -> list[Finished | Failed]:
    """How four sequences end that were opened together."""
    streams = await rig.service.open([make_draft(5)] * 4)
    ends = [check_whole(await read_all(stream), 5) for stream in streams]
    assert rig.admission.num_open == 0
    return ends


# ---- the engine's own trouble


async def test_undisturbed_all_finish(make_driver: MakeDriver) -> None:
    async with Rig(makes(FakeCore()), make_driver).running() as rig:
        assert await four_streams(rig) == [Finished(number, LENGTH) for number in (1, 2, 3, 4)]
        assert rig.service.health().status == "ok"
        stats = rig.service.stats()
        assert stats is not None
        assert stats.generated_tokens == 20


async def test_out_of_blocks_in_a_batch_takes_nobody(make_driver: MakeDriver) -> None:
    def forward(batch: list[SequenceSpec]) -> None:
        if len(batch) > 2:
            raise OutOfBlocks

    async with Rig(makes(FakeCore(forward)), make_driver).running() as rig:
        assert await four_streams(rig) == [Finished(number, LENGTH) for number in (1, 2, 3, 4)]


async def test_out_of_blocks_alone_takes_that_one(make_driver: MakeDriver) -> None:
    def forward(batch: list[SequenceSpec]) -> None:
        if any(spec.id == 3 for spec in batch):
            raise OutOfBlocks

    async with Rig(makes(FakeCore(forward)), make_driver).running() as rig:
        assert await four_streams(rig) == [Finished(number, OOM if number == 3 else LENGTH) for number in (1, 2, 3, 4)]


async def test_a_crash_takes_the_open_streams_and_the_next_life_serves(make_driver: MakeDriver) -> None:
    cores = FakeCore(at_step(3, ZeroDivisionError("bug"))), FakeCore()
    async with Rig(makes(*cores), make_driver).running() as rig:
        assert await four_streams(rig) == [RESTARTING] * 4
        assert rig.service.card() == make_card()  # the model is still the same
        with pytest.raises(NotServing, match="restarted") as caught:
            await rig.service.open([make_draft()])
        assert caught.value.code == "engine_restarting"
        assert rig.service.health().status == "loading"
        await rig.reach(Phase.SERVING)
        assert await four_streams(rig) == [Finished(number, LENGTH) for number in (5, 6, 7, 8)]
    assert cores[1].submitted == [5, 6, 7, 8]
    assert rig.gave_up is None


async def test_what_was_still_in_the_mailbox_when_it_crashed_is_served_by_the_next_life() -> None:
    cores = FakeCore(at_step(2, ZeroDivisionError("bug"))), FakeCore()
    async with Rig(makes(*cores)).running() as rig:
        (lost,) = await rig.service.open([make_draft()])
        await rig.reach(Phase.RESTARTING)
        # The service refuses by now; a message that was posted a moment before is in the mailbox.
        late = TokenStream(99, rig.service)
        rig.engine.post(Submit(((make_draft(5).with_id(99), late),)))
        assert check_whole(await read_all(lost), 5) == RESTARTING
        assert check_whole(await read_all(late), 5) == Finished(99, LENGTH)


async def test_a_bug_in_publishing_is_a_crash_like_any_other() -> None:
    def broken(report: object) -> NoReturn:
        raise ZeroDivisionError("in a callback of run_sync_soon this would end the whole run")

    rig = Rig(makes(FakeCore()), ThreadDriver)
    rig.engine._on_step = broken
    async with rig.running():
        assert await four_streams(rig) == [RESTARTING] * 4


@pytest.mark.parametrize(
    "error",
    [
        DeviceLost("gone"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("HIP error: unspecified launch failure"),
        type("AcceleratorError", (RuntimeError,), {})("whatever it says"),
    ],
)
async def test_a_lost_device_is_not_tried_again(make_driver: MakeDriver, error: Exception) -> None:
    async with Rig(makes(FakeCore(at_step(3, error))), make_driver).running() as rig:
        assert await four_streams(rig) == [DEVICE_LOST] * 4
        await rig.reach(Phase.FAILED)
        with pytest.raises(NotServing) as caught:
            await rig.service.open([make_draft()])
        assert caught.value.code == "device_lost"
        assert rig.service.health().status == "failed"
    assert rig.gave_up is not None
    assert rig.gave_up.error is error


def test_ordinary_errors_are_not_device_errors() -> None:
    for error in (RuntimeError("shapes do not match"), ValueError("CUDA error: but no RuntimeError"), MemoryError()):
        assert not is_device_error(error)


async def test_the_fourth_crash_within_a_minute_is_the_last(autojump_clock: trio.testing.MockClock) -> None:
    crashing = [FakeCore(at_step(1, ZeroDivisionError("bug"))) for _ in range(4)]
    async with Rig(makes(*crashing), restarts=Restarts()).running() as rig:
        for life in range(4):
            await rig.reach(Phase.SERVING)
            (stream,) = await rig.service.open([make_draft()])
            assert await read_all(stream) == [RESTARTING], life
        status = await rig.reach(Phase.FAILED)
        assert status.failure == GAVE_UP
        assert rig.service.health().detail == GAVE_UP.message
        with pytest.raises(NotServing) as caught:
            await rig.service.open([make_draft()])
        assert caught.value.code == "engine_failed"
    assert rig.gave_up is not None
    assert rig.gave_up.num_crashes == 4


async def test_a_model_that_cannot_be_loaded_is_not_tried_again(make_driver: MakeDriver) -> None:
    error = ModelError("/secret/place/config.json: no hidden_size")
    rig = Rig(makes(error), make_driver)
    await rig.run()
    assert rig.gave_up is not None
    assert rig.gave_up.error is error
    assert rig.engine.status.value.detail == str(error)
    assert rig.engine.status.value.failure == NOT_LOADED
    assert "/secret" not in rig.service.health().detail
    with pytest.raises(NotServing) as caught:
        rig.service.card()
    assert "/secret" not in str(caught.value)


async def test_a_loader_that_fails_four_times_with_the_very_same_error_is_given_up() -> None:
    """An exception object that is raised again drags the frames of living tasks along; they must stay alive."""
    rig = Rig(makes(IndexError("bug")), ThreadDriver, restarts=Restarts(first_delay_s=0.001))
    await rig.run()
    assert rig.gave_up is not None
    assert rig.gave_up.num_crashes == 4


async def test_a_model_that_cannot_be_loaded_again_is_not_tried_a_third_time() -> None:
    rig = Rig(makes(FakeCore(at_step(1, ZeroDivisionError("bug"))), ModelError("the file has gone")))
    async with rig.running():
        assert await four_streams(rig) == [RESTARTING] * 4
        await rig.reach(Phase.FAILED)
    assert rig.gave_up is not None
    assert rig.gave_up.num_crashes == 2


@pytest.mark.parametrize(("error", "told"), [(DeviceLost("gone"), DEVICE_LOST), (ZeroDivisionError("bug"), DRAINING)])
async def test_what_is_still_in_the_mailbox_when_the_engine_ends_is_told_so(error: Exception, told: Failed) -> None:
    rig = Rig(makes(FakeCore(at_step(1, error))), restarts=Restarts(first_delay_s=1000))
    late = TokenStream(99, rig.service)

    class PostsOneMore:
        def started(self, sequence_id: int) -> None: ...

        def ended(self, sequence_id: int, *, unfinished: bool) -> None:
            rig.engine.post(Submit(((make_draft().with_id(99), late),)))

    async with rig.running():
        rig.engine.post(Submit(((make_draft().with_id(1), TokenStream(1, PostsOneMore())),)))
        await rig.engine.status.wait_for(lambda status: status.phase in (Phase.RESTARTING, Phase.FAILED))
        if told is DRAINING:
            assert not late.has_ended  # there may be another life
    assert await read_all(late) == [told]


async def test_a_loader_with_a_bug_is_tried_again(autojump_clock: trio.testing.MockClock) -> None:
    async with Rig(makes(IndexError("bug"), FakeCore())).running() as rig:
        assert await four_streams(rig) == [Finished(number, LENGTH) for number in (1, 2, 3, 4)]


async def test_a_sequence_that_the_engine_refuses_fails_alone(make_driver: MakeDriver) -> None:
    async with Rig(makes(FakeCore()), make_driver).running() as rig:
        good, bad = make_draft(5), SequenceDraft((-1,), make_draft().sampling)
        streams = await rig.service.open([good, bad, good])
        ends = [check_whole(await read_all(stream), 5) for stream in streams]
        assert ends == [
            Finished(1, LENGTH),
            Failed("rejected", "a token id is not in the vocabulary"),
            Finished(3, LENGTH),
        ]


# ---- readers that leave


@pytest.mark.parametrize("make_driver", [partial(InlineDriver, step_s=0.001), ThreadDriver])
async def test_a_reader_may_leave_at_any_token(make_driver: MakeDriver) -> None:
    """Its sequence is aborted in the engine, its neighbour notices nothing, nothing is left."""
    core = FakeCore(slow(0.0002))
    async with Rig(makes(core), make_driver).running() as rig:
        for leave_at in range(12):
            leaver, neighbour = await rig.service.open([make_draft(10_000), make_draft(12)])
            events: list[StreamEvent] = []
            while len(token_ids(events)) < leave_at:
                events += await leaver.take()
            leaver.close()
            assert check_whole(await read_all(neighbour), 12) == Finished(neighbour.sequence_id, LENGTH)
            steps = core.steps
            await trio.sleep(0.03)
            assert core.work == {}, f"still running after leaving at token {leave_at}"
            assert core.steps <= steps + 2
        assert rig.admission.num_open == 0
        assert rig.engine._streams == {}
        # Who left before the submission was looked at was never submitted; everybody else was aborted.
        assert sorted({*core.aborted} | ({*range(1, 24, 2)} - {*core.submitted})) == list(range(1, 24, 2))


async def test_who_leaves_in_the_same_instant_is_never_submitted() -> None:
    core = FakeCore()
    async with Rig(makes(core)).running() as rig:
        (stream,) = await rig.service.open([make_draft()])
        stream.close()
        await trio.sleep(0.05)
        assert core.submitted == []
        assert rig.admission.num_open == 0


async def test_leaving_gets_through_a_full_mailbox_and_a_dead_actor() -> None:
    core = FakeCore(slow())
    rig = Rig(makes(core))
    async with rig.running():
        (first,) = await rig.service.open([make_draft(10_000)])
        await first.take()
        rig.engine._capacity = 0
        with pytest.raises(NotServing) as caught:
            await rig.service.open([make_draft(), make_draft()])
        assert caught.value.code == "overloaded"
        assert rig.admission.num_open == 1  # the refused ones left nothing behind
        first.close()
        await trio.sleep(0.03)
        assert core.aborted == [1]
        late = TokenStream(50, rig.service)
    late.close()  # the actor has ended by now


# ---- draining


async def test_draining_lets_the_open_finish_and_then_ends(make_driver: MakeDriver) -> None:
    rig = Rig(makes(FakeCore(slow())), make_driver)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.run)
        await rig.reach(Phase.SERVING)
        streams = await rig.service.open([make_draft(5), make_draft(20)])
        rig.drain(grace_s=30)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(NotServing) as caught:
            await rig.service.open([make_draft()])
        assert caught.value.code == "draining"
        assert rig.service.health().status == "draining"
        ends = [
            check_whole(await read_all(stream), max_tokens) for stream, max_tokens in zip(streams, (5, 20), strict=True)
        ]
        assert ends == [Finished(1, LENGTH), Finished(2, LENGTH)]
    assert rig.gave_up is None


async def test_draining_an_idle_engine_takes_no_time(make_driver: MakeDriver) -> None:
    rig = Rig(makes(FakeCore()), make_driver)
    with trio.fail_after(2):
        async with rig.running():
            rig.drain(grace_s=1000)
            await rig.reach(Phase.DRAINING)


async def test_draining_ends_when_the_last_reader_leaves(make_driver: MakeDriver) -> None:
    rig = Rig(makes(FakeCore(slow())), make_driver)
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(rig.run)
            await rig.reach(Phase.SERVING)
            (stream,) = await rig.service.open([make_draft(10_000)])
            await stream.take()
            rig.drain(grace_s=1000)
            await rig.reach(Phase.DRAINING)
            stream.close()


async def test_after_the_grace_the_started_are_ended_and_the_waiting_are_failed(make_driver: MakeDriver) -> None:
    def only_the_first(batch: list[SequenceSpec]) -> None:
        slow()(batch)
        if len(batch) > 1:
            raise OutOfBlocks

    rig = Rig(makes(FakeCore(only_the_first)), make_driver)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.run)
        await rig.reach(Phase.SERVING)
        running, waiting = await rig.service.open([make_draft(400), make_draft(400)])
        await running.take()
        rig.drain(grace_s=0.05)
        last = (await read_all(running))[-1]
        assert isinstance(last, Finished)
        assert (last.sequence_id, last.reason) == (1, ABORT)
        assert await read_all(waiting) == [DRAINING]
    assert rig.admission.num_open == 0


async def test_what_is_posted_behind_a_drain_is_told_so() -> None:
    rig = Rig(makes(FakeCore()))
    async with rig.running():
        (before,) = await rig.service.open([make_draft(5)])
        rig.engine.insist(Drain(10))
        (behind,) = await rig.service.open([make_draft(5)])  # the actor has not had its turn yet
        assert await read_all(behind) == [DRAINING]
        assert check_whole(await read_all(before), 5) == Finished(1, LENGTH)


async def test_a_crash_while_draining_is_the_end() -> None:
    async with Rig(makes(FakeCore(at_step(3, ZeroDivisionError("bug"))))).running() as rig:
        (stream,) = await rig.service.open([make_draft(50)])
        rig.drain(grace_s=30)
        assert check_whole(await read_all(stream), 50) == RESTARTING
        await rig.reach(Phase.FAILED)
    assert rig.gave_up is not None


async def test_being_cancelled_ends_every_stream(make_driver: MakeDriver) -> None:
    async with Rig(makes(FakeCore(slow())), make_driver).running() as rig:
        streams = await rig.service.open([make_draft(400)] * 3)
        await streams[0].take()
    for stream in streams:
        assert (await read_all(stream))[-1] == DRAINING


# ---- seeded schedules: everything at once, on a mock clock


FAULTS: dict[str, Callable[[int], Forward]] = {
    "none": lambda step: lambda batch: None,
    "bug": lambda step: at_step(step, ZeroDivisionError("bug")),
    "device": lambda step: at_step(step, DeviceLost("gone")),
    "memory": lambda step: _out_of_blocks_beyond(1 + step % 3),
}


def _out_of_blocks_beyond(width: int) -> Forward:
    def forward(batch: list[SequenceSpec]) -> None:
        if len(batch) > width or (len(batch) == 1 and batch[0].id % 7 == 0):
            raise OutOfBlocks

    return forward


async def chaos(rng: random.Random) -> tuple[tuple[int, str], ...]:
    """Clients come, read, leave and are cut off, while the engine fails, is drained or is cancelled."""
    cores = [FakeCore(FAULTS[rng.choice(list(FAULTS))](rng.randint(1, 12))) for _ in range(6)]
    rig = Rig(makes(*cores), max_queue=rng.choice([1, 3, 100]), capacity=rng.choice([1, 2, 64]))
    ends: dict[int, str] = {}

    async def client(arrives: float, count: int, max_tokens: int, leaves_at: int | None) -> None:
        await trio.sleep(arrives)
        try:
            streams = await rig.service.open([make_draft(max_tokens)] * count)
        except (NotServing, QueueFull):
            return
        for stream in streams:
            await follow(stream, max_tokens, leaves_at)

    async def follow(stream: TokenStream, max_tokens: int, leaves_at: int | None) -> None:
        events: list[StreamEvent] = []
        assert stream.sequence_id not in ends
        try:
            while taken := await stream.take():
                events += taken
                if leaves_at is not None and len(token_ids(events)) >= leaves_at and not stream.has_ended:
                    ends[stream.sequence_id] = "left"
                    return
            last = check_whole(events, max_tokens)
            ends[stream.sequence_id] = last.reason if isinstance(last, Finished) else last.code
        finally:
            stream.close()

    with trio.fail_after(10_000):  # of the mock clock: a stream that never ends is found at once
        async with trio.open_nursery() as nursery:
            engine_scope = trio.CancelScope()

            async def engine() -> None:
                with engine_scope:
                    await rig.run()

            nursery.start_soon(engine)
            for _ in range(rng.randint(1, 8)):
                leaves_at = rng.choice([None, None, rng.randint(0, 6)])
                nursery.start_soon(client, rng.uniform(0, 0.5), rng.randint(1, 3), rng.randint(1, 9), leaves_at)
            await trio.sleep(rng.uniform(0.05, 0.8))
            if rng.random() < 0.7:
                with contextlib.suppress(ActorGone):
                    rig.engine.insist(Drain(rng.uniform(0, 0.1)))
                await trio.sleep(5)
            engine_scope.cancel()
    assert rig.admission.num_open == rig.admission.num_waiting == 0
    assert rig.engine._streams == {}
    return tuple(sorted(ends.items()))


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Hundreds of crashes with their tracebacks are most of the time and say nothing."""
    caplog.set_level(logging.CRITICAL, "edgekv")


@pytest.mark.usefixtures("quiet")
def test_seeded_schedules_end_every_stream_exactly_once() -> None:
    seen: dict[str, int] = {}
    for seed in range(400):
        try:
            ends = run_seeded(seed, chaos)
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
        for _, end in ends:
            seen[end] = seen.get(end, 0) + 1
    # Every way to end was met, so the check above was about something.
    assert {"length", "abort", "insufficient_memory", "left", "engine_restarting", "device_lost", "draining"} <= {*seen}


@pytest.mark.usefixtures("quiet")
def test_a_seed_is_a_schedule() -> None:
    for seed in (3, 33, 333):
        assert len({run_seeded(seed, chaos) for _ in range(3)}) == 1


# ---- its memory


async def test_an_order_about_memory_reaches_the_engine_between_its_steps(make_driver: MakeDriver) -> None:
    core, order = FakeCore(), Resize(1000, shrink_bytes=10)
    async with Rig(makes(core), make_driver).running() as rig:
        rig.engine.insist(order)
        assert len(await four_streams(rig)) == 4
    assert core.orders == [order]


async def test_an_order_to_an_engine_that_has_crashed_since_is_not_given_to_the_next() -> None:
    cores = FakeCore(at_step(2, ZeroDivisionError("bug"))), FakeCore()
    async with Rig(makes(*cores)).running() as rig:
        (lost,) = await rig.service.open([make_draft()])
        await rig.reach(Phase.RESTARTING)
        rig.engine.insist(Resize(1000, grow_bytes=1))
        assert check_whole(await read_all(lost), 5) == RESTARTING
        await rig.reach(Phase.SERVING)
        rig.engine.insist(Resize(2000))
        assert len(await four_streams(rig)) == 4
    assert cores[1].orders == [Resize(2000)]
