"""A step plan as the arrays that the model and attention take, checked on the way.

Runs in: engine thread; owns: nothing. Python runs once a chunk, never once a token.
"""

from dataclasses import dataclass
from typing import NoReturn, Protocol

import numpy as np

from edgekv.core.step import Chunk
from edgekv.kernels.attn.ragged import Ints, RaggedBatch


class BlockSpace(Protocol):
    """Which block ids there are; the pool is one."""

    @property
    def segment_sizes(self) -> Ints:
        """Blocks of every segment by its index, 0 where there is none."""

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
    sample_rows: Ints  # [rows sampled]: the last rows of chunks that sample, in the order of the chunks
    ragged: RaggedBatch


def build_batch(chunks: tuple[Chunk, ...], pool: BlockSpace, vocab_size: int) -> StepBatch:
    """The batch of at least one chunk.

    Raises ValueError naming the sequence for an empty chunk, more sampled rows than tokens, a token id outside of the
    vocabulary, a block table that does not cover its chunk, or a block that the pool does not have.
    """
    # Lists, of which numpy makes arrays at the end: after a step that has read all weights nothing of Python or numpy
    # is in the caches, and what counts is the number of different things that are called.
    starts, lengths, token_ids, blocks, table_starts, sample_rows = [], [], list[int](), list[int](), [0], list[int]()
    for chunk in chunks:
        start, length, table = chunk.start, len(chunk.token_ids), chunk.block_table
        if length < 1 or start < 0:
            raise _fault(chunk, f"a chunk of {length} tokens from position {start}")
        needed = -(-(start + length) // pool.block_size)
        if len(table) < needed:
            covered = len(table) * pool.block_size
            raise _fault(chunk, f"its block table covers {covered} tokens, its chunk ends at {chunk.end}")
        starts.append(start)
        lengths.append(length)
        token_ids += chunk.token_ids
        blocks += table[:needed]
        table_starts.append(len(blocks))
        if chunk.sampled > length:
            raise _fault(chunk, f"{chunk.sampled} rows of its {length} tokens are to be sampled")
        sample_rows += range(len(token_ids) - chunk.sampled, len(token_ids))
    if min(token_ids) < 0 or max(token_ids) >= vocab_size:
        _refuse_token(chunks, vocab_size)
    ragged = RaggedBatch(_ints(starts), _ints(lengths), _ints(blocks), _ints(table_starts))
    _check_blocks(chunks, ragged, pool)
    return StepBatch(
        token_ids=_ints(token_ids),
        positions=ragged.starts if len(token_ids) == len(chunks) else ragged.positions,
        sample_rows=_ints(sample_rows),
        ragged=ragged,
    )


def _refuse_token(chunks: tuple[Chunk, ...], vocab_size: int) -> NoReturn:
    for chunk in chunks:
        for token in chunk.token_ids:
            if not 0 <= token < vocab_size:
                raise _fault(chunk, f"token id {token} is outside of the vocabulary of {vocab_size}")
    raise AssertionError("every token is in the vocabulary")


def _check_blocks(chunks: tuple[Chunk, ...], ragged: RaggedBatch, pool: BlockSpace) -> None:
    blocks, sizes = ragged.blocks, pool.segment_sizes
    segments = blocks >> pool.segment_shift
    # Of a segment that there is not, take's answer is some other's; the first condition has seen to that.
    known = (segments >= 0) & (segments < len(sizes))
    if len(sizes):
        known &= (blocks & ((1 << pool.segment_shift) - 1)) < sizes.take(segments, mode="clip")
    if known.all():
        return
    entry = int(np.flatnonzero(~known)[0])
    bad = int(np.searchsorted(ragged.table_starts, entry, side="right")) - 1
    raise _fault(chunks[bad], f"block {blocks[entry]} of its block table is in no segment of the pool")


def _fault(chunk: Chunk, what: str) -> ValueError:
    return ValueError(f"sequence {chunk.sequence.id}: {what}")


def _ints(values: list[int]) -> Ints:
    return np.array(values, dtype=np.int64)
