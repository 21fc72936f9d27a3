"""What speculation does to real answers: prompts through a core to the end of what is said, every step timed.

Runs in: the thread that owns the cores; owns: nothing.

A core is made anew for each way of decoding, from the parts of one that was assembled: so each begins with nothing
learnt, and all of them run the same model over the same pool.
"""

import time
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Listing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekv.core.outcome import Outcome
from edgekv.core.sequence import SequenceSpec
from edgekv.core.speculation import Controller
from edgekv.core.step import StepPlan
from edgekv.engine.at_once import AtOnce
from edgekv.engine.core import EngineCore
from edgekv.engine.draft import DraftModel
from edgekv.engine.measure import Stopwatch
from edgekv.engine.native_runner import NativeRunner
from edgekv.engine.runner import Runner
from edgekv.engine.step_sums import StepKind, StepSums, Turn
from edgekv.model.native_lm import NativeLM


class FixedTokens(Controller):
    """Proposes so many tokens for every sequence in every step, whatever comes of it."""

    def choose(
        self, most: Mapping[int, int], unread: Mapping[int, int] | None = None, said: Mapping[int, int] | None = None
    ) -> dict[int, int]:
        """See `Controller`."""
        return {number: min(left, self.most) for number, left in most.items() if left > 0}

    @property
    def is_on(self) -> bool:
        """See `Controller`; it never rests."""
        return True

    def is_in_debt(self, decodes: int) -> bool:
        """See `Controller`; it never pays."""
        return False


@dataclass(frozen=True, slots=True)
class Way:
    """A way of decoding: a core, with the meter of its parts, and how much one of its steps may do."""

    name: str
    core: EngineCore
    meter: "SpeculationMeter"
    most_sequences: int
    most_proposed: int | None

    def answer(self, specs: Listing[SequenceSpec]) -> Turn:
        """Its answers to these, so many at once, the next beginning as one ends. Nothing is cached before."""
        limits = self.meter.served_limits
        limits = replace(limits, max_sequences=self.most_sequences, max_proposed=self.most_proposed)
        self.core.scheduler.limits = limits
        return self.meter.answer(self.core, specs)


def ways(meter: "SpeculationMeter", controller: Controller, fixed: Listing[int], batch: int) -> Iterator[Way]:
    """Without speculation, with it as it is served, and with so many tokens always: each of `batch` sequences at once.

    What is always proposed is verified, however much that is; as it is served, a step has its limit. All of them use
    the same memory: one engine is a few per cent faster than another by where its weights happen to lie.
    """
    yield Way("plain", meter.core_with(None), meter, batch, None)
    yield Way("automatic", meter.core_with(controller), meter, batch, meter.served_limits.max_proposed)
    for tokens in fixed:
        yield Way(f"fixed {tokens}", meter.core_with(FixedTokens(tokens)), meter, batch, None)


