"""A lowered model with the memory that its steps work in: one call of the native CPU kernels a step.

Runs in: engine thread; owns: the weights (through the lowered model) and the step's buffers, which grow to the largest
step so far and are reused.
"""

import ctypes
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgekv.kernels.attn.ragged import Ints, RaggedBatch
from edgekv.kernels.cpu import abi
from edgekv.kernels.cpu.cache import NativeCache
from edgekv.kernels.cpu.formats import ALIGNMENT, activation_stride
from edgekv.kernels.cpu.program import Pool
from edgekv.model.lowering import LoweredModel, Operation
from edgekv.model.packed_weights import PackedMatrix
from edgekv.model.rope import inverse_frequencies, rope_magnitude
from edgekv.model.spec import ModelSpec
from edgekv.model.step_memory import ITEM_BYTES, SAMPLED_SLOTS, Slot, aligned, groups_of, slot_stride, step_bytes


class NativeLM:
    """A decoder-only model on the CPU. Results of a token do not depend on what else is in its step."""

    def __init__(self, lowered: LoweredModel[PackedMatrix], pool: Pool) -> None:
        """Lowers no further: `lowered` is what is run, on the threads of `pool`."""
        self.spec: ModelSpec = lowered.spec
        self.lowered = lowered
        self._pool = pool
        self._kept: list[object] = []
        self._ops = (abi.Op * len(lowered.operations))(*(self._op(each) for each in lowered.operations))
        spec = self.spec
        self._program = abi.Program(
            ctypes.addressof(self._ops), len(self._ops), spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.head_dim
        )
        self._attend = abi.Attend(heads=spec.num_heads)
        self._batch = abi.Batch()
        self._buffers = (abi.Buffer * len(Slot))()
        self._step = abi.Step(
            batch=ctypes.addressof(self._batch), buffers=ctypes.addressof(self._buffers)
        )
        self._arena = _Arena(0)
        self._shared = _Arena(0)
        self._rows = _Rows(0, 0)
        self._logits: npt.NDArray[np.float32] = np.empty((0, spec.vocab_size), np.float32)

    @property
    def workspace_bytes(self) -> int:
        """Held beside weights and pool; grows with the largest step so far."""
        return self._arena.num_bytes + self._shared.num_bytes

    def forward(
        self, cache: NativeCache, token_ids: Ints, positions: Ints, sample_rows: Ints, ragged: RaggedBatch
    ) -> npt.NDArray[np.float32]:
        """Run one step's ragged batch.

        `token_ids` and `positions` [tokens] are those of all chunks laid end to end; `sample_rows` [rows] are the rows
        whose logits are wanted. Answers [rows, vocab_size], valid until the next call. Raises ValueError for a batch
        that the cache does not hold.
        """
        self._reserve(_Rows(len(token_ids), len(sample_rows)))
        batch, first_rows = self._batch, ragged.first_rows
        batch.tokens, batch.spans, batch.samples = len(token_ids), ragged.num_spans, len(sample_rows)
        batch.token_ids, batch.positions = _address(token_ids), _address(positions)
        batch.sample_rows = _address(sample_rows)
        batch.starts, batch.lengths = _address(ragged.starts), _address(ragged.lengths)
        batch.first_rows = _address(first_rows)
        batch.blocks, batch.table_starts = _address(ragged.blocks), _address(ragged.table_starts)
        struct = cache.struct()
        self._step.cache = ctypes.addressof(struct)
        self._attend.cache, self._attend.batch = ctypes.addressof(struct), ctypes.addressof(batch)
        shared = self._pool.attend_shared_bytes(self._attend)
        if shared > self._shared.num_bytes:
            self._shared = _Arena(shared)
            self._step.attend_shared = self._shared.take(shared)
        self._pool.run(self._program, self._step)
        return self._logits[: len(sample_rows)]

    def profile(self) -> npt.NDArray[np.int64]:
        """Nanoseconds by operation, added to by every step from now on."""
        spent = np.zeros(len(self._ops), np.int64)
        self._kept.append(spent)
        self._step.op_ns = _address(spent)
        return spent

    def _op(self, operation: Operation[PackedMatrix]) -> abi.Op:
        """Keeps alive what the structure points to."""
        op = abi.Op(
            kind=operation.kind,
            src=operation.src,
            dst=operation.dst,
            width=operation.width,
            forms=operation.forms,
            of_samples=operation.of_samples,
            layer=operation.layer,
            window=operation.window or 0,
            rope=operation.rope,
            epilogue=operation.epilogue,
            eps=operation.eps,
            scale=operation.scale,
            softcap=operation.softcap or 0.0,
        )
        weight = operation.weight
        if operation.kind is abi.OpKind.ROPE_TABLE:
            rope = self.lowered.ropes[operation.rope]
            weight = inverse_frequencies(rope, self.spec.head_dim).numpy()
            op.scale = rope_magnitude(rope)
        for field, vector in (("weight", weight), ("weight2", operation.weight2), ("bias", operation.bias)):
            if vector is not None:
                self._kept.append(vector)
                setattr(op, field, _address(vector))
        if operation.matrix is not None:
            parts = operation.matrix.parts
            array = (abi.Matrix * len(parts))(
                *(abi.Matrix(_address(p.data), p.format, p.rows, p.cols, p.group) for p in parts)
            )
            self._kept.append(array)
            op.num_parts, op.parts = len(parts), ctypes.addressof(array)
        return op

    def _reserve(self, wanted: "_Rows") -> None:
        """Buffers for so many rows."""
        if wanted.tokens <= self._rows.tokens and wanted.samples <= self._rows.samples:
            return
        rows = _Rows(max(wanted.tokens, self._rows.tokens), max(wanted.samples, self._rows.samples))
        # The old one goes first, and with it the last view of it.
        self._arena, self._rows = _Arena(0), _Rows(0, 0)
        self._logits = np.empty((0, self.spec.vocab_size), np.float32)
        arena = _Arena(step_bytes(self.spec, self.lowered.inputs, rows.tokens, rows.samples))
        for slot in Slot:
            stride = slot_stride(self.spec, slot)
            count = rows.samples if slot in SAMPLED_SLOTS else rows.tokens
            self._buffers[slot] = abi.Buffer(arena.take(4 * stride * count), stride)
            if slot is Slot.LOGITS:
                self._logits = arena.view(self._buffers[slot].data, count * stride).reshape(count, stride)
        prepared = self._step.prepared
        for form, columns in self.lowered.inputs.items():
            stride = activation_stride(columns, ITEM_BYTES[form])
            name = {abi.Form.F32: "f32", abi.Form.BF16: "bf16", abi.Form.Q8: "q8"}[form]
            setattr(prepared, name, arena.take(stride * ITEM_BYTES[form] * rows.tokens))
            setattr(prepared, f"{name}_stride", stride)
            if form is abi.Form.Q8:
                prepared.group_stride = groups_of(columns)
                prepared.q8_scale = arena.take(4 * prepared.group_stride * rows.tokens)
                prepared.q8_sum = arena.take(4 * prepared.group_stride * rows.tokens)
        self._step.rope_tables = arena.take(4 * len(self.lowered.ropes) * rows.tokens * self.spec.head_dim)
        self._arena, self._rows = arena, rows


@dataclass(frozen=True, slots=True)
class _Rows:
    tokens: int
    samples: int


class _Arena:
    """Bytes from which aligned pieces are taken."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._pages = np.empty(num_bytes + ALIGNMENT if num_bytes else 0, np.uint8)
        self._next = _address(self._pages) + ALIGNMENT - 1 & -ALIGNMENT

    def take(self, num_bytes: int) -> int:
        """The address of a piece, uninitialised."""
        address = self._next
        self._next += aligned(num_bytes)
        assert self._next <= _address(self._pages) + len(self._pages), "the step's buffers were counted wrong"
        return address

    def view(self, address: int, count: int) -> npt.NDArray[np.float32]:
        """The float32 numbers of a piece."""
        first = address - _address(self._pages)
        return self._pages[first : first + 4 * count].view(np.float32)


def _address(array: npt.NDArray[np.generic]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address
