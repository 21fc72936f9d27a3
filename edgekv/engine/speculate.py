"""Between the scheduler, who proposes, and who decides how much of it pays.

Runs in: engine thread; owns: what was counted (proposer and controller keep what they learn).
"""

from collections.abc import Callable, Iterable

from edgekv.core.scheduler import Outcome, Proposals, Scheduler
from edgekv.core.sequence import Sequence
from edgekv.core.speculation import RESTING_STEPS, Controller
from edgekv.core.step import SpeculationState, SpeculationStats, StepPlan
from edgekv.engine.memory_errors import is_out_of_memory
from edgekv.engine.proposer import Proposer

_FRESH_SHARE = 0.1  # of the latest verification in what is told of recent ones
_STATS_STEPS = 16  # to tell what has become of them takes a hundredth of a small model's step
_BANNED_STEPS = 256  # without proposals after one that found too little memory for them


class Speculation:
    """Asks for proposals before a step, and tells afterwards what they were good for.

    Args:
        scheduler: knows who decodes.
        proposer: guesses.
        controller: says how many tokens are worth a guess; None: as many as the sequence may still have.
        clock: seconds.
    """

    def __init__(
        self, scheduler: Scheduler, proposer: Proposer, controller: Controller | None, clock: Callable[[], float]
    ) -> None:
        self._scheduler, self._proposer, self._controller, self._clock = scheduler, proposer, controller, clock
        self._tokens_a_step: float | None = None
        self._choice: dict[int, int] | None = None
        self._thinking_s = self._spent_s = 0.0
        self._step: tuple[int, int, int] | None = None
        self._is_alone = False
        self._verifications = self._read_tokens = self._ended = 0
        self._rests: dict[int, int] = {}  # steps for which there is nothing to choose, by sequences running
        self._rested: dict[int, int] = {}  # of them, those that went by since the controller heard of them
        self._resting: int | None = None  # sequences running in a step that rests
        self._banned_steps = 0
        self._stats: SpeculationStats | None = None
        self._stats_as_of: tuple[object, ...] = ()
        self._stats_age = 0

    def wants(self) -> bool:
        """Whether the next step is likely to verify something, as far as can be told while one is in flight."""
        self._choice = self._choose()
        if not self._choice:
            self._thinking_s = 0.0  # the device was busy meanwhile
        return any(self._choice.values())

    def proposals(self) -> Proposals:
        """For the next step."""
        choice, self._choice = self._choice if self._choice is not None else self._choose(), None
        if not choice:
            if self._thinking_s and self._controller is not None:
                self._controller.observe_thinking(self._thinking_s)
                self._spent_s, self._thinking_s = self._thinking_s, 0.0
            return {}
        decoding = self._scheduler.decoding()
        most = {sequence.id: min(choice.get(sequence.id, 0), left) for sequence, left in decoding.items()}
        if not any(most.values()):
            return {}
        begun_s = self._clock()
        if self._controller is not None:
            self._proposer.least_chances = self._controller.least_chances()
        proposals = self._ask(list(decoding), most)
        taken_s, self._thinking_s = self._thinking_s + self._clock() - begun_s, 0.0
        self._spent_s = taken_s
        reading = self._proposer.take_reading()
        self._read_tokens += reading.tokens
        if self._controller is not None:
            if reading.tokens:
                self._controller.observe_reading(reading.tokens, reading.seconds)
            else:
                for number, wanted in most.items():
                    if wanted:
                        self._controller.observe_asking(number, wanted, len(proposals.get(number, ())))
            longest = max((len(tokens) for tokens in proposals.values()), default=0)
            if longest or not reading.tokens:
                # One more than there are was guessed, where a guess ended before.
                guessed = min(longest + 1, max(most.values()))
                self._controller.observe_proposing(guessed, max(0.0, taken_s - reading.seconds))
        return {number: tokens[: most[number]] for number, tokens in proposals.items()}

    def _ask(self, decoding: list[Sequence], most: dict[int, int]) -> Proposals:
        try:
            return self._proposer.propose(decoding, most)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            self.stop_for_a_while()
            return {}

    def observe(self, plan: StepPlan, outcome: Outcome, seconds: float | None, *, is_alone: bool = False) -> None:
        """A step was done, and took so long; None: `took` will say.

        `is_alone`: it verified nothing, and was begun alone only because it might have.
        """
        if self._resting is not None and not outcome.verified:
            # Of steps that are all alike one in a few says enough.
            self._rested[self._resting] = self._rested.get(self._resting, 0) + 1
            return
        self._verifications += len(outcome.verified)
        for each in outcome.verified:
            self._proposer.observe(each.sequence_id, each.proposed, each.accepted)
            mean, tokens = self._tokens_a_step, 1 + each.accepted
            self._tokens_a_step = tokens if mean is None else mean + _FRESH_SHARE * (tokens - mean)
            if self._controller is not None:
                self._controller.observe(each.sequence_id, each.proposed, each.accepted)
        if self._controller is not None and any(len(chunk.token_ids) != chunk.sampled for chunk in plan.chunks):
            self._controller.observe_other_step()
        elif self._controller is not None:
            proposed = sum(len(chunk.proposed) for chunk in plan.chunks)
            accepted = sum(each.accepted for each in outcome.verified)
            self._step, self._is_alone = (len(plan.chunks), proposed, accepted), is_alone
            if seconds is not None:
                self._controller.observe_step(*self._step, seconds)
                self._step = None

    def took(self, seconds: float) -> None:
        """The step last observed took so long with all that belongs to it: proposing, planning, reporting."""
        spent_s, self._spent_s = self._spent_s, 0.0
        if self._step is not None and self._controller is not None:
            taken_s = max(0.0, seconds - spent_s)
            if self._is_alone:
                self._controller.observe_alone(self._step[0], taken_s)
            else:
                self._controller.observe_step(*self._step, taken_s)
        self._step = None

    def stop_for_a_while(self) -> None:
        """A step that was to verify found too little memory: the next ones do without."""
        self._banned_steps = _BANNED_STEPS

    def forget(self, sequence_ids: Iterable[int]) -> None:
        """These have ended."""
        for sequence_id in sequence_ids:
            self._ended += 1
            # To whoever talks alone the next answer is another matter.
            self._rests.pop(1, None)
            self._proposer.forget(sequence_id)
            if self._controller is not None:
                self._controller.forget(sequence_id)

    def stats(self) -> SpeculationStats:
        """As of a few steps ago, or of now where a sequence has ended since, or the proposer's memory has changed."""
        proposer = self._proposer
        as_of = proposer.yields, proposer.returns, proposer.gone, self._ended, self._verifications > 0
        self._stats_age += 1
        if self._stats is None or as_of != self._stats_as_of or self._stats_age > _STATS_STEPS:
            self._stats, self._stats_as_of, self._stats_age = self._fresh_stats(), as_of, 0
        return self._stats

    def _fresh_stats(self) -> SpeculationStats:
        proposer, controller = self._proposer, self._controller
        state, detail = SpeculationState.ON, ""
        if proposer.gone is not None:
            state, detail = SpeculationState.OFF, proposer.gone
        elif proposer.away is not None:
            state, detail = SpeculationState.YIELDED, proposer.away
        elif controller is not None and controller.pause is not None:
            state, detail = SpeculationState.PAUSED, controller.pause
        return SpeculationStats(
            method=proposer.method,
            state=state,
            detail=detail,
            tokens=0.0 if controller is None else controller.tokens,
            acceptance=None if controller is None else controller.acceptance,
            speedup=None if controller is None else controller.speedup,
            verifications=self._verifications,
            pauses=0 if controller is None else controller.pauses,
            yields=proposer.yields,
            returns=proposer.returns,
            read_tokens=self._read_tokens,
            pool=proposer.pool,
            drafter=proposer.name,
            most_tokens=None if controller is None else controller.most,
            tokens_a_step=self._tokens_a_step,
        )

    def _choose(self) -> dict[int, int]:
        running = self._scheduler.num_running
        left = self._rests.get(running, 0)
        self._resting = running if left else None
        if left:
            self._rests[running] = left - 1
            return {}
        if self._banned_steps > 0:
            self._banned_steps -= 1
            return {}
        if self._proposer.away is not None:
            return {}
        decoding = self._scheduler.decoding()
        most = {sequence.id: left if self._proposer.serves(sequence) else 0 for sequence, left in decoding.items()}
        if self._controller is None or not most:
            return most
        for resting, steps in self._rested.items():
            self._controller.observe_rest(resting, steps)
        self._rested.clear()
        if self._controller.is_in_debt(len(most)):
            self._rests[running] = RESTING_STEPS
            return {}
        begun_s = self._clock()
        unread = {
            sequence.id: count
            for sequence in decoding
            if most[sequence.id] > 0 and (count := self._proposer.unread(sequence))
        }
        said = {sequence.id: sequence.num_output for sequence in decoding} if unread else None
        chosen = self._controller.choose(most, unread, said)
        if self._controller.rest_steps:
            self._rests[running] = self._controller.rest_steps
        self._thinking_s += self._clock() - begun_s
        return chosen
