"""A step plan as the arrays that the model and attention take, checked on the way.

Runs in: engine thread; owns: nothing. Python runs once a chunk, never once a token.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import numpy as np

from edgekv.core.step import Chunk
from edgekv.kernels.attn.ragged import Ints, RaggedBatch


class HasBlocks(Protocol):
    """One segment of a cache."""

    @property
    def num_blocks(self) -> int:
        """How many it has."""


class BlockSpace(Protocol):
    """Which block ids a cache has; both kinds of cache are one."""

    @property
    def segments(self) -> Mapping[int, HasBlocks]:
        """By index; indices may have holes."""

    @property
    def segment_shift(self) -> int:
        """Block id = segment << shift | block of the segment."""

    @property
    def block_size(self) -> int:
        """Tokens in a block."""


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The tokens of all chunks laid end to end."""

    token_ids: Ints  # [tokens]
    positions: Ints  # [tokens]
    sample_rows: Ints  # [chunks that sample]: their last rows, in the order of the chunks
    ragged: RaggedBatch


def build_batch(chunks: tuple[Chunk, ...], cache: BlockSpace, vocab_size: int) -> StepBatch:
    """The batch of at least one chunk.

    Raises ValueError naming the sequence for an empty chunk, a token id outside of the vocabulary, a block table that
    does not cover its chunk, or a block that the pool does not have.
    """
    lengths = _ints(len(chunk.token_ids) for chunk in chunks)
    starts = _ints(chunk.start for chunk in chunks)
    for bad in np.flatnonzero((lengths < 1) | (starts < 0))[:1]:
        raise _fault(chunks[bad], f"a chunk of {lengths[bad]} tokens from position {starts[bad]}")
    token_ids = _ints(chain.from_iterable(chunk.token_ids for chunk in chunks))
    for row in np.flatnonzero((token_ids < 0) | (token_ids >= vocab_size))[:1]:
        bad = int(np.searchsorted(np.cumsum(lengths), row, side="right"))
        raise _fault(chunks[bad], f"token id {token_ids[row]} is outside of the vocabulary of {vocab_size}")
    ragged = RaggedBatch(starts, lengths, *_tables(chunks, -(-(starts + lengths) // cache.block_size), cache))
    sampling = np.array([chunk.samples for chunk in chunks], dtype=bool)
    return StepBatch(
        token_ids=token_ids,
        positions=ragged.positions,
        sample_rows=(np.cumsum(lengths) - 1)[sampling],
        ragged=ragged,
    )


def _tables(chunks: tuple[Chunk, ...], num_blocks: Ints, cache: BlockSpace) -> tuple[Ints, Ints]:
    """The needed part of every block table end to end, and where each begins."""
    for chunk, needed in zip(chunks, num_blocks.tolist(), strict=True):
        if len(chunk.block_table) < needed:
            covered = len(chunk.block_table) * cache.block_size
            raise _fault(chunk, f"its block table covers {covered} tokens, its chunk ends at {chunk.end}")
    tables = (chunk.block_table[:needed] for chunk, needed in zip(chunks, num_blocks.tolist(), strict=True))
    blocks = _ints(chain.from_iterable(tables))
    table_starts = np.concatenate(([0], np.cumsum(num_blocks)))
    sizes = np.zeros(max(cache.segments, default=-1) + 1, dtype=np.int64)
    for index, segment in cache.segments.items():
        sizes[index] = segment.num_blocks
    segments = blocks >> cache.segment_shift
    known = (segments >= 0) & (segments < len(sizes))
    known[known] = (blocks[known] & ((1 << cache.segment_shift) - 1)) < sizes[segments[known]]
    for entry in np.flatnonzero(~known)[:1]:
        bad = int(np.searchsorted(table_starts, entry, side="right")) - 1
        raise _fault(chunks[bad], f"block {blocks[entry]} of its block table is in no segment of the pool")
    return blocks, table_starts


def _fault(chunk: Chunk, what: str) -> ValueError:
    return ValueError(f"sequence {chunk.sequence.id}: {what}")


def _ints(values: Iterable[int]) -> Ints:
    return np.fromiter(values, dtype=np.int64)
