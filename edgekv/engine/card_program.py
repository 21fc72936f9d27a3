"""A model's step for one shape of batch, as launches on buffers that stay: run as it is, or captured in a graph.

In a **decode** program every row is sampled: a sequence has one, and one more for each proposal that is verified. A
**ragged** one has the chunks of prompts too; only the rows that are sampled pass the last layer's MLP and the head.
Both are made for a number of rows, and steps with fewer are filled up with rows that are nobody's (position -1).

Runs in: engine thread; owns: nothing.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from edgekv.engine.card_actions import Actions
from edgekv.engine.card_attention import CardAttention
from edgekv.engine.card_buffers import StepBuffers
from edgekv.engine.card_device import Card
from edgekv.engine.card_inputs import StepInputs
from edgekv.engine.card_linear import Linear
from edgekv.engine.card_model import CardModel, CardOperation
from edgekv.kernels.attn.gpu_layout import GpuCache
from edgekv.kernels.cpu.abi import OpKind
from edgekv.kernels.fused import rmsnorm
from edgekv.kernels.gemm import dequant
from edgekv.model.step_memory import Slot


class Program:
    """The actions of one step; `logits` [sampled rows, vocab] float32 is where they end."""

    def __init__(
        self,
        card: Card,
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
        """Of the `rows` up to `sampled` are sampled: all, in a decode program.

        Raises ValueError for shapes that the kernels do not have.
        """
        self._model, self._buffers, self._inputs = model, buffers, inputs
        self._rows, self._sampled, self._is_decode = rows, sampled, is_decode
        self.actions = Actions(card)
        self._linear = Linear(card, self.actions, buffers)
        self._attention = CardAttention(
            card, self.actions, model, cache, buffers, inputs, block_table,
            rows=rows, sampled=sampled, is_decode=is_decode,
        )  # fmt: skip
        spec = model.spec
        self._residual = buffers.view("residual", rows, spec.hidden_size)
        self._normed = buffers.view("normed", rows, spec.hidden_size)
        self._last = self._residual if is_decode else buffers.view("last", self._sampled, spec.hidden_size)
        self.logits = buffers.view("logits", self._sampled, spec.vocab_size, dtype=torch.float32)
        self._x = self._normed  # what the next linear layer reads
        for operation in model.operations:
            self._add(operation)

    def _add(self, operation: CardOperation) -> None:
        _ADD[operation.op.kind](self, operation)

    def _embed(self, operation: CardOperation) -> None:
        op, inputs, buffers, rows = operation.op, self._inputs, self._buffers, self._rows
        told, sources = buffers.told, inputs.sources[:rows]
        ids = buffers.view("ids", rows, dtype=torch.int32)
        residual = self._residual
        self.actions.call(lambda: torch.index_select(told, 0, sources, out=ids))
        assert op.matrix is not None
        table = op.matrix.parts[0]
        if table.planes is not None:
            self.actions.launch(dequant.prepare(table.planes, residual, ids=ids, scale=op.scale))
            return
        plain, scale = table.plain, op.scale
        assert plain is not None
        self.actions.call(lambda: torch.index_select(plain, 0, ids, out=residual))
        if scale != 1.0:
            self.actions.call(lambda: residual.mul_(scale))

    def _rope_table(self, operation: CardOperation) -> None:
        self._attention.add_angles(operation.op.rope)

    def _norm(self, operation: CardOperation) -> None:
        op, rows = operation.op, self._rows_of(operation)
        source = self._slot(Slot(op.src), rows)
        out = self._buffers.view("normed", rows, op.width)
        assert operation.weight is not None
        self.actions.launch(rmsnorm.prepare(source, operation.weight, out, eps=op.eps, rounds_first=not self._is_gemma))
        self._reads(out)

    def _norm_add(self, operation: CardOperation) -> None:
        op, rows = operation.op, self._rows_of(operation)
        branch, into = self._buffers.view("branch", rows, op.width), self._slot(Slot(op.dst), rows)
        assert operation.weight is not None
        self.actions.launch(
            rmsnorm.prepare(
                branch, operation.weight, into, eps=op.eps, rounds_first=not self._is_gemma,
                other=into, add=rmsnorm.Add.AFTER,
            )
        )  # fmt: skip

    def _prepare(self, operation: CardOperation) -> None:
        # On a card activations are what the next layer reads already.
        op, rows = operation.op, self._rows_of(operation)
        if op.src == Slot.QKV:
            self._reads(self._attention.result if self._is_decode else self._gathered())
        else:
            is_attended = self._wide_is_attended
            self._reads(self._attention.result if is_attended else self._buffers.view("wide", rows, op.width))
        self._wide_is_attended = False

    def _linear_layer(self, operation: CardOperation) -> None:
        op, rows = operation.op, self._rows_of(operation)
        matrix = op.matrix
        assert matrix is not None
        outputs = matrix.rows // 2 if matrix.gated else matrix.rows
        if op.dst == Slot.LOGITS:
            out = self.logits
        elif op.dst == Slot.QKV:
            out = self._buffers.view("qkv", rows, outputs)
        elif op.dst == Slot.WIDE:
            out = self._buffers.view("wide", rows, outputs)
        elif op.dst == Slot.BRANCH:
            out = self._buffers.view("branch", rows, outputs)
        else:
            out = self._slot(Slot(op.dst), rows)
        self._linear.add(matrix, self._x, out, op.epilogue, operation.bias)

    def _rope_append(self, operation: CardOperation) -> None:
        self._attention.add_append(operation)

    def _attend(self, operation: CardOperation) -> None:
        self._attention.add_attend(operation)
        self._wide_is_attended = True

    def _softcap(self, operation: CardOperation) -> None:
        logits, cap = self.logits, operation.op.softcap
        assert cap is not None
        self.actions.call(lambda: logits.div_(cap).tanh_().mul_(cap))

    def _gather(self, operation: CardOperation) -> None:
        if self._is_decode:
            return  # every row is sampled, and in its place
        samples = self._inputs.samples[: self._sampled]
        if operation.op.src == Slot.RESIDUAL:
            source, out = self._residual, self._last
        else:
            source, out = self._attention.result, self._gathered()
        self.actions.call(lambda: torch.index_select(source, 0, samples, out=out))

    def _gathered(self) -> Tensor:
        spec = self._model.spec
        return self._buffers.view("gathered", self._sampled, spec.num_heads * spec.head_dim)

    def _rows_of(self, operation: CardOperation) -> int:
        return self._sampled if operation.op.of_samples else self._rows

    def _slot(self, slot: Slot, rows: int) -> Tensor:
        if slot is Slot.RESIDUAL:
            return self._residual
        assert slot is Slot.LAST, slot
        return self._last[:rows]

    def _reads(self, x: Tensor) -> None:
        self._x = x
        self._linear.forget()

    @property
    def _is_gemma(self) -> bool:
        return self._model.spec.post_norms

    _wide_is_attended = False


_ADD: dict[OpKind, Callable[[Program, CardOperation], None]] = {
    OpKind.EMBED: Program._embed,
    OpKind.ROPE_TABLE: Program._rope_table,
    OpKind.NORM: Program._norm,
    OpKind.NORM_ADD: Program._norm_add,
    OpKind.PREPARE: Program._prepare,
    OpKind.LINEAR: Program._linear_layer,
    OpKind.ROPE_APPEND: Program._rope_append,
    OpKind.ATTEND: Program._attend,
    OpKind.SOFTCAP: Program._softcap,
    OpKind.GATHER: Program._gather,
}
