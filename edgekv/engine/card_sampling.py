"""A step's tokens chosen on the card: settings go there, and tokens come back with what was asked for beside them.

Runs in: engine thread; owns: the table of counts for sequences with penalties, and the memory that results come to.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edgekv.core.step import Sampled
from edgekv.engine.card_buffers import StepBuffers
from edgekv.engine.card_device import Card, Event
from edgekv.engine.sample_row import SampleRow
from edgekv.engine.sampler import NonFiniteLogits
from edgekv.kernels.common.prepared import Prepared
from edgekv.kernels.fused import sample
from edgekv.kernels.fused.sample import SampleRoom, fill_counts
from edgekv.kernels.fused.sample_rows import RowSettings, SampleRows, pack_rows
from edgekv.model.card_memory import MOST_EDITS, MOST_LOGPROBS, SETTINGS_BYTES


class CardSampler:
    """Adds the choice of tokens to programs, tells the card each row's settings, and brings the tokens back.

    The card counts on by itself what a settled batch needs from step to step (the number of a token, the counts of what
    was drawn), so that settings are sent only when the batch has changed.

    Where proposals are verified, a sequence has several rows, one behind the other. With penalties the first has the
    sequence's own counts. Each other one has counts of its own for that step, with the proposals before it, and none of
    what is drawn in the rows beside it, which may be other tokens.
    """

    def __init__(self, card: Card, buffers: StepBuffers, vocab_size: int, in_flight: int) -> None:
        """`in_flight`: steps that may be begun and not read."""
        self._vocab_size = vocab_size
        rows = self._num_rows = buffers.limits.sampled
        self._words = buffers.results
        self._room = _room(buffers, rows, vocab_size)
        self._rows = SampleRows(
            buffers.view("settings", rows, SETTINGS_BYTES, dtype=torch.uint8),
            buffers.view("edit_ids", rows, MOST_EDITS, dtype=torch.int32),
            buffers.view("edit_values", rows, MOST_EDITS, dtype=torch.float32),
        )
        self._counts = buffers.view("counts", rows, vocab_size, dtype=torch.int16)
        self.tokens_at = (2 + 2 * MOST_LOGPROBS) * rows
        """Where in `StepBuffers.told` the chosen tokens are."""
        self._expected: list[tuple[int, int]] = []
        self._counted: dict[int, _Counted] = {}
        self._landings = [Landing(card, len(self._words), rows) for _ in range(in_flight + 1)]
        self._next = 0

    def prepare(self, logits: Tensor) -> list[Prepared]:
        """The launches that choose a token for each row of `logits`."""
        return sample.prepare(logits, self._rows, self._room, self._counts)

    def tell(self, rows: Sequence[SampleRow], arrivals: Sequence[int]) -> None:
        """The settings of the next step's rows, whose sequences came in as `arrivals`: a sequence's are neighbours.

        Raises ValueError for settings that make no sense.
        """
        known = [(arrival, row.num_output) for arrival, row in zip(arrivals, rows, strict=True)]
        counts_stay = True
        if known != self._expected or not known:
            self._expected = []  # should this fail, nothing is known of what the card has
            self._forget(arrivals)
            counts_rows = self._count(rows, arrivals)
            settings = [self._settings(*each) for each in zip(rows, counts_rows, strict=True)]
            self._rows.write(pack_rows(settings, self._vocab_size))
            # What is nobody's row takes the likeliest token and counts nothing.
            self._rows.settings[len(rows) :].zero_()
            own = {counted.row for counted in self._counted.values()}
            counts_stay = all(number is None or number in own for number in counts_rows)
        else:
            for arrival in arrivals:
                if arrival in self._counted:
                    self._counted[arrival].num_output += 1
        if counts_stay:
            self._expected = [(arrival, number + 1) for arrival, number in known]

    def land(self, rows: Sequence[SampleRow]) -> "Landing":
        """Start to bring back what the step that was just put on the stream chooses; does not wait."""
        landing = self._landings[self._next]
        self._next = (self._next + 1) % len(self._landings)
        landing.receive(self._words, [row.params.logprobs for row in rows])
        return landing

    def _settings(self, row: SampleRow, counts_row: int | None) -> RowSettings:
        params = row.params
        return RowSettings(
            seed=params.seed,
            counter=row.num_output,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            edits=params.logit_bias,
            # Some models name an end token that they cannot produce.
            banned=[token for token in params.stop_token_ids if 0 <= token < self._vocab_size],
            min_tokens=params.min_tokens,
            counts_row=counts_row,
            logprobs=params.logprobs,
        )

    def _forget(self, arrivals: Sequence[int]) -> None:
        for gone in [each for each in self._counted if each not in arrivals]:
            del self._counted[gone]

    def _count(self, rows: Sequence[SampleRow], arrivals: Sequence[int]) -> list[int | None]:
        """The row of counts of each row that has penalties, filled with what was said before it."""
        numbers: list[int | None] = [None] * len(rows)
        penalised = [place for place, row in enumerate(rows) if _is_penalised(row)]
        firsts = {place for place in penalised if place == 0 or arrivals[place - 1] != arrivals[place]}
        for place in firsts:
            numbers[place] = self._count_own(rows[place], arrivals[place])
        free = iter(set(range(self._num_rows)) - {counted.row for counted in self._counted.values()})
        for place in penalised:
            if place not in firsts:
                numbers[place] = number = next(free)
                self._fill(number, rows[place])
        return numbers

    def _count_own(self, row: SampleRow, arrival: int) -> int:
        """The sequence's row of counts, filled where the card does not have it: there it goes on by itself."""
        counted = self._counted.get(arrival)
        if counted is None:
            taken = {each.row for each in self._counted.values()}
            free = next(number for number in range(self._num_rows) if number not in taken)
            counted = self._counted[arrival] = _Counted(free, -1)
        if counted.num_output != row.num_output:
            self._fill(counted.row, row)
        counted.num_output = row.num_output + 1  # the kernel counts what it draws
        return counted.row

    def _fill(self, number: int, row: SampleRow) -> None:
        assert row.num_unknown == 0, "a sequence whose last token nobody has read was in the step before"
        tokens = list(row.tokens)
        fill_counts(self._counts[number], tokens[: row.num_prompt], tokens[row.num_prompt :])