class SpeculationMeter:
    """Times the steps of cores that are made of the parts of one. Raises TypeError for a card's.

    `detailed`: also by operation of the native kernels, the draft model's steps each by itself, and what Python does.
    That takes some time of its own.
    """

    def __init__(self, core: EngineCore, *, detailed: bool = False) -> None:
        if not isinstance(core.runner, Runner | NativeRunner):
            raise TypeError(f"cannot look into a {type(core.runner).__name__}")
        self.core = core
        self.served_limits = core.scheduler.limits
        self.model = core.runner.model
        self.draft: Any = None
        """The draft model that was looked into; None where none was."""
        self._plan, self._outcome = StepPlan((), ()), Outcome()
        self._watch, self._draft_watch = Stopwatch(), Stopwatch()
        self._watch.wrap(self.model, "forward", "model")
        self._watch.wrap(core.runner, "forward", "forward")
        self._watch.wrap(core.sampler, "sample", "sample")
        self._detailed = detailed
        if detailed:
            self._watch.wrap(core.scheduler, "plan", "plan")
            self._watch.wrap(core.scheduler, "complete", "report")
        self._keep_plans()
        self._spent = _profiled(self.model) if detailed else None
        self._draft_spent: npt.NDArray[np.int64] | None = None
        self._draft_steps: list[tuple[StepKind, StepSums]] = []
        if core.proposer is not None:
            self._watch.wrap(core.proposer, "propose", "propose")
        if detailed and isinstance(core.proposer, DraftModel) and isinstance(core.proposer.pipeline, AtOnce):
            self._look_into(core.proposer.pipeline)

    def core_with(self, controller: Controller | None) -> EngineCore:
        """A core of the same parts that has measured nothing; without a controller, one that proposes nothing."""
        parts = self.core
        core = EngineCore(
            parts.scheduler,
            parts.runner,
            parts.sampler,
            parts.vocab_size,
            parts.pool,
            proposer=None if controller is None else parts.proposer,
            controller=controller,
        )
        if self._detailed:
            self._watch.wrap(core, "stats", "report")
            for method in ("choose", "observe", "observe_proposing", "observe_step") if controller is not None else ():
                self._watch.wrap(controller, method, "decide")
        return core

    def answer(self, core: EngineCore, specs: Listing[SequenceSpec]) -> Turn:
        """See `Way`. Raises ValueError where a sequence ended with an error."""
        self._forget_all()
        turn = Turn()
        for spec in specs:
            core.submit(spec)
        while core.busy:
            self._step(core, turn)
        return turn

    def _step(self, core: EngineCore, turn: Turn) -> None:
        parts = self._watch.parts
        parts.clear()
        self._plan, self._outcome = StepPlan((), ()), Outcome()
        begun = time.perf_counter()
        report = core.step()
        total_s = time.perf_counter() - begun
        for finished in report.finished:
            if finished.detail:
                raise ValueError(f"sequence {finished.sequence_id}: {finished.detail}")
        for out in report.tokens:
            turn.said.setdefault(out.sequence_id, []).append(out.sampled.token_id)
        for each in self._outcome.verified:
            if each.proposed:
                turn.verifications += 1
                turn.first_right += each.accepted > 0
                turn.proposed += each.proposed
                turn.accepted += each.accepted
        for kind, sums in self._draft_steps:
            turn.of(kind).add(sums)
        self._draft_steps.clear()
        plan = self._plan
        turn.of(_kind(plan)).add(
            StepSums(
                steps=1,
                sequences=len(plan.chunks),
                rows=plan.num_tokens,
                proposed=sum(len(chunk.proposed) for chunk in plan.chunks),
                tokens=len(report.tokens),
                total_s=total_s,
                propose_s=parts.get("propose", 0.0),
                forward_s=parts.get("forward", 0.0),
                model_s=parts.get("model", 0.0),
                sample_s=parts.get("sample", 0.0),
                decide_s=parts.get("decide", 0.0),
                plan_s=parts.get("plan", 0.0),
                report_s=parts.get("report", 0.0),
                operation_ns=_taken(self._spent),
            )
        )

    def _keep_plans(self) -> None:
        """Remember what the scheduler plans, and what comes of it."""
        scheduler = self.core.scheduler
        run_plan, run_complete = scheduler.plan, scheduler.complete

        def plan(*args: Any) -> StepPlan:
            self._plan = run_plan(*args)
            return self._plan

        def complete(*args: Any) -> Outcome:
            self._outcome = run_complete(*args)
            return self._outcome

        vars(scheduler).update(plan=plan, complete=complete)

    def _look_into(self, pipeline: AtOnce) -> None:
        """Time every step of a draft model."""
        assert isinstance(pipeline.runner, Runner | NativeRunner)
        self.draft, watch, begin = pipeline.runner.model, self._draft_watch, pipeline.begin
        watch.wrap(self.draft, "forward", "model")
        watch.wrap(pipeline.runner, "forward", "forward")
        watch.wrap(pipeline.sampler, "sample", "sample")
        self._draft_spent = _profiled(self.draft)

        def timed(plan: StepPlan, *args: Any) -> Any:
            watch.parts.clear()
            begun = time.perf_counter()
            answer = begin(plan, *args)
            total_s = time.perf_counter() - begun
            # They are added up when the step is over: that takes time.
            sums = StepSums(
                steps=1,
                sequences=len(plan.chunks),
                rows=plan.num_tokens,
                total_s=total_s,
                forward_s=watch.parts.get("forward", 0.0),
                model_s=watch.parts.get("model", 0.0),
                sample_s=watch.parts.get("sample", 0.0),
                operation_ns=_taken(self._draft_spent),
            )
            self._draft_steps.append((StepKind.DRAFT if plan.num_sampled else StepKind.READ, sums))
            return answer

        vars(pipeline).update(begin=timed)

    def _forget_all(self) -> None:
        self.core.scheduler.cache.flush()
        if isinstance(self.core.proposer, DraftModel):
            self.core.proposer.clear()


def _kind(plan: StepPlan) -> StepKind:
    if any(len(chunk.token_ids) > chunk.sampled for chunk in plan.chunks):
        return StepKind.PROMPT
    return StepKind.VERIFY if plan.num_tokens > len(plan.chunks) else StepKind.PLAIN


def _profiled(model: Any) -> npt.NDArray[np.int64] | None:
    return model.profile() if isinstance(model, NativeLM) else None


def _taken(spent: npt.NDArray[np.int64] | None) -> npt.NDArray[np.int64] | None:
    """What was counted since it was last taken."""
    if spent is None:
        return None
    taken = spent.copy()
    spent[:] = 0
    return taken
