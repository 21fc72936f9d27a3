"""Which tokens of which sequences run in the next step.

Runs in: engine thread; owns: what a step in the making changes (see `Roster` for the rest).

There is no prefill phase and no decode phase: every step takes one token of each decoding sequence first, then chunks
of prompts up to the step's token budget, then admits waiting sequences into what is left. Why everybody's turn comes
and everybody ends, see `edgekv.core.roster`.

What is proposed for decoding sequences (see `Chunk`) comes last, into blocks that nobody else needs in this step, and
has at most half of the tokens while a prompt is to be computed. It is there for one step: blocks that only hold
proposals which were none of the sequence's words are free again when the step is complete.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Listing
from dataclasses import replace
from enum import Enum, auto
from itertools import islice
from types import MappingProxyType
from typing import TypeAlias

from edgekv.core.kv_cache import KVCache
from edgekv.core.limits import Limits
from edgekv.core.outcome import Outcome, ends_by_length, take_tokens
from edgekv.core.prefix_cache import Match
from edgekv.core.roster import SPARED_AFTER, Counters, Roster, Vacated, cheapness
from edgekv.core.sequence import FinishReason, Sequence, Stage
from edgekv.core.step import UNKNOWN, BlockCopy, Chunk, Finished, Sampled, Started, StepPlan
from edgekv.core.waiting import rank

__all__ = ["SPARED_AFTER", "Counters", "Limits", "Outcome", "Proposals", "Scheduler", "Vacated"]

Proposals: TypeAlias = Mapping[int, tuple[int, ...]]  # the tokens that may come next, by the id of a sequence
NO_PROPOSALS: Proposals = MappingProxyType({})


class Room(Enum):
    """Why a waiting sequence cannot come in: there is no room for it, or others are let in before it."""

    NONE = auto()
    LATER = auto()


class Scheduler(Roster):
    """The choice among the sequences.

    `plan` and `complete` (or `retreat`) alternate, with one exception: between `plan` and `complete`, `plan_ahead` may
    make the plan that is completed next. Nothing else is planned or vacated until that has been completed or thrown
    away; sequences may be submitted and aborted at any time.
    """

    def __init__(self, cache: KVCache, limits: Limits) -> None:
        super().__init__(cache, limits)
        self.misses: dict[str, int] = {}
        self._started: list[Started] = []

    def decoding(self) -> dict[Sequence, int]:
        """The sequences of which one token is to be computed, and for how many more the step after may verify words.

        The last verified row chooses a word, too, so that is one less than the sequence may still have.
        """
        return {
            sequence: sequence.spec.sampling.max_tokens - sequence.num_output - 1
            for sequence in self._running.values()
            if sequence.num_uncomputed == 1
        }

    def plan(self, proposals: Proposals = NO_PROPOSALS) -> StepPlan:
        """Choose the next step. Empty when nothing can run (then whoever waits cannot fit: see `hopeless`).

        Of `proposals` as many are verified as there is room for; those for sequences that do not decode are ignored.
        """
        chunks: dict[int, Chunk] = {}
        preempted: list[int] = []
        copies: list[BlockCopy] = []
        ordered = sorted(self._running.values(), key=rank)
        for sequence in ordered:
            if sequence.num_uncomputed == 1 and self._make_room(sequence, chunks, preempted):
                chunks[sequence.id] = self._chunk(sequence, 1)
        decodes = list(chunks)
        budget = self.limits.step_tokens(len(chunks)) - len(chunks)
        kept = min(sum(len(proposals.get(number, ())) for number in decodes), max(0, budget // 2))
        budget -= kept
        for sequence in ordered:
            if budget > 0 and sequence.stage is Stage.RUNNING and sequence.id not in chunks:
                chunk = self._chunk(sequence, budget)
                chunks[sequence.id] = chunk
                budget -= len(chunk.token_ids)
        if not preempted:
            copies = self._admit(chunks, budget)
        room = self.limits.step_tokens(len(decodes)) - sum(len(chunk.token_ids) for chunk in chunks.values())
        if self.limits.max_proposed is not None:
            room = min(room, self.limits.max_proposed)
        self._propose(decodes, proposals, room, chunks)
        self.counters.preemptions += len(preempted)
        return StepPlan(tuple(copies), tuple(chunks.values()), tuple(preempted))

    def plan_ahead(self, plan: StepPlan) -> StepPlan | None:
        """The step after `plan`, before anybody knows what that samples: one UNKNOWN token of each that goes on.

        The blocks for them are taken now; thrown away, the plan leaves them to its sequences. None, with nothing taken,
        where the step after `plan` may have to be another one, or cannot be known: a prompt is not done, a sequence
        waits that could be admitted, proposals are verified, or there are too few blocks, so that somebody would have
        to be preempted.
        """
        if any(chunk.proposed for chunk in plan.chunks):
            return None
        chunks = [chunk for chunk in plan.chunks if chunk.samples and self.runs(chunk.sequence)]
        going_on = [chunk for chunk in chunks if not ends_by_length(chunk.sequence, chunk.end + 1)]
        nobody_leaves = len(going_on) == len(self._running)
        if not going_on or len(chunks) < len(self._running):
            return None
        if self.num_waiting and not (nobody_leaves and (self._is_full() or self._nobody_fits())):
            return None
        missing = sum(self.cache.missing_blocks(chunk.sequence, chunk.end + 1) for chunk in going_on)
        if missing > self.cache.obtainable_blocks:
            return None
        ahead: list[Chunk] = []
        for chunk in going_on:
            sequence = chunk.sequence
            self.cache.grow(sequence, chunk.end + 1)
            ahead.append(Chunk(sequence, chunk.end, (UNKNOWN,), tuple(sequence.block_table), sampled=1))
        return StepPlan((), tuple(ahead))

    def still_running(self, plan: StepPlan) -> StepPlan:
        """The plan without those sequences that have ended since it was made: what they computed is nobody's."""
        return replace(plan, chunks=tuple(chunk for chunk in plan.chunks if self.runs(chunk.sequence)))

    def complete(self, plan: StepPlan, sampled: Listing[Sampled]) -> Outcome:
        """Take a step's results: `sampled` has one entry for each sampled row, in the plan's order.

        All its sequences run still (see `still_running`).
        """
        self.cache.unpin()
        outcomes: list[Outcome] = []
        results = iter(sampled)
        for chunk in plan.chunks:
            sequence = chunk.sequence
            assert sequence.num_computed == chunk.start, f"sequence {sequence.id}: a step is missing before this one"
            prompt_left = max(0, sequence.num_prompt - chunk.start)
            self.counters.computed_prompt_tokens += min(prompt_left, len(chunk.token_ids))
            news = self._take_tokens(chunk, list(islice(results, chunk.sampled)))
            # Of proposals that the sequence did not say, keys and values lie behind these, and are overwritten.
            sequence.num_computed = min(chunk.end, len(sequence.tokens) - 1) if chunk.samples else chunk.end
            self.cache.publish(sequence)
            self.cache.trim(sequence)
            self._prefilling_keys.forget(chunk)
            if news.finished:
                self._stop_running(sequence, Stage.FINISHED)
            outcomes.append(news)
        return Outcome.of(outcomes)

    def _take_tokens(self, chunk: Chunk, choices: Listing[Sampled]) -> Outcome:
        outcome = take_tokens(chunk, choices)
        self.counters.generated_tokens += len(outcome.tokens)
        for verified in outcome.verified:
            self.counters.proposed_tokens += verified.proposed
            self.counters.accepted_tokens += verified.accepted
        return outcome

    def give_up(self, sequence_ids: Listing[int], reason: FinishReason, detail: str) -> tuple[Finished, ...]:
        """End sequences that a fault has hit; the others are not disturbed, and nothing they left is reused."""
        finished: list[Finished] = []
        for sequence_id in sequence_ids:
            # One at a time: what several of them share is withdrawn with the last that holds it.
            if sequence_id in self._running:
                self.cache.distrust(self._running[sequence_id])
            if self.abort(sequence_id):
                finished.append(Finished(sequence_id, reason, detail))
        return tuple(finished)

    def retreat(self, plan: StepPlan) -> bool:
        """A step found too little memory and did not happen: plan it again with one sequence less.

        What it was to verify is not proposed again by itself.

        The sequence that is cheapest to lose is preempted, and nobody is admitted in its place until another sequence
        has ended, or the same step would fail again for ever. False, and nothing preempted, where only one runs.
        """
        most_running = len(self._running) - 1
        self.undo(plan)
        if most_running == 0:
            return False
        while len(self._running) > most_running:
            self._preempt(max(self._running.values(), key=cheapness))
            self.counters.preemptions += 1
        self._most_running = most_running
        return True

    def undo(self, plan: StepPlan) -> None:
        """A step did not happen: let go of what it alone needed. Those that came in by a copy wait again."""
        self.cache.unpin()
        for sequence in self._running.values():
            self.cache.trim(sequence)
        copied = {copy.target for copy in plan.copies}
        for sequence in self.running:
            if copied.intersection(sequence.block_table):
                # Whether the copy was made is not known, so what it brought does not count as computed.
                sequence.num_computed -= sequence.num_computed % self.cache.block_size
                self._preempt(sequence)

    def take_started(self) -> tuple[Started, ...]:
        """The sequences scheduled for the first time since the last call."""
        started, self._started = tuple(self._started), []
        return started

    def _admit(self, chunks: dict[int, Chunk], budget: int) -> list[BlockCopy]:
        copies: list[BlockCopy] = []
        for sequence in self._waiting.turns():
            if budget <= 0 or self._is_full():
                break
            match = self._room_for(sequence)
            if match is Room.LATER:
                continue
            if match is Room.NONE:
                break  # first come, first served: nobody overtakes a sequence that waits for memory
            assert isinstance(match, Match)
            self._waiting.serve(sequence)
            copies += self.cache.admit(sequence, match)
            self._running[sequence.id] = sequence
            sequence.stage = Stage.RUNNING
            self._note_start(sequence, match.miss)
            self._prefilling_keys.announce(sequence)
            chunks[sequence.id] = self._chunk(sequence, budget)
            budget -= len(chunks[sequence.id].token_ids)
        return copies

    def _nobody_fits(self) -> bool:
        """Whether `_admit` would let nobody in, however many tokens a step may have."""
        rooms = (self._room_for(sequence) for sequence in self._waiting.turns())
        return next((room for room in rooms if room is not Room.LATER), Room.NONE) is Room.NONE

    def _room_for(self, sequence: Sequence) -> Match | Room:
        """The prefix with which a waiting sequence could come in now."""
        room = self.cache.pool.total_blocks - self._pinned_for_others(sequence)
        if self.cache.blocks_for(len(sequence.tokens)) > room:
            return Room.LATER  # it waits for the pool to grow, and nobody waits for it meanwhile
        match = self.cache.match(sequence)
        if self._prefilling_keys.comes_soon(sequence, len(match.nodes)):
            return Room.LATER  # its prefix is being computed for another: waiting costs less than computing it twice
        # One block in reserve for each running sequence, so that admitting does not preempt at the next boundary.
        if not self.cache.can_admit(sequence, match, reserve_blocks=len(self._running)):
            return Room.NONE
        return match

    def _make_room(self, sequence: Sequence, chunks: dict[int, Chunk], preempted: list[int]) -> bool:
        """Give a decoding sequence the block its next token needs. False if it had to be preempted itself."""
        while sequence.stage is Stage.RUNNING and not self.cache.can_grow(sequence):
            victim = max(self._running.values(), key=cheapness)
            chunks.pop(victim.id, None)
            self._preempt(victim)
            preempted.append(victim.id)
        if sequence.stage is not Stage.RUNNING:
            return False
        self.cache.grow(sequence)
        return True

    def _propose(self, decodes: Listing[int], proposals: Proposals, room: int, chunks: dict[int, Chunk]) -> None:
        """Let the chunks of decodes verify what is proposed, `room` tokens in all, in blocks that nobody else needs.

        As when somebody is admitted, each running sequence has one block in reserve.
        """
        asking = [number for number in decodes if proposals.get(number)]
        for place, number in enumerate(asking):
            sequence = chunks[number].sequence
            spare_blocks = max(0, self.cache.obtainable_blocks - len(self._running))
            slots = (len(sequence.block_table) + spare_blocks) * self.cache.block_size - len(sequence.tokens)
            left = sequence.spec.sampling.max_tokens - sequence.num_output
            most = max(0, min(room // (len(asking) - place), slots, left - 1))
            words = proposals[number][:most]
            if words:
                self.cache.grow(sequence, len(sequence.tokens) + len(words))
                chunks[number] = chunks[number].with_proposals(words, tuple(sequence.block_table))
                room -= len(words)

    def _chunk(self, sequence: Sequence, most_tokens: int) -> Chunk:
        start = sequence.num_computed
        end = min(len(sequence.tokens), start + most_tokens)
        return Chunk(
            sequence=sequence,
            start=start,
            token_ids=tuple(sequence.tokens[start:end]),
            block_table=tuple(sequence.block_table),
            sampled=int(end == len(sequence.tokens)),
        )

    def _note_start(self, sequence: Sequence, miss: str | None) -> None:
        if sequence.cached_tokens is not None:
            return  # resumed
        sequence.cached_tokens = sequence.num_computed
        self.counters.cached_prompt_tokens += sequence.num_computed
        self._started.append(Started(sequence.id, sequence.num_computed, miss))
        if miss is not None:
            kind = miss.split(":")[0]
            self.misses[kind] = self.misses.get(kind, 0) + 1
