"""How many tokens are worth proposing for each sequence: as many as make the most tokens a second.

Runs in: engine thread; owns: what was measured of proposals and of steps. It has no clock: seconds are told.

A step of n sequences that verifies m proposals computes n + m rows and yields n tokens and one more for each proposal
that is accepted. With s_i the chance that the first i proposals for a sequence are all accepted, the i-th adds s_i
tokens; so the proposals of all sequences are taken in the order of their s_i, as many as maximise

    (n + sum of s_i) / (seconds of n + m rows + seconds of proposing the longest)

and none where that is not more than n / (seconds of n rows). Who proposes may find nothing, or stop before; tokens and
rows count as often as they are proposed. Both sides are measured, not known: an account says what speculation may cost
to find out.

Who proposes may know better than any mean how likely a token is; `least_chances` says what is worth a row at the rate
that there is, and what one step more of the draft.

What a draft model has not read of a sequence, it reads when that is worth it (`core/speculation_reading`).
"""

from collections.abc import Mapping
from functools import partial
from math import inf

from edgekv.core.acceptance import Acceptances
from edgekv.core.speculation_accounts import CREDIT_STEPS, ProbingAccounts, probing_share
from edgekv.core.speculation_gain import Gain
from edgekv.core.speculation_reading import Reading
from edgekv.core.step_costs import LEAST_S, MOST_TIMES_MEAN, PlainSteps, StepCosts

_PROBES = (1, 4, 2, 8)  # the longer ones cost more, and tell of more places
# Every so many steps some rows more or fewer than what seems best: between what was measured the line may be bent.
_NUDGED_AFTER = 16
_NUDGES = (-1, 1, -2, 2)
# What was chosen holds for some steps of the same sequences, for to work it out takes as long as a small model's row;
# that nothing pays holds for longer.
_KEPT_STEPS = 8
RESTING_STEPS = 32
_MOST_RESTING_STEPS = 128
# Verifications of which acceptance is known well enough to be held against `min_acceptance`.
_JUDGED_AFTER = 16.0
_TRIED_AFTER = 16  # steps: below it they are tried, and no more than that

_SELDOM_FOUND = 0.02  # share of the times that somebody was asked

_FRESH_SHARE = 0.1  # of the latest step in what is told of recent ones


