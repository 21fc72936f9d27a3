"""Attention within a program: positions, keys and values into the cache, and what queries see of it.

    decode, 16 bits or 32    decode_split, and lse_merge where contexts are cut
    ragged, 16 bits          decode_split for decodes, then prefill_paged for chunks of prompts
    ragged, float32          decode_split, with a query of its own for each token: exact, not quick

The rows of a chunk that verifies proposals are decodes, in a ragged batch too, each with a context one longer than that
of the row before. So their results are those of decodes beside which nothing is verified; and their contexts are cut
into parts for the whole card, which prefill_paged does not do: one thread block of it would walk all of a long context.
Keys and values of all rows are in the cache before the first row attends: appending is a launch before.

Runs in: engine thread; owns: nothing.
"""

import torch
from torch import Tensor

from edgekv.engine.card_actions import Actions
from edgekv.engine.card_buffers import StepBuffers
from edgekv.engine.card_cuts import cut_number, splits_of
from edgekv.engine.card_device import Card
from edgekv.engine.card_inputs import StepInputs
from edgekv.engine.card_model import CardModel, CardOperation
from edgekv.kernels.attn import decode_split, kv_append, lse_merge, prefill_paged
from edgekv.kernels.attn.gpu_layout import GpuCache, GpuKvFormat
from edgekv.kernels.attn.kv_append import QkNorm, RopeTable
from edgekv.kernels.attn.splits import Parts


def is_wide(dtype: torch.dtype, cache: GpuCache) -> bool:
    """Whether something is in float32, which matrix units do not multiply."""
    return dtype == torch.float32 or cache.layout.kv_format is GpuKvFormat.F32


class CardAttention:
    """Adds a program's attention to its actions; `result` [rows, heads · head_dim] is what the latest comes to."""

    def __init__(
        self,
        card: Card,
        actions: Actions,
        model: CardModel,
        cache: GpuCache,
        buffers: StepBuffers,
        inputs: StepInputs,
        block_table: Tensor,
        *,
        rows: int,
        sampled: int,
        is_decode: bool,
    ) -> None:
        self._actions, self._model, self._cache, self._buffers = actions, model, cache, buffers
        self._inputs, self._block_table, self._rows, self._is_decode = inputs, block_table, rows, is_decode
        spec = model.spec
        heads, dim, limits = spec.num_heads, spec.head_dim, buffers.limits
        self._queries = buffers.view("queries", rows, heads, dim)
        self._out = buffers.view("wide", rows, heads, dim)
        self.result = buffers.view("wide", rows, heads * dim)
        self._is_wide = is_wide(buffers.dtype, cache)
        # What matrix units do not multiply becomes float16 for them.
        self._operands = buffers.dtype if card.has_bf16_units else torch.float16
        # In a ragged batch decodes come first, and there are no more than rows that are sampled.
        self._decodes = rows if is_decode or self._is_wide else min(rows, sampled)
        self._parts: Parts | None = None
        slots = splits_of(card, cache).most_parts(self._decodes, limits.context_blocks)
        if slots > self._decodes and (is_decode or not self._is_wide):
            self._parts = Parts(
                buffers.view("part_values", slots, heads, dim, dtype=torch.float32),
                buffers.view("part_states", slots, heads, 2, dtype=torch.float32),
            )
        self._angles: dict[int, Tensor] = {}

    def add_angles(self, number: int) -> None:
        """The cosines and sines of every row for one kind of layer."""
        rows, half, buffers = self._rows, self._model.spec.head_dim // 2, self._buffers
        rope, positions = self._model.ropes[number], self._inputs.positions[:rows]
        limit = buffers.limits.step_tokens
        angles = buffers.view("angles", len(self._model.ropes), limit, 2, half, dtype=torch.float32)[number, :rows]
        wide = buffers.view("wide_positions", rows, 1, dtype=torch.float32)
        turns = buffers.view("turns", rows, half, dtype=torch.float32)

        def run() -> None:
            wide.copy_(positions.unsqueeze(1))
            torch.mul(wide, rope.frequencies, out=turns)
            torch.cos(turns, out=angles[:, 0])
            torch.sin(turns, out=angles[:, 1])
            if rope.magnitude != 1.0:
                angles.mul_(rope.magnitude)

        self._actions.call(run)
        self._angles[number] = angles

    def add_append(self, operation: CardOperation) -> None:
        """Normalise and rotate queries and keys, and write keys and values to the cache."""
        op, spec, rows = operation.op, self._model.spec, self._rows
        heads, kv_heads = spec.num_heads, spec.num_kv_heads
        qkv = self._buffers.view("qkv", rows, heads + 2 * kv_heads, spec.head_dim)
        norm = None
        if operation.weight is not None and operation.weight2 is not None:
            norm = QkNorm(operation.weight, operation.weight2, op.eps)
        self._actions.launch(
            kv_append.prepare(
                self._cache,
                op.layer,
                qkv[:, :heads],
                qkv[:, heads : heads + kv_heads],
                qkv[:, heads + kv_heads :],
                self._queries,
                positions=self._inputs.positions[:rows],
                block_table=self._block_table,
                table_rows=self._inputs.rows[:rows],
                norm=norm,
                rope=RopeTable(self._angles[op.rope]),
                hadamard=self._cache.layout.kv_format is GpuKvFormat.INT4,
            )
        )

    def add_attend(self, operation: CardOperation) -> None:
        """What each query comes to."""
        op, inputs, decodes = operation.op, self._inputs, self._decodes
        cut = None if self._parts is None else inputs.cuts[cut_number(op.window)][: decodes + 2]
        self._actions.launch(
            decode_split.prepare(
                self._cache,
                op.layer,
                self._queries[:decodes],
                self._out[:decodes],
                block_table=self._block_table,
                table_rows=inputs.rows[:decodes],
                contexts=inputs.contexts[:decodes],
                scale=op.scale,
                cut=cut,
                parts=self._parts,
                window=op.window,
                softcap=op.softcap,
            )
        )
        if self._parts is not None and cut is not None:
            self._actions.launch(lse_merge.prepare(self._parts, self._out[:decodes], slots=cut[1:]))
        if self._is_decode or self._is_wide:
            return
        self._actions.launch(
            prefill_paged.prepare(
                self._cache,
                op.layer,
                self._queries,
                self._out,
                block_table=self._block_table,
                first_rows=inputs.begins,
                lengths=inputs.lengths,
                tiles=inputs.tiles,
                contexts=inputs.totals,
                operands=self._operands,
                scale=op.scale,
                window=op.window,
                softcap=op.softcap,
            )
        )
