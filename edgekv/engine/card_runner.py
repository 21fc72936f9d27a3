"""Runs planned steps on a card: writes what a step is told, puts it on the stream, and lets the tokens come back.

Runs in: engine thread; owns: the step's buffers, the programs and their graphs.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from edgekv.core.step import UNKNOWN, Chunk, Sampled, StepPlan
from edgekv.engine.batch import StepBatch, build_batch
from edgekv.engine.card_attention import is_wide
from edgekv.engine.card_buffers import StepBuffers
from edgekv.engine.card_cuts import StepCuts
from edgekv.engine.card_device import Card
from edgekv.engine.card_graphs import Graphs
from edgekv.engine.card_inputs import BlockTables, Staging, StagingRing, lay_out
from edgekv.engine.card_model import CardModel
from edgekv.engine.card_pool import CardKVPool
from edgekv.engine.card_program import Program
from edgekv.engine.card_sampling import CardSampler, Landing
from edgekv.engine.device_faults import told_as_torch
from edgekv.engine.protocols import Pending
from edgekv.engine.sample_row import SampleRow
from edgekv.kernels.rt.registry import KernelSpec
from edgekv.model.card_memory import CardLimits

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class CardStep:
    """A step that was put on the stream; `rows`: where among the chosen tokens each sequence's last is, by arrival."""

    landing: Landing
    use: int
    rows: dict[int, int]

    def result(self, without: Collection[int] = ()) -> list[Sampled]:
        """See `engine.protocols.Pending`."""
        assert self.use == self.landing.uses, "more steps were begun behind it than may be in flight"
        return told_as_torch(lambda: self.landing.result(without))


