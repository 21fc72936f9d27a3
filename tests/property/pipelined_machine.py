"""The state machine of `elastic_machine` for an engine with one step in flight."""

from collections.abc import Callable
from dataclasses import replace

from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule

from edgekv.core.sampling import SamplingParams
from edgekv.core.scheduler import Limits
from edgekv.core.sequence import FinishReason, SequenceSpec
from edgekv.engine.core import EngineCore
from tests.property.elastic_machine import BLOCK_SIZE, COMMON, SEGMENT_BYTES, WEIGHT_BYTES, ElasticMachine
from tests.property.simulated_stream import VOCAB_SIZE, Stream, alone

requests = st.builds(
    lambda common, tail, params, priority: SequenceSpec(0, tuple(COMMON[:common] + tail), params, priority),
    common=st.integers(0, 14),
    tail=st.lists(st.integers(0, 2), min_size=1, max_size=6),
    params=st.builds(
        SamplingParams,
        max_tokens=st.integers(1, 24),
        seed=st.integers(0, 2),
        min_tokens=st.integers(0, 8),
        stop_token_ids=st.sampled_from([frozenset[int](), frozenset({2})]),
    ),
    priority=st.sampled_from([0, 0, 1, 10]),
)
# Every rule ends with some steps, so that what comes next finds one in flight.
some = st.sampled_from([0, 1, 2, 3, 5])