class Landing:
    """Where one step's results come to in main memory."""

    def __init__(self, card: Card, num_words: int, rows: int) -> None:
        self._memory = card.staging(4 * num_words).view(torch.int32)
        self._rows = rows
        self._event: Event = card.event()
        self._logprobs: list[int | None] = []
        self.uses = 0
        """How many steps' results were brought here; only those of the last are."""

    def receive(self, words: Tensor, logprobs: list[int | None]) -> None:
        """Start the copy. `logprobs`: what each row asked for."""
        self._memory.copy_(words, non_blocking=True)
        self._event.record()
        self._logprobs = logprobs
        self.uses += 1

    def result(self, without: Collection[int] = ()) -> list[Sampled]:
        """Wait for the step: what was chosen for each row that is not in `without`.

        Raises NonFiniteLogits naming those of them that have no usable distribution, and what the device says.
        """
        self._event.synchronize()
        count, rows = len(self._logprobs), self._rows
        words = self._memory.numpy()
        faults = tuple(row for row in np.flatnonzero(words[:count]).tolist() if row not in without)
        if faults:
            raise NonFiniteLogits(faults, count)
        top = MOST_LOGPROBS * rows
        tokens = words[2 * rows + 2 * top :][:count].tolist()
        sampled = [Sampled(token) for token in tokens]
        if any(number is not None for number in self._logprobs):
            own = words[rows : 2 * rows].view(np.float32)
            ids = words[2 * rows : 2 * rows + top].reshape(rows, -1)
            values = words[2 * rows + top : 2 * rows + 2 * top].view(np.float32).reshape(rows, -1)
            for row, number in enumerate(self._logprobs):
                if number is not None:
                    pairs = zip(ids[row, :number].tolist(), values[row, :number].tolist(), strict=True)
                    likeliest = tuple((token, value) for token, value in pairs if token >= 0 and value > -math.inf)
                    sampled[row] = Sampled(tokens[row], float(own[row]), likeliest)
        return [each for row, each in enumerate(sampled) if row not in without]


@dataclass(slots=True)
class _Counted:
    row: int
    num_output: int


def _room(buffers: StepBuffers, rows: int, vocab_size: int) -> SampleRoom:
    """What the kernels answer in: faults, log-probabilities, the likeliest and theirs, tokens."""
    words = buffers.results
    top = MOST_LOGPROBS * rows
    chunks = -(-vocab_size // sample.CHUNK)
    return SampleRoom(
        scores=buffers.view("scores", rows, vocab_size, dtype=torch.float32),
        bests=buffers.view("bests", 2, rows, chunks, dtype=torch.int64),
        tokens=words[2 * rows + 2 * top :][:rows],
        faults=words[:rows],
        logprobs=words[rows : 2 * rows].view(torch.float32),
        top_ids=words[2 * rows : 2 * rows + top].view(rows, MOST_LOGPROBS),
        top_logprobs=words[2 * rows + top : 2 * rows + 2 * top].view(torch.float32).view(rows, MOST_LOGPROBS),
    )


def _is_penalised(row: SampleRow) -> bool:
    params = row.params
    return params.repetition_penalty != 1.0 or bool(params.presence_penalty or params.frequency_penalty)
