"""What a step is told: numbers of all its rows, packed in main memory and copied to the card at once.

    ids src positions rows contexts         of each token of the batch
    begins lengths totals                   of each row of the block tables
    samples                                 of each sampled row
    cuts tiles                              how attention is shared out among thread blocks: see `card_cuts`
    spans                                   new entries of block tables, copied on to where they belong

Runs in: engine thread; owns: the staging memory, a ring that copies under way are never overwritten in.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgekv.engine.card_buffers import StepBuffers
from edgekv.engine.card_device import Card, Event
from edgekv.model.card_memory import CUTS, CardLimits, input_words

_TOKENS = ("ids", "sources", "positions", "rows", "contexts")
_SEQUENCES = ("begins", "lengths", "totals")

Words = NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class StepInputs:
    """The numbers on the card, int32; padding rows of a batch have position -1 and context 0.

    `sources`: where in `StepBuffers.told` the token id of each row is: among `ids`, or among the tokens that the step
    before has chosen. `rows`: of each token in the block tables. `contexts`: tokens that a row sees with itself.
    `begins`, `lengths`, `totals` [rows of the block tables]: a prompt's chunk in the batch, and its context with it;
    length 0 where there is none. `samples` [sampled rows]: which rows of the batch those are. `cuts` [CUTS, sampled
    rows + 2]: see kernels/attn/splits.py; `tiles` [sequences + 1]: see kernels/attn/prefill_paged.py.
    """

    ids: Tensor
    sources: Tensor
    positions: Tensor
    rows: Tensor
    contexts: Tensor
    begins: Tensor
    lengths: Tensor
    totals: Tensor
    samples: Tensor
    cuts: Tensor
    tiles: Tensor


def lay_out(words: Tensor, limits: CardLimits) -> StepInputs:
    """Views of the inputs' memory."""
    pieces, first = {}, 0
    sizes = ((_TOKENS, limits.step_tokens), (_SEQUENCES, limits.sequences), (("samples",), limits.sampled))
    for names, size in sizes:
        for name in names:
            pieces[name] = words[first : first + size]
            first += size
    pieces["cuts"] = words[first : (first := first + CUTS * (limits.sampled + 2))].view(CUTS, -1)
    pieces["tiles"] = words[first : first + limits.sequences + 1]
    return StepInputs(**pieces)


class Staging:
    """One place of the ring: the same numbers as `StepInputs` in main memory, to be written by numpy."""

    def __init__(self, card: Card, limits: CardLimits) -> None:
        self._memory = card.staging(4 * input_words(limits)).view(torch.int32)
        self.words: Words = self._memory.numpy()
        views = lay_out(self._memory, limits)
        self.ids: Words = views.ids.numpy()
        self.sources: Words = views.sources.numpy()
        self.positions: Words = views.positions.numpy()
        self.rows: Words = views.rows.numpy()
        self.contexts: Words = views.contexts.numpy()
        self.begins: Words = views.begins.numpy()
        self.lengths: Words = views.lengths.numpy()
        self.totals: Words = views.totals.numpy()
        self.samples: Words = views.samples.numpy()
        self.cuts: Words = views.cuts.numpy()
        self.tiles: Words = views.tiles.numpy()
        self._fixed = input_words(limits) - limits.sequences * limits.context_blocks
        self._used = self._fixed
        self._event: Event = card.event()
        self._is_under_way = False

    def begin(self) -> None:
        """Wait until the copy from here is made, and forget everything."""
        if self._is_under_way:
            self._event.synchronize()
        self._is_under_way = False
        self._used = self._fixed
        self.words[: self._fixed] = 0
        self.positions[:] = -1

    def add_span(self, entries: tuple[int, ...]) -> int:
        """Some entries of a block table; where they will be among the inputs."""
        first = self._used
        self._used += len(entries)
        self.words[first : self._used] = entries
        return first

    def send(self, inputs: Tensor) -> None:
        """Copy to the card what was written; does not wait."""
        inputs[: self._used].copy_(self._memory[: self._used], non_blocking=True)
        self._event.record()
        self._is_under_way = True


class StagingRing:
    """Places to write the next step's inputs in: of the `in_flight` steps that may be under way, and one to write."""

    def __init__(self, card: Card, limits: CardLimits, in_flight: int) -> None:
        self._places = [Staging(card, limits) for _ in range(in_flight + 1)]
        self._next = 0

    def take(self) -> Staging:
        """An empty one; waits where more steps are under way than there are to be."""
        place = self._places[self._next]
        self._next = (self._next + 1) % len(self._places)
        place.begin()
        return place


class BlockTables:
    """Block tables of the sequences that run, each in a row of its own on the card, kept from step to step.

    Mostly a table has only grown, and what is new is written behind the old. It has other blocks where its sequence was
    preempted or moved with a segment, or where blocks that only held proposals were taken back and came from elsewhere
    the next time.
    """

    def __init__(self, buffers: StepBuffers) -> None:
        limits = buffers.limits
        self.table = buffers.view("block_table", limits.sequences, limits.context_blocks, dtype=torch.int32)
        self._inputs = buffers.inputs
        self._free = list(range(limits.sequences))
        self._rows: dict[int, _Row] = {}
        self._spans: list[tuple[int, int, int, int]] = []

    def assign(self, sequences: list[tuple[int, tuple[int, ...]]], staging: Staging) -> list[int]:
        """The row of each sequence of a step, (arrival, block table) each.

        The arrival tells sequences apart for as long as there is a scheduler; ids come again. Entries that the card
        does not have yet go to `staging`, and to their rows by `write`. Raises ValueError for a table that is longer
        than a row.
        """
        self._spans.clear()
        wanted = {arrival for arrival, _ in sequences}
        for gone in [each for each in self._rows if each not in wanted]:
            self._free.append(self._rows.pop(gone).number)
        numbers = []
        for arrival, table in sequences:
            row = self._rows.get(arrival)
            if row is None:
                row = self._rows[arrival] = _Row(self._free.pop())
            if len(table) > self.table.shape[1]:
                raise ValueError(f"a block table of {len(table)} entries is longer than a row of {self.table.shape[1]}")
            known = _num_alike(row.entries, table)
            if len(table) > known:
                first = staging.add_span(table[known:])
                self._spans.append((row.number, known, len(table), first))
            row.entries = table
            numbers.append(row.number)
        return numbers

    def forget(self) -> None:
        """Write every row anew from the next step on."""
        for row in self._rows.values():
            row.entries = ()

    def write(self) -> None:
        """Put what was sent into the rows, on the stream."""
        for row, begin, end, first in self._spans:
            self.table[row, begin:end].copy_(self._inputs[first : first + end - begin], non_blocking=True)


@dataclass(slots=True)
class _Row:
    number: int
    entries: tuple[int, ...] = ()  # that the card has


def _num_alike(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """How many entries they begin with alike."""
    if other[: len(one)] == one:
        return len(one)
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (mine, its) in pairs if mine != its), min(len(one), len(other)))