class PipelinedMachine(ElasticMachine):
    """Requests, aborts, orders and faults of every kind, while a device does one step and has been given the next.

    Each sequence has the output that it would have alone; nothing of it is told twice, or after its end.
    """

    core_class: type[EngineCore] = EngineCore
    ahead_steps = 0
    orders_in_flight = 0

    @initialize(
        segments=st.integers(3, 10),
        more=st.integers(0, 6),
        limits=st.builds(Limits, st.integers(1, 6), st.sampled_from([7, 16, 40]), st.sampled_from([1, 8])),
        prefix=st.booleans(),
        is_quick=st.booleans(),
        first=st.lists(requests, min_size=1, max_size=4),
    )
    def build(
        self, segments: int, more: int, limits: Limits, prefix: bool, is_quick: bool, first: list[SequenceSpec]
    ) -> None:
        super().build(segments, more, limits, prefix)
        self.stream = Stream(self.cache, lambda: self.device.segments)
        self.stream.is_quick = is_quick
        self.device.forget = self.stream.forget_segment
        self.core = self.core_class(self.scheduler, self, self, VOCAB_SIZE, self.segments, pipeline=self.stream)
        self.aborted: set[int] = set()
        for spec in first:
            self._submit(spec)

    def _copy(self, copies: object) -> None:
        self.stream.copy_now(list(copies))  # type: ignore[call-overload]

    # ---- what happens

    @rule(specs=st.lists(requests, min_size=1, max_size=2), then=some)
    def submit(self, specs: list[SequenceSpec], then: int) -> None:
        for spec in specs:
            self._submit(spec)
        self._go_on(then)

    @rule(times=st.integers(1, 8))
    def step(self, times: int) -> None:
        self._go_on(times)

    @rule(when=st.sampled_from(["begin", "result"]), ahead=st.booleans(), then=some)
    def step_without_memory(self, when: str, ahead: bool, then: int) -> None:
        setattr(self.stream, f"{when}_fails", lambda is_ahead: is_ahead is ahead)
        self._go_on(1)
        self._recover()
        self._go_on(then)

    @rule(which=st.integers(0, 50), then=some)
    def spoil(self, which: int, then: int) -> None:
        """What the model says of a sequence, perhaps one to come, is not finite from now on."""
        self.stream.spoilt.add(which)
        self._go_on(then)

    @rule(which=st.integers(0, 5), then=some)
    def abort(self, which: int, then: int) -> None:
        """One that runs, or any of all that there were."""
        running = [sequence.id for sequence in self.scheduler.running] or list(self.wanted)
        number = running[which % len(running)]
        self.core.abort(number)
        self.scheduler.check_integrity()
        assert all(sequence.id != number for sequence in self.scheduler.running)
        if number not in self.too_long:
            self.aborted.add(number)
        self._go_on(then)

    @rule(segments=st.integers(0, 3), held_steps=st.none() | st.integers(0, 2), then=some)
    def shrink(self, segments: int, held_steps: int | None, then: int) -> None:
        before, asked = self.segments.num_bytes, segments * SEGMENT_BYTES
        self.order(shrink_bytes=asked, hold=held_steps is not None)
        assert before - self.segments.num_bytes >= min(asked, before), "nothing is pinned, so all can be had"
        if held_steps is not None:
            assert not self.stream.unread, "no step is in flight while steps are held"
            self._go_on(held_steps)
            self.order(hold=False)
        self._go_on(then)

    @rule(segments=st.integers(0, 8), then=some)
    def grow(self, segments: int, then: int) -> None:
        self.order(budget_bytes=WEIGHT_BYTES + 100 * SEGMENT_BYTES, grow_bytes=segments * SEGMENT_BYTES)
        self._go_on(then)

    @rule()
    def the_device_is_done(self) -> None:
        self.stream.run()

    def change_nothing_but_the_budget(self, hold: bool, budget: int) -> None:
        """Nothing that a step in flight could notice."""

    def others_fill_the_device(self, segments: int) -> None:
        """Nor is this."""

    def order(self, *, budget_bytes: int = 0, shrink_bytes: int = 0, grow_bytes: int = 0, hold: bool = False) -> None:
        type(self).orders_in_flight += bool(self.stream.unread)
        super().order(budget_bytes=budget_bytes, shrink_bytes=shrink_bytes, grow_bytes=grow_bytes, hold=hold)

    def _submit(self, spec: SequenceSpec) -> None:
        spec = replace(spec, id=len(self.wanted))
        self.wanted[spec.id] = spec
        if len(spec.prompt) + spec.sampling.max_tokens > self.cache.pool.most_blocks * BLOCK_SIZE:
            self.too_long.add(spec.id)
        self.core.submit(spec)

    def _recover(self) -> None:
        never: Callable[[bool], bool] = lambda ahead: False  # noqa: E731
        self.stream.begin_fails = self.stream.result_fails = never

    # ---- what is told

    def _go_on(self, steps: int) -> None:
        for _ in range(steps):
            if self.core.busy:
                self._step()
                self.invariants_hold()

    def _step(self) -> None:
        before = self.core.stats().ahead_steps
        report = self.core.step()
        type(self).ahead_steps += report.stats.ahead_steps - before
        for out in report.tokens:
            number = out.sequence_id
            assert number not in self.aborted, "a token after an abort"
            assert number not in self.ended, "a token after the end"
            output = self.outputs.setdefault(number, [])
            output.append(out.sampled.token_id)
            spec = self.wanted[number]
            assert output == alone(spec.prompt, spec.sampling)[: len(output)], f"sequence {number} says another's words"
        for last in report.finished:
            number = last.sequence_id
            assert number not in self.aborted, "an end after an abort"
            self.ended[number] += 1
            self._judge(number, last.reason, last.detail)
        self.stream.short = False

    def _judge(self, number: int, reason: FinishReason, detail: str) -> None:
        spec, output = self.wanted[number], self.outputs.get(number, [])
        if reason is FinishReason.ERROR:
            assert ("never fit" in detail) == (number in self.too_long), detail
            assert number in self.too_long | self.stream.spoilt, detail
        elif reason is FinishReason.OUT_OF_MEMORY:
            assert self.stream.short, "only a step that fails by itself ends a sequence"
        else:
            assert output == alone(spec.prompt, spec.sampling)
            stopped = len(output) > spec.sampling.min_tokens and output[-1] in spec.sampling.stop_token_ids
            assert (reason is FinishReason.STOP) == stopped

    @invariant()
    def invariants_hold(self) -> None:
        type(self).operations += 1
        if not hasattr(self, "stream"):
            return
        self.scheduler.check_integrity()
        self.segments.check_integrity()
        assert len(self.stream.unread) <= 1, "more than one step is in flight"
        assert self.core.busy or not self.stream.unread, "a step in flight is something to do"
        assert all(times == 1 for times in self.ended.values()), "a sequence ended twice"
        if not self.stream.queue:
            assert all(self.stream.holds(s) for s in self.scheduler.running if s.id not in self.stream.spoilt)

    def teardown(self) -> None:
        """The pool comes back, and with it everybody's turn."""
        if hasattr(self, "stream"):
            self._recover()
            self.ended.update(self.aborted - self.ended.keys())
            super().teardown()
            assert not self.stream.unread, "a step was begun and never read"