class Controller:
    """Chooses how many tokens are proposed.

    What speculation has cost more than it saved for any number of sequences is kept near a small share of their steps
    and some credit, and of what was gained before some may be lost again, as long as steps of as many rows take as long
    (`ProbingAccounts`). So it begins, outlasts what is hard to guess, and when it does not pay, goes on trying now and
    then. Reading has an account of its own: what was gained, and a share of all steps.

    Args:
        most: the most tokens proposed for a sequence.
        most_in_all: and for all sequences of a step together; None for no such limit.
        min_acceptance: with a smaller share of proposals accepted there are none, but for those that try it out.
    """

    def __init__(self, most: int = 8, *, most_in_all: int | None = None, min_acceptance: float = 0.0) -> None:
        if most < 1:
            raise ValueError(f"most is {most}, must be at least 1")
        self.most = most
        self.rest_steps = 0
        """For so many steps of as many sequences the latest choice, of nothing, may hold."""
        self.pauses = 0
        self.tokens = 0.0
        """Proposed for a sequence in recent steps, on average."""
        self.speedup: float | None = None
        """Tokens a second of recent steps with proposals against those without; None before any."""
        self._min_acceptance = min_acceptance
        self.gain = Gain(most, most_in_all)
        self.reading = Reading()
        self.accounts = ProbingAccounts()
        self._num_decodes = 1
        self._plain: dict[int, PlainSteps] = {}  # by number of sequences
        self._num_choices = self._num_probes = 0
        self._is_probing = False
        self._pays: dict[int, bool] = {}  # by number of sequences, as it was last found
        self._proposed_s = 0.0
        self._kept: dict[int, int] = {}
        self._kept_for: tuple[int, ...] = ()
        self._kept_steps = 0
        self._untried_steps = 0
        self._missing_steps = 0.0  # in the account, to try what was last thought of

    @property
    def costs(self) -> StepCosts:
        """Of steps."""
        return self.gain.costs

    @property
    def seen(self) -> Acceptances:
        """Of proposals."""
        return self.gain.seen

    @property
    def account_steps(self) -> float:
        """What speculation may still cost for as many sequences as there are, in steps without it.

        While it is negative nothing is proposed.
        """
        return self.accounts.left(self._num_decodes)

    @property
    def is_on(self) -> bool:
        """Whether proposals pay for as many sequences as there are, as far as is known."""
        return self._pays.get(self._num_decodes, False)

    @property
    def pause(self) -> str | None:
        """Why there are no proposals for as many sequences; None where there are some, and before it was found out."""
        if self._pays.get(self._num_decodes, True):
            return None
        if self._is_unacceptable:
            share = self.seen.all.each([1.0])[0]
            return f"of the first tokens proposed {share:.0%} were right, less than {self._min_acceptance:.0%}"
        found = self.seen.all.share_found
        if found is not None and found < _SELDOM_FOUND:
            return "nothing was found to propose"
        return "it does not pay at present" if self.seen.all.weight else None

    @property
    def acceptance(self) -> float | None:
        """The share of recent proposals that were accepted; None before any."""
        return self.seen.all.share

    def choose(
        self, most: Mapping[int, int], unread: Mapping[int, int] | None = None, said: Mapping[int, int] | None = None
    ) -> dict[int, int]:
        """How many tokens to propose in the next step, by sequence; whoever is not named has none.

        `most`: the most that each of the decoding sequences may have, by id. `unread`: tokens that have to be read
        first of some of them; `said`: how many these have said themselves.
        """
        self._num_decodes = max(1, len(most))
        self._num_choices += 1
        self._is_probing, self.rest_steps = False, 0
        plain_s = self.costs.plain(len(most))
        plain = self._plain.get(len(most))
        if plain_s is None or plain is None or plain.is_due:
            return {}
        limits = {number: min(left, self.most) for number, left in most.items() if left > 0}
        is_nudged = self._num_choices % _NUDGED_AFTER == 0
        is_kept = self._kept_steps > 0 and self.account_steps >= 0 and self._kept_for == tuple(limits)
        if is_kept and not is_nudged and not unread:
            self._kept_steps -= 1
            return {number: min(tokens, limits[number]) for number, tokens in self._kept.items()}
        self._missing_steps = 0.0
        worth = self._worth(limits, unread or {}, said or {}, plain_s)
        chosen: dict[int, int] = {}
        if self.account_steps >= 0 and not self._is_unacceptable:
            nudge = _NUDGES[self._num_choices // _NUDGED_AFTER % len(_NUDGES)] if is_nudged else 0
            chosen = self.gain.best(worth, len(most), plain_s, nudge=nudge)
        if limits:
            self._note(bool(chosen))
        self._kept, self._kept_for = chosen, tuple(limits)
        self._kept_steps = _KEPT_STEPS if chosen and not is_nudged and not unread else 0
        may_probe = not self._is_unacceptable or self._untried_steps >= _TRIED_AFTER
        if not chosen and self.account_steps >= 0 and may_probe:
            chosen = self._probe(limits, unread or {}, len(most), plain_s)
        if chosen:
            self._untried_steps = 0
        elif limits:
            self.rest_steps = self._rest()
        if unread:
            self.reading.begin(chosen.keys() & unread.keys())
        return chosen

    def observe(self, sequence_id: int, proposed: int, accepted: int) -> None:
        """Of so many tokens that were verified for a sequence, the first `accepted` were right."""
        self.seen.observe(sequence_id, proposed, accepted)

    def least_chances(self) -> tuple[float, float]:
        """See `Gain`; of what is tried out, all is wanted."""
        return (0.0, 0.0) if self._is_probing else self.gain.least_chances()

    def observe_asking(self, sequence_id: int, wanted: int, proposed: int) -> None:
        """Who was asked to propose so many tokens for a sequence proposed some or all of them."""
        self.seen.observe_asking(sequence_id, wanted, proposed)

    def observe_reading(self, tokens: int, seconds: float) -> None:
        """So many tokens were read, for proposals to come."""
        self.reading.observe(tokens, seconds, self.costs.plain(self._num_decodes))

    def observe_proposing(self, tokens: int, seconds: float) -> None:
        """Proposing took so long, with at most so many tokens for a sequence."""
        self._proposed_s = self.gain.observe_proposing(self._num_decodes, tokens, seconds)

    def observe_thinking(self, seconds: float) -> None:
        """It took so long to find that nobody is to be asked."""
        plain_s = self.costs.plain(self._num_decodes)
        if plain_s:
            # Of what comes in while nothing is proposed, some is to be left: else a small model would never try again.
            share = probing_share(self._num_decodes) * RESTING_STEPS
            self.accounts.pay(self._num_decodes, min(seconds / plain_s, share / 2))

    def observe_step(self, decodes: int, proposed: int, accepted: int, seconds: float) -> None:
        """A step of so many sequences, without any prompt, verified and accepted so many tokens in so many seconds."""
        plain_s = self.costs.plain(decodes)
        plain = self._plain.setdefault(decodes, PlainSteps())
        self._num_decodes = decodes
        self._earn(1)
        self.tokens = _faded(self.tokens, proposed / decodes)
        proposing_s, self._proposed_s = self._proposed_s, 0.0
        if proposed == 0:
            if plain_s:
                self.accounts.pay(decodes, proposing_s / plain_s)
            if (measured_s := plain.observe(seconds, plain_s)) is not None:
                self.costs.observe(decodes, decodes, measured_s)
            return
        self._num_probes += self._is_probing
        expected_s = None if plain_s is None else self.costs.of(decodes, decodes + proposed)
        plain.interrupt(seconds, expected_s)
        self.costs.observe(decodes, decodes + proposed, seconds)
        if plain_s and expected_s:
            taken_s = proposing_s + min(max(seconds, LEAST_S), MOST_TIMES_MEAN * expected_s)
            gained = 1 + accepted / decodes
            self.accounts.pay(decodes, taken_s / plain_s - gained)
            self.reading.account.pay(min(0.0, taken_s / plain_s - gained))
            self.speedup = _faded(self.speedup, gained * plain_s / taken_s)

    def observe_other_step(self) -> None:
        """A step with prompts in it: what was proposed for it cannot be compared with anything."""
        plain_s = self.costs.plain(self._num_decodes)
        if self._is_probing and plain_s:
            # Else there would be one in each of many such steps.
            self._num_probes += 1
            self.accounts.pay(self._num_decodes, self._proposed_s / plain_s)
        self._proposed_s = 0.0

    def observe_alone(self, decodes: int, seconds: float) -> None:
        """A step without proposals took so long because it did not overlap with another, in case there were some."""
        plain_s = self.costs.plain(decodes)
        if plain_s:
            lost_s = max(0.0, min(seconds, MOST_TIMES_MEAN * plain_s) - plain_s)
            self.accounts.pay(decodes, (self._proposed_s + lost_s) / plain_s)
            self.accounts.earn(decodes, 1)
        self._proposed_s = 0.0

    def is_in_debt(self, decodes: int) -> bool:
        """Whether for so many sequences there is nothing to choose at present, so that nobody needs to think."""
        if not self.accounts.is_in_debt(decodes):
            return False
        self._num_decodes = decodes
        self._note(pays=False)
        return True

    def observe_rest(self, decodes: int, steps: int) -> None:
        """So many steps of which nothing else is told, without proposals, went by."""
        self._num_decodes = max(1, decodes)
        self._earn(steps)

    def forget(self, sequence_id: int) -> None:
        """The sequence has ended."""
        self.seen.forget(sequence_id)

    def _earn(self, steps: int) -> None:
        self.accounts.earn(self._num_decodes, steps)
        self.reading.account.earn(steps)
        self._untried_steps += steps

    @property
    def _is_unacceptable(self) -> bool:
        # Of the first proposals: later ones are accepted less often, and it is for the rate to say how many there are.
        return self.seen.all.weight >= _JUDGED_AFTER and self.seen.all.each([1.0])[0] < self._min_acceptance

    def _note(self, pays: bool) -> None:
        self.pauses += self.is_on and not pays
        self._pays[self._num_decodes] = pays

    def _rest(self) -> int:
        """For how many steps there is nothing else to choose: until something is worth reading, or can be tried."""
        if self._is_unacceptable:
            return max(1, _TRIED_AFTER - self._untried_steps)
        until_tried = self._missing_steps / probing_share(self._num_decodes)
        rest = min(max(RESTING_STEPS, until_tried), _MOST_RESTING_STEPS, self.reading.worth_in_steps)
        return max(1, int(rest))

    def _worth(
        self, limits: Mapping[int, int], unread: Mapping[int, int], said: Mapping[int, int], plain_s: float
    ) -> Mapping[int, int]:
        decodes = self._num_decodes
        # As if all were read, for they share the draft's steps.
        saved_share = partial(self.gain.saved_share, limits, decodes, plain_s)
        return self.reading.worth(limits, unread, said, plain_s / decodes, saved_share)

    def _probe(
        self, limits: Mapping[int, int], unread: Mapping[int, int], decodes: int, plain_s: float
    ) -> dict[int, int]:
        """Some tokens for one of the sequences after another, if that may cost what it will; of what is read, first."""
        if not limits:
            return {}
        known = [number for number in limits if not unread.get(number)]
        if not known:
            number = min(limits, key=lambda each: unread[each])
            # What will be worth it is waited for.
            if self.reading.token_s is not None and self.reading.worth_in_steps < inf:
                return {}
            return {number: 1} if self.reading.seconds(unread[number]) <= self.reading.account.left * plain_s else {}
        number = known[self._num_probes % len(known)]
        tokens = min(_PROBES[self._num_probes % len(_PROBES)], limits[number], self.gain.most_rows(decodes))
        if tokens > 1 and self._can_try(decodes, tokens, tokens, plain_s):
            return {number: tokens}
        # One step of the draft's guesses a token for each.
        everyone = dict.fromkeys(known[: self.gain.most_rows(decodes)], 1)
        for tried in (everyone, {number: 1}):
            if self._can_try(decodes, 1, len(tried), plain_s):
                return tried
        return {}

    def _can_try(self, decodes: int, tokens: int, rows: int, plain_s: float) -> bool:
        extra_s = self.gain.extra_s(decodes, rows, tokens)
        # Time alone gives no more than the first credit: whatever costs more could never be tried.
        self._missing_steps = min(extra_s / plain_s, CREDIT_STEPS) - self.account_steps
        self._is_probing = self._missing_steps <= 0
        return self._is_probing


def _faded(mean: float | None, value: float) -> float:
    return value if mean is None else mean + _FRESH_SHARE * (value - mean)
