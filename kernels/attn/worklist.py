"""What the torch attention must do in one step, as index tensors: built once a step and used by every layer.

An append list says which slots the step's tokens go to. A work list (one for each window that layers ask for) says
which blocks to gather for which query rows, cut into items whose gathered keys and values fit the processor's cache.

Runs in: engine thread; owns: nothing (frozen data).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edgekv.kernels.attn.cache import PagedCache
from edgekv.kernels.attn.ragged import Ints, RaggedBatch

# Keys and values that one batched decode item gathers at most (a longer sequence is an item of its own). Measured on
# 8 x 2048 tokens, 8 kv heads x 128, bf16: 6.0 ms with 8 MiB, 6.8 with 16, 8.7 with 32, 9.3 with 64.
GATHER_BYTES = 8 << 20
# Contexts up to this many blocks share an item however different they are: the call costs more than the padding.
SHORT_BLOCKS = 8
# A windowed prefill is cut into tiles of at least this many queries, each gathering its own window only.
MIN_TILE_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Append:
    """The part of a step's tokens that goes to one segment. `rows` None means all rows of the step, in order.

    `cleared` are the slots behind the last token of blocks begun in this step.
    """

    segment: int
    rows: Tensor | None
    slots: Tensor
    cleared: Tensor | None


@dataclass(frozen=True, slots=True)
class Piece:
    """Blocks of one segment to gather: row r = kv * kv_heads + head of the layer's [2 * kv_heads * blocks, ...]."""

    segment: int
    rows: Tensor  # [kv_heads, 2, sequences * blocks]
    num_blocks: int  # of each sequence


@dataclass(frozen=True, slots=True)
class Decode:
    """One query each of several sequences (of one if there are several pieces), over padded contexts.

    Of the gathered slots only `first .. stop` are attended; `mask` [sequences, 1, 1, stop - first] is added to the
    scores, and is None where every sequence sees all of them.
    """

    queries: slice | Tensor
    num_sequences: int
    pieces: tuple[Piece, ...]
    first: int
    stop: int
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class Prefill:
    """Consecutive queries of one sequence. `mask` [queries, stop - first] is for the queries **in reverse order**.

    What query i sees of key j depends on j - i only; with the queries reversed the mask is a view with strides (1, 1)
    of one short vector, so a long context needs no large mask. `is_whole`: the queries are all of the context and no
    window hides any of it, so that plain causal attention will do.
    """

    queries: slice
    pieces: tuple[Piece, ...]
    first: int
    stop: int
    mask: Tensor
    is_whole: bool


Item = Decode | Prefill


