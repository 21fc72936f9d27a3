"""A smaller model guesses how sequences go on; the model that was asked verifies it.

Runs in: engine thread; owns: its views of the sequences (see `draft_views`), and what runs its steps.

A guess of k tokens takes k steps of the smaller model, for all sequences together:

    step 1      what it lags behind, mostly one or two tokens: chooses the first token of the guess
    step 2      that token: chooses the second, unless it is too unlikely by now to be worth it
    ...         (a device that chooses by itself is given all steps at once, and is waited for only then)

What it has seen nothing of, a prompt above all, is read before, some of it at a time.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Listing
from dataclasses import dataclass

from edgekv.core.kv_cache import KVCache
from edgekv.core.sequence import Sequence
from edgekv.core.step import UNKNOWN, Chunk, PoolStats, Sampled, StepPlan
from edgekv.engine.at_once import Done
from edgekv.engine.draft_rows import chance, draft_row
from edgekv.engine.draft_settings import LAG_TOKENS
from edgekv.engine.draft_views import DraftViews, View
from edgekv.engine.memory_errors import is_out_of_memory
from edgekv.engine.proposer import Proposer, Reading
from edgekv.engine.protocols import Pending, Pipeline
from edgekv.engine.sample_row import SampleRow
from edgekv.engine.sampler import NonFiniteLogits

# How long it does nothing after a step of it found too little memory: others may need it more.
# Each time for twice as long: what it has read is lost every time.
REST_S, MOST_REST_S = 10.0, 640.0


@dataclass(frozen=True, slots=True)
class _Step:
    views: list[View]
    chunks: list[Chunk]
    pending: Pending


class DraftModel(Proposer):
    """Guesses with a model of the same vocabulary.

    Draws what the target would with its own distribution: the same settings, and the same random number for the same
    place. So both choose the same token as often as their distributions' quantiles agree.

    Args:
        cache: its block tables.
        vocab_size: tokens that it knows; a sequence that says another one gets no guess any more.
        target_vocab: tokens that the target knows; no other is proposed.
        context_tokens: positions that it knows; there are no guesses beyond.
        max_step_tokens: the most that it reads in one step, so that nobody waits long for it.
        overlaps: whether the steps of `pipeline` are chosen on the device, so that the next can be begun at once.
        clock: seconds.
    """

    method = "model"

    def __init__(
        self,
        cache: KVCache,
        *,
        vocab_size: int,
        target_vocab: int,
        context_tokens: int,
        max_step_tokens: int,
        overlaps: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        knows_all = vocab_size >= target_vocab
        self.views = DraftViews(cache, vocab_size=None if knows_all else vocab_size, context_tokens=context_tokens)
        self.pipeline: Pipeline | None = None
        """What runs it; None while its weights are not there."""
        self.gone: str | None = None
        """Why it will not come back, where it will not."""
        self._vocab_size, self._target_vocab = vocab_size, target_vocab
        self._max_step_tokens = max_step_tokens
        self._lag_tokens = min(LAG_TOKENS, max_step_tokens)
        self._overlaps = overlaps
        self._clock = clock
        self._rests_until_s: float | None = None
        self._rest_s = REST_S / 2
        self._reading = Reading()

    @property
    def cache(self) -> KVCache:
        """Its block tables."""
        return self.views.cache

    @property
    def has_memory(self) -> bool:
        """Whether it has weights, and blocks for keys and values."""
        return self.pipeline is not None and self.cache.pool.total_blocks > 0

    @property
    def away(self) -> str | None:
        """See `Proposer`."""
        if self.gone is not None:
            return self.gone
        if self.pipeline is None:
            return "the draft model's memory was given back"
        if self.cache.pool.total_blocks == 0:
            return "the draft model's KV cache was given back"
        if self._rests_until_s is not None and self._clock() < self._rests_until_s:
            return "the draft model found too little memory for a step"
        return None

    @property
    def pool(self) -> PoolStats:
        """See `Proposer`."""
        return self.cache.pool.stats()

    def serves(self, sequence: Sequence) -> bool:
        """See `Proposer`."""
        return self.views.serves(sequence)

    def unread(self, sequence: Sequence) -> int:
        """See `Proposer`."""
        missing = self.views.unread(sequence)
        return missing if missing > self._lag_tokens else 0

    def propose(self, sequences: Listing[Sequence], most: Mapping[int, int]) -> Mapping[int, tuple[int, ...]]:
        """See `Proposer`. A guess ends where the draft would end the answer."""
        if self.away is not None:
            return {}
        asking = [sequence for sequence in sequences if most[sequence.id] > 0]
        busy = {sequence.id for sequence in asking}
        opened = (self.views.open(sequence, most[sequence.id], busy) for sequence in asking)
        views = [view for view in opened if view is not None]
        try:
            self._read(views)
            return self._guess(self._ready(views))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            # What the step left half done is not known; it is worth no request.
            self.views.clear()
            self._rest_s = min(2 * self._rest_s, MOST_REST_S)
            self._rests_until_s = self._clock() + self._rest_s
            return {}

    def take_reading(self) -> Reading:
        """See `Proposer`."""
        reading, self._reading = self._reading, Reading()
        return reading

    def forget(self, sequence_id: int) -> None:
        """See `Proposer`; what it has computed stays in its prefix cache."""
        self.views.forget(sequence_id)

    def clear(self) -> None:
        """Forget everything that was computed."""
        self.views.clear()

    def check_integrity(self) -> None:
        """Raise AssertionError where an invariant does not hold; between steps."""
        self.views.check_integrity()

    def _read(self, views: list[View]) -> None:
        """Compute what was not seen of those that are far behind, one step's worth of it."""
        begun_s = self._clock()
        budget = self._max_step_tokens
        chunks: list[Chunk] = []
        for view in views:
            if view.lag > self._lag_tokens and budget > 0:
                # The last token is left to the guess, which needs its logits.
                chunks.append(_chunk(view.own, min(view.lag - 1, budget), sampled=0))
                budget -= len(chunks[-1].token_ids)
        if not chunks:
            return
        self._begin(chunks, [], None).result()
        self.views.copied()
        for chunk in chunks:
            self.views.has_read(chunk.sequence, chunk.end)
        tokens = sum(len(chunk.token_ids) for chunk in chunks)
        self._reading = Reading(self._reading.tokens + tokens, self._reading.seconds + self._clock() - begun_s)

    def _ready(self, views: list[View]) -> list[View]:
        """Those that a step can begin a guess for."""
        ready, budget = list[View](), self._max_step_tokens
        for view in views:
            if view.lag <= min(self._lag_tokens, budget):
                ready.append(view)
                budget -= view.lag
        return ready

    def _guess(self, views: list[View]) -> dict[int, tuple[int, ...]]:
        guesses: dict[int, list[int]] = {view.target.id: [] for view in views}
        going, steps = list(views), list[_Step]()
        for view in views:
            view.chance = 1.0
        lost: list[View] = []
        try:
            for place in range(max((view.most for view in views), default=0)):
                going = [view for view in going if view.most > place]
                if not going:
                    break
                after = steps[-1].pending if steps and self._overlaps else None
                steps.append(self._step(going, guesses, place, after))
                if not self._overlaps:
                    going = self._take(steps[-1], going, guesses, lost)
            if self._overlaps:
                going = list(views)
                for step in steps:
                    going = self._take(step, going, guesses, lost)
        except (MemoryError, RuntimeError):
            _wait_for(steps)
            raise
        self.views.copied()
        for view in views:
            view.known, view.guess = len(view.target.tokens), tuple(guesses[view.target.id])
        for view in lost:
            self.views.distrust(view)
        return {number: tuple(tokens) for number, tokens in guesses.items() if tokens}

    def _step(self, views: list[View], guesses: dict[int, list[int]], place: int, after: Pending | None) -> _Step:
        chunks = [self._next(view, guesses[view.target.id], place) for view in views]
        rows = [
            self._row(view, guesses[view.target.id], place)
            for view, chunk in zip(views, chunks, strict=True)
            for _ in range(chunk.sampled)
        ]
        return _Step(views, chunks, self._begin(chunks, rows, after))

    def _next(self, view: View, guess: list[int], place: int) -> Chunk:
        own = view.own
        if place == 0:
            # Where a whole guess was right, its last token is not computed. A step of nothing but sampled rows is one
            # that cards have captured.
            return _chunk(own, view.lag, sampled=view.lag if self._overlaps and view.lag <= 2 else 1)
        token = UNKNOWN if self._overlaps else guess[-1]
        return Chunk(own, len(own.tokens) + place - 1, (token,), tuple(own.block_table), sampled=1)

    def _row(self, view: View, guess: list[int], place: int) -> SampleRow:
        return draft_row(
            view.target,
            guess,
            num_unknown=place if self._overlaps else 0,
            penalised=not self._overlaps,
            vocab_size=self._vocab_size,
        )

    def _take(self, step: _Step, going: list[View], guesses: dict[int, list[int]], lost: list[View]) -> list[View]:
        """Add what a step chose for those whose guess goes on; answers of which it goes on further.

        Those of them that it could choose nothing for are `lost`.
        """
        bad: set[int] = set()
        try:
            results = iter(step.pending.result())
        except NonFiniteLogits as error:
            bad = set(error.rows)
            results = iter(step.pending.result(without=bad))
        further, row = list[View](), 0
        for view, chunk in zip(step.views, step.chunks, strict=True):
            chosen = [next(results) for place in range(row, row + chunk.sampled) if place not in bad]
            row += chunk.sampled
            if view not in going:
                continue
            if row - 1 in bad:
                lost.append(view)
            elif self._add(view, chosen[-1], guesses[view.target.id], step.pending, row - 1):
                further.append(view)
        return further

    def _add(self, view: View, chosen: Sampled, guess: list[int], pending: Pending, row: int) -> bool:
        """Make a token the next of a guess, if it is worth that; answers whether the guess goes on."""
        token, sampling = chosen.token_id, view.target.spec.sampling
        if token >= self._target_vocab or token in sampling.stop_token_ids:
            return False
        least, least_to_go_on = self.least_chances
        if least_to_go_on > 0.0 and isinstance(pending, Done) and pending.logits is not None:
            view.chance *= chance(pending.logits[row].cpu().numpy(), token, sampling.temperature)
            if view.chance < least:
                return False
        guess.append(token)
        return view.chance >= least_to_go_on

    def _begin(self, chunks: list[Chunk], rows: list[SampleRow], after: Pending | None) -> Pending:
        assert self.pipeline is not None
        # A copy belongs before whatever comes behind it.
        return self.pipeline.begin(StepPlan(self.views.take_copies(), tuple(chunks)), rows, after)


def _chunk(own: Sequence, length: int, *, sampled: int) -> Chunk:
    start = own.num_computed
    return Chunk(own, start, tuple(own.tokens[start : start + length]), tuple(own.block_table), sampled)


def _wait_for(steps: Iterable[_Step]) -> None:
    """They are worth nothing any more, and nobody is to touch their memory before they are done."""
    for step in steps:
        try:
            step.pending.result(without=range(sum(chunk.sampled for chunk in step.chunks)))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