class CardRunner:
    """One model over one pool on one card; up to `in_flight` of its steps may be begun and not read."""

    def __init__(
        self, card: Card, model: CardModel, pool: CardKVPool, buffers: StepBuffers, *, in_flight: int = 2
    ) -> None:
        """Raises ValueError if the pool was made for another shape of model, or for shapes without kernels."""
        spec = model.spec
        wanted = (spec.num_layers, spec.num_kv_heads, spec.head_dim)
        given = (pool.num_layers, pool.num_kv_heads, pool.head_dim)
        if wanted != given:
            raise ValueError(f"the model's (layers, kv heads, head dim) are {wanted}, the pool's {given}")
        self._card, self._model, self._pool, self._buffers = card, model, pool, buffers
        self._limits: CardLimits = buffers.limits
        self._inputs = lay_out(buffers.inputs, self._limits)
        self._ring = StagingRing(card, self._limits, in_flight)
        self._tables = BlockTables(buffers)
        self._cuts = StepCuts(card, spec, pool.cache)
        self._sampler = CardSampler(card, buffers, spec.vocab_size, in_flight)
        self._programs: dict[tuple[int, int, bool], Program] = {}
        self.graphs = Graphs(card)

    @property
    def model(self) -> CardModel:
        """What it runs."""
        return self._model

    @property
    def workspace_bytes(self) -> int:
        """All that steps work in; it does not grow."""
        return self._buffers.num_bytes

    def load_kernels(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Make every program, and compile and load its kernels, so that no request waits for a compiler.

        `progress` hears of (kernels done, kernels in all), and may raise to stop it. Raises KernelUnavailable,
        CompileFailed, DriverError.
        """
        self._card.compile(self.kernels(), progress)
        for program in self._programs.values():
            program.actions.load()

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run every program once, for nobody: no request is to wait for what libraries load and allocate at first use.

        Raises DeviceLost, or MemoryError and torch's like.
        """
        self._sampler.tell((), ())
        self._ring.take().send(self._buffers.inputs)
        for program in self._programs.values():
            told_as_torch(program.actions.run)

    def kernels(self) -> tuple[KernelSpec, ...]:
        """All that any step needs, each once."""
        limits = self._limits
        programs = [self._program(size, size, is_decode=True) for size in limits.decode_sizes]
        programs += [
            self._program(size, sampled, is_decode=False)
            for size in limits.ragged_sizes
            for sampled in limits.sampled_sizes
        ]
        return tuple(dict.fromkeys(prepared.spec for program in programs for prepared in program.actions.prepared))

    @torch.inference_mode()
    def capture(self, room_bytes: int, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Capture decode programs in graphs, the largest first, as long as those take no more than `room_bytes`."""
        self._ring.take().send(self._buffers.inputs)  # rows that are nobody's, which write nothing to the cache
        sizes = self._limits.decode_sizes[::-1]
        for done, rows in enumerate(sizes):
            progress(done, len(sizes))
            program = self._program(rows, rows, is_decode=True)
            told_as_torch(program.actions.run)  # what is loaded at first use must not come within a capture
            if not self.graphs.capture(rows, program.actions.run, room_bytes):
                return

    def forward(self, plan: StepPlan) -> Tensor:
        """Apply the plan's copies, then run its chunks; logits [rows sampled, vocab_size] float32, in order.

        Valid until the next step. Raises ValueError naming the sequence, before anything is copied or computed, if a
        chunk's tokens or blocks are not of this model and pool.
        """
        self._sampler.tell((), ())
        return told_as_torch(lambda: self._forward(plan, None))

    def begin(self, plan: StepPlan, rows: Sequence[SampleRow], after: Pending | None) -> CardStep:
        """Put a step on the stream and return at once; see `engine.protocols.Pipeline`."""
        assert after is None or isinstance(after, CardStep)
        return told_as_torch(lambda: self._begin(plan, rows, after))

    @torch.inference_mode()
    def _begin(self, plan: StepPlan, rows: Sequence[SampleRow], after: CardStep | None) -> CardStep:
        arrivals = [chunk.sequence.arrival for chunk in plan.sampling for _ in range(chunk.sampled)]
        self._sampler.tell(rows, arrivals)
        self._forward(plan, after)
        landing = self._sampler.land(rows)
        return CardStep(landing, landing.uses, {arrival: row for row, arrival in enumerate(arrivals)})

    @torch.inference_mode()
    def _forward(self, plan: StepPlan, after: CardStep | None) -> Tensor:
        vocab_size = self._model.spec.vocab_size
        if not plan.chunks:
            self._pool.copy(plan.copies)
            return torch.empty(0, vocab_size, device=self._card.device)
        batch = build_batch(_known(plan.chunks), self._pool, vocab_size)
        tokens, sampled, alone = len(batch.token_ids), len(batch.sample_rows), _rows_alone(plan.chunks)
        is_decode, limits = sampled == tokens, self._limits
        size = _least(limits.decode_sizes if is_decode else limits.ragged_sizes, tokens)
        most = size if is_decode else _least(limits.sampled_sizes, max(sampled, alone))
        if size is None or most is None or len(plan.chunks) > limits.sequences:
            what = f"{tokens} tokens of {len(plan.chunks)} sequences, {sampled} of them sampled,"
            raise ValueError(f"a step of {what} is larger than any planned")
        self._pool.copy(plan.copies)
        program = self._program(size, most, is_decode=is_decode)
        place = self._ring.take()
        try:
            self._write(place, plan.chunks, batch, after, alone=alone)
            place.send(self._buffers.inputs)
            self._tables.write()
        except BaseException:
            self._tables.forget()  # what the card has of them is not known
            raise
        if not (is_decode and self.graphs.replay(size)):
            program.actions.run()
        return program.logits[: len(batch.sample_rows)]

    def _write(
        self, place: Staging, chunks: Sequence[Chunk], batch: StepBatch, after: CardStep | None, *, alone: int
    ) -> None:
        tokens, ragged = len(batch.token_ids), batch.ragged
        numbers = self._tables.assign([(chunk.sequence.arrival, chunk.block_table) for chunk in chunks], place)
        place.ids[:tokens] = batch.token_ids
        place.sources[:] = self._buffers.inputs_at
        place.sources[:tokens] += np.arange(tokens, dtype=np.int32)
        place.positions[:tokens] = batch.positions
        place.rows[:tokens] = np.repeat(np.array(numbers, np.int32), ragged.lengths)
        first_rows = ragged.first_rows
        for index, chunk in enumerate(chunks):
            if chunk.token_ids[0] == UNKNOWN:
                assert after is not None, "a token is not known, and no step before it is to choose it"
                place.sources[first_rows[index]] = self._sampler.tokens_at + after.rows[chunk.sequence.arrival]
        if is_wide(self._buffers.dtype, self._pool.cache):
            place.contexts[:tokens] = batch.positions + 1
        else:
            place.contexts[:alone] = batch.positions[:alone] + 1
            for index in np.flatnonzero(first_rows >= alone).tolist():
                row = numbers[index]
                place.begins[row], place.lengths[row] = first_rows[index], ragged.lengths[index]
                place.totals[row] = ragged.ends[index]
        self._cuts.write(place)
        place.samples[: len(batch.sample_rows)] = batch.sample_rows

    def _program(self, rows: int, sampled: int, *, is_decode: bool) -> Program:
        key = rows, sampled, is_decode
        if key not in self._programs:
            program = self._programs[key] = Program(
                self._card, self._model, self._pool.cache, self._buffers, self._inputs, self._tables.table,
                rows=rows, sampled=sampled, is_decode=is_decode,
            )  # fmt: skip
            for prepared in self._sampler.prepare(program.logits):
                program.actions.launch(prepared)
        return self._programs[key]


def _rows_alone(chunks: Sequence[Chunk]) -> int:
    """Rows of the first chunks which are attended to as decodes: of those that are sampled, and of single tokens."""
    first = takewhile(lambda chunk: len(chunk.token_ids) <= max(1, chunk.sampled), chunks)
    return sum(len(chunk.token_ids) for chunk in first)


def _least(sizes: tuple[int, ...], wanted: int) -> int | None:
    return next((size for size in sizes if size >= wanted), None)


def _known(chunks: tuple[Chunk, ...]) -> tuple[Chunk, ...]:
    """With 0 for tokens that the card takes from the step before."""
    if all(chunk.token_ids[0] != UNKNOWN for chunk in chunks):
        return chunks
    return tuple(
        replace(chunk, token_ids=(0, *chunk.token_ids[1:])) if chunk.token_ids[0] == UNKNOWN else chunk
        for chunk in chunks
    )