def append_list(batch: RaggedBatch, cache: PagedCache) -> tuple[Append, ...]:
    """Where each token of the step goes, by segment."""
    size = cache.block_size
    positions, ends = batch.positions, batch.ends
    blocks = batch.blocks[np.repeat(batch.table_starts[:-1], batch.lengths) + positions // size]
    slots = _in_segment(blocks, cache) * size + positions % size
    last = batch.blocks[batch.table_starts[1:] - 1]
    # A block's first slot is written in this step, its last is not: what an earlier owner left there must go.
    begun = (ends % size != 0) & (ends - ends % size >= batch.starts)
    behind = np.arange(size) >= (ends[begun] % size)[:, None]  # [spans that begin a block, block_size]
    cleared_blocks = np.repeat(last[begun], size)[behind.ravel()]
    cleared = _in_segment(cleared_blocks, cache) * size + np.tile(np.arange(size), int(begun.sum()))[behind.ravel()]
    segments = blocks >> cache.segment_shift
    present = np.unique(segments)
    lists: list[Append] = []
    for segment in present.tolist():
        own = cleared[cleared_blocks >> cache.segment_shift == segment]
        rows = np.flatnonzero(segments == segment)
        lists.append(
            Append(
                segment=segment,
                rows=_tensor(rows, cache) if len(present) > 1 else None,
                slots=_tensor(slots[rows], cache),
                cleared=_tensor(own, cache) if len(own) else None,
            )
        )
    return tuple(lists)


def work_list(batch: RaggedBatch, cache: PagedCache, window: int | None) -> tuple[Item, ...]:
    """The items of one step for layers with this window: decodes in buckets first, then each prefill."""
    contexts: dict[int, list[_Context]] = {}
    items: list[Item] = []
    prefills: list[Item] = []
    segments = _segments_of_spans(batch, cache)
    spans = zip(batch.first_rows.tolist(), batch.starts.tolist(), batch.lengths.tolist(), strict=True)
    for span, (row, start, length) in enumerate(spans):
        if length > 1:
            prefills += _prefill(batch.table(span), row, start, start + length, cache, window)
            continue
        context = _context(batch.table(span), row, start, cache, window)
        segment = segments[span]
        if segment is None:
            items.append(_bucket([context], cache))
        else:
            contexts.setdefault(segment, []).append(context)
    for own in contexts.values():
        items += [_bucket(bucket, cache) for bucket in _buckets(own, cache)]
    return (*items, *prefills)


@dataclass(frozen=True, slots=True)
class _Context:
    """What one decoding token attends to; slots count from the first block's first."""

    row: int
    blocks: Ints
    first: int
    stop: int


def _segments_of_spans(batch: RaggedBatch, cache: PagedCache) -> list[int | None]:
    """The segment of all blocks of each span; None if they are in several, [spans]."""
    segments = batch.blocks >> cache.segment_shift
    lowest = np.minimum.reduceat(segments, batch.table_starts[:-1])
    highest = np.maximum.reduceat(segments, batch.table_starts[:-1])
    return [low if low == high else None for low, high in zip(lowest.tolist(), highest.tolist(), strict=True)]


def _context(table: Ints, row: int, position: int, cache: PagedCache, window: int | None) -> _Context:
    first = 0 if window is None else max(0, position + 1 - window)
    skipped = first // cache.block_size
    blocks = table[skipped : position // cache.block_size + 1]
    offset = skipped * cache.block_size
    return _Context(row, blocks, first - offset, position + 1 - offset)


def _buckets(contexts: list[_Context], cache: PagedCache) -> Iterator[list[_Context]]:
    """Contexts of one segment, grouped so that a group's padding is at most its content and it fits GATHER_BYTES."""
    block_bytes = 2 * cache.num_kv_heads * cache.block_size * cache.head_dim * cache.dtype.itemsize
    bucket: list[_Context] = []
    for context in sorted(contexts, key=lambda context: -len(context.blocks)):
        longest = len(bucket[0].blocks) if bucket else 0
        similar = len(context.blocks) * 2 >= longest or longest <= SHORT_BLOCKS
        if bucket and not (similar and (len(bucket) + 1) * longest * block_bytes <= GATHER_BYTES):
            yield bucket
            bucket = []
        bucket.append(context)
    yield bucket


def _bucket(bucket: list[_Context], cache: PagedCache) -> Decode:
    if len(bucket) == 1:
        (context,) = bucket
        row = slice(context.row, context.row + 1)
        return Decode(row, 1, _pieces(context.blocks, cache), context.first, context.stop, None)
    bucket = sorted(bucket, key=lambda context: context.row)
    blocks = np.empty((len(bucket), max(len(context.blocks) for context in bucket)), dtype=np.int64)
    for padded, context in zip(blocks, bucket, strict=True):
        padded[: len(context.blocks)] = context.blocks
        # A block of the sequence itself: what is masked is never another's, which might not be finite.
        padded[len(context.blocks) :] = context.blocks[-1]
    rows, firsts, stops = np.array([(context.row, context.first, context.stop) for context in bucket]).T
    first, stop = int(firsts.min()), int(stops.max())
    slots = np.arange(first, stop)
    hidden = (slots < firsts[:, None]) | (slots >= stops[:, None])  # [sequences, slots]
    mask = None
    if hidden.any():
        mask = torch.zeros(len(bucket), 1, 1, stop - first, dtype=cache.compute_dtype, device=cache.device)
        mask.masked_fill_(_tensor(hidden, cache)[:, None, None], -torch.inf)
    together = rows[-1] - rows[0] + 1 == len(rows)
    queries = slice(int(rows[0]), int(rows[-1]) + 1) if together else _tensor(rows, cache)
    return Decode(queries, len(bucket), (_piece(blocks, cache),), first, stop, mask)


def _prefill(table: Ints, row: int, start: int, end: int, cache: PagedCache, window: int | None) -> Iterator[Prefill]:
    """Queries at positions start .. end - 1, tiled if a window makes a tile's context shorter than the whole."""
    tile = end - start if window is None else max(window, MIN_TILE_TOKENS)
    for tile_start in range(start, end, tile):
        tile_end = min(end, tile_start + tile)
        first = 0 if window is None else max(0, tile_start + 1 - window)
        skipped = first // cache.block_size
        blocks = table[skipped : (tile_end - 1) // cache.block_size + 1]
        offset = skipped * cache.block_size
        yield Prefill(
            queries=slice(row + tile_start - start, row + tile_end - start),
            pieces=_pieces(blocks, cache),
            first=first - offset,
            stop=tile_end - offset,
            mask=_reversed_mask(tile_end - tile_start, tile_end - first, window, cache),
            is_whole=tile_start == 0 and (window is None or window >= tile_end),
        )


def _reversed_mask(num_queries: int, num_keys: int, window: int | None, cache: PagedCache) -> Tensor:
    """The causal mask of the last `num_queries` of `num_keys` positions, queries in reverse order.

    Reversed query i is at key position num_keys - 1 - i, so it sees key j where i + j < num_keys, and with a window W
    where also i + j >= num_keys - W.
    """
    diagonal = torch.zeros(num_queries + num_keys - 1, dtype=cache.compute_dtype, device=cache.device)
    diagonal[num_keys:] = -torch.inf
    if window is not None:
        diagonal[: max(0, num_keys - window)] = -torch.inf
    mask = diagonal.as_strided((num_queries, num_keys), (1, 1))
    # GPU kernels want aligned rows.
    return mask if cache.device.type == "cpu" else mask.contiguous()


def _pieces(blocks: Ints, cache: PagedCache) -> tuple[Piece, ...]:
    """One sequence's blocks, cut where the segment changes."""
    cuts = np.flatnonzero(np.diff(blocks >> cache.segment_shift)) + 1
    return tuple(_piece(run[None], cache) for run in np.split(blocks, cuts))


def _piece(blocks: Ints, cache: PagedCache) -> Piece:
    """Blocks of one segment, [sequences, blocks of each]."""
    segment = int(blocks[0, 0]) >> cache.segment_shift
    heads = np.arange(2 * cache.num_kv_heads).reshape(2, -1).T * cache.segments[segment].num_blocks  # [kv_heads, 2]
    rows = heads[:, :, None] + _in_segment(blocks, cache).ravel()
    return Piece(segment, _tensor(rows, cache), blocks.shape[1])


def _in_segment(blocks: Ints, cache: PagedCache) -> Ints:
    return blocks & ((1 << cache.segment_shift) - 1)


def _tensor(array: np.ndarray, cache: PagedCache) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(cache.device)
