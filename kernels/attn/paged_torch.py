"""Paged attention in torch alone: gather the blocks of a few sequences, then one attention call for all of them.

It runs wherever torch does and is the reference for the kernels that replace it. Query heads of one kv head are viewed
as [kv_heads, group]; `enable_gqa` of torch's own attention is 8 to 13 times slower.

Runs in: engine thread; owns: one step's work lists.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekv.kernels.attn.cache import PagedCache
from edgekv.kernels.attn.ragged import RaggedBatch
from edgekv.kernels.attn.worklist import GATHER_BYTES, Append, Decode, Item, Piece, Prefill, append_list, work_list
from edgekv.kernels.attn.workspace import Workspace

# Scores that the soft-capped path, which writes them out, holds at a time (16 MiB in float32).
CAPPED_SCORES = 4 << 20


class PagedAttention:
    """Implements `Attention` for one step over a paged cache.

    The block ids of `batch` must be blocks of `cache`, and two spans must not append to the same block. Results of
    one sequence do not depend on the others beyond float rounding.
    """

    def __init__(self, cache: PagedCache, batch: RaggedBatch, workspace: Workspace) -> None:
        self._cache = cache
        self._batch = batch
        self._workspace = workspace
        self._longest = int(batch.ends.max(initial=0))
        self._appends: tuple[Append, ...] = append_list(batch, cache)
        self._items: dict[int | None, tuple[Item, ...]] = {}

    def __call__(
        self,
        layer: int,
        q: Tensor,  # [tokens, heads, head_dim]
        k: Tensor,  # [tokens, kv_heads, head_dim]
        v: Tensor,  # [tokens, kv_heads, head_dim]
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:  # [tokens, heads, head_dim]
        """Append `k` and `v` to `layer`, then attend; see `Attention`."""
        if window is not None and window >= self._longest:
            window = None
        items = self._items.get(window)
        if items is None:
            items = self._items[window] = work_list(self._batch, self._cache, window)
        self._append(layer, k, v)
        tokens, heads, head_dim = q.shape
        kv_heads = self._cache.num_kv_heads
        queries = q.to(self._cache.compute_dtype).view(tokens, kv_heads, heads // kv_heads, head_dim)
        out = torch.empty_like(queries)  # [tokens, kv_heads, group, head_dim]
        for item in items:
            num_heads = self._heads_per_call(item)
            for head in range(0, kv_heads, num_heads):
                part = slice(head, min(kv_heads, head + num_heads))
                keys, values = self._gather(layer, item, part)
                if isinstance(item, Decode):
                    _decode(item, queries[:, part], keys, values, out[:, part], scale, softcap)
                else:
                    _prefill(item, queries[:, part], keys, values, out[:, part], scale, softcap)
        return out.view(tokens, heads, head_dim).to(q.dtype)

    def _append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write the step's keys and values to their slots."""
        fresh = torch.stack((k.transpose(0, 1), v.transpose(0, 1))).to(self._cache.dtype)
        fresh = fresh.view(-1, *fresh.shape[2:])  # [2 * kv_heads, tokens, head_dim]
        for append in self._appends:
            slots = self._cache.segments[append.segment].slots[layer]
            slots.index_copy_(1, append.slots, fresh if append.rows is None else fresh.index_select(1, append.rows))
            if append.cleared is not None:
                slots.index_fill_(1, append.cleared, 0)

    def _heads_per_call(self, item: Item) -> int:
        """Kv heads to gather at a time: GATHER_BYTES of them, but enough to give every thread one."""
        kv_heads = self._cache.num_kv_heads
        row_bytes = self._cache.block_size * self._cache.head_dim * self._cache.dtype.itemsize
        head_bytes = sum(piece.rows[0].numel() for piece in item.pieces) * row_bytes
        fitting = max(GATHER_BYTES // head_bytes, min(kv_heads, torch.get_num_threads()))
        calls = -(-kv_heads // fitting)
        return -(-kv_heads // calls)

    def _gather(self, layer: int, item: Item, heads: slice) -> tuple[Tensor, Tensor]:
        """Keys and values of an item, [heads, sequences, slots, head_dim] each, in the compute type."""
        cache = self._cache
        num_heads = heads.stop - heads.start
        row = cache.block_size * cache.head_dim
        total = sum(piece.rows[0].numel() for piece in item.pieces) * num_heads
        flat = self._workspace.take("gather", total * row, cache.dtype).view(total, row)
        if len(item.pieces) == 1:
            self._gather_rows(layer, item.pieces[0], heads, flat)
        else:
            whole, done = flat.view(num_heads, 2, -1, row), 0
            for piece in item.pieces:
                # Through a second buffer, because only whole rows of a contiguous result are gathered fast.
                part = self._workspace.take("piece", num_heads * 2 * piece.num_blocks * row, cache.dtype).view(-1, row)
                self._gather_rows(layer, piece, heads, part)
                whole[:, :, done : done + piece.num_blocks].copy_(part.view(num_heads, 2, piece.num_blocks, row))
                done += piece.num_blocks
        if cache.compute_dtype != cache.dtype:
            flat = self._workspace.take("compute", total * row, cache.compute_dtype).view(total, row).copy_(flat)
        sequences = item.num_sequences if isinstance(item, Decode) else 1
        context = flat.view(num_heads, 2, sequences, -1, cache.head_dim)[:, :, :, item.first : item.stop]
        return context[:, 0], context[:, 1]

    def _gather_rows(self, layer: int, piece: Piece, heads: slice, out: Tensor) -> None:
        rows = self._cache.segments[piece.segment].block_rows[layer]
        torch.index_select(rows, 0, piece.rows[heads].view(-1), out=out)


def _decode(
    item: Decode, queries: Tensor, keys: Tensor, values: Tensor, out: Tensor, scale: float, softcap: float | None
) -> None:
    """One query a sequence. `queries` and `out`: [tokens, heads, group, head_dim]."""
    own = queries[item.queries]  # [sequences, heads, group, head_dim]
    keys, values = keys.transpose(0, 1), values.transpose(0, 1)  # [sequences, heads, slots, head_dim]
    if softcap is None:
        out[item.queries] = F.scaled_dot_product_attention(own, keys, values, attn_mask=item.mask, scale=scale)
    else:
        out[item.queries] = _capped(own, keys.float(), values.float(), item.mask, scale, softcap).to(out.dtype)


def _prefill(
    item: Prefill, queries: Tensor, keys: Tensor, values: Tensor, out: Tensor, scale: float, softcap: float | None
) -> None:
    """Many queries of one sequence. `queries` and `out`: [tokens, heads, group, head_dim]."""
    own = queries[item.queries].permute(1, 2, 0, 3)  # [heads, group, queries, head_dim]
    target = out[item.queries].permute(1, 2, 0, 3)
    if softcap is not None:
        target.copy_(_capped_tiles(own.flip(2), keys, values, item.mask, scale, softcap).flip(2))
        return
    # [heads, 1, slots, head_dim] seen by each of the group, without a copy.
    shape = (-1, own.shape[1], -1, -1)
    keys, values = keys.expand(shape), values.expand(shape)
    if item.is_whole:
        target.copy_(F.scaled_dot_product_attention(own, keys, values, is_causal=True, scale=scale))
    else:
        result = F.scaled_dot_product_attention(own.flip(2), keys, values, attn_mask=item.mask, scale=scale)
        target.copy_(result.flip(2))


def _capped_tiles(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float, softcap: float) -> Tensor:
    """Soft-capped attention of [heads, group, queries, head_dim] over [heads, 1, slots, head_dim], a tile at a time."""
    heads, group, size, _ = queries.shape
    keys, values = keys.float(), values.float()
    tile = max(1, CAPPED_SCORES // (heads * group * keys.shape[2]))
    starts = range(0, size, tile)
    tiles = ((queries[:, :, first : first + tile], mask[first : first + tile]) for first in starts)
    return torch.cat([_capped(own, keys, values, seen, scale, softcap) for own, seen in tiles], 2)


def _capped(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Tensor:
    """softmax(softcap * tanh(q.k * scale / softcap) + mask) v in float32 (Gemma 2, arXiv:2408.00118, section 2).

    `queries` [a, b, rows, head_dim]; `keys` and `values` [a, b or 1, slots, head_dim].
    """
    # Rows that share their keys become one matrix; matmul would otherwise copy the keys for each.
    folded = queries.float().reshape(*keys.shape[:2], -1, queries.shape[3])
    products = torch.matmul(folded, keys.transpose(-1, -2)).mul_(scale / softcap)
    scores = products.tanh_().mul_(softcap).view(*queries.shape[:3], -1)
    if mask is not None:
        scores.add_(mask)
    return torch.matmul(scores.softmax(-1).view(products.shape), values).view(queries.shape)
