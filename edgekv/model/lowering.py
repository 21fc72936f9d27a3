"""A model as a list of operations for our own kernels: the same mathematics as the torch layers, in their order.

Runs in: anywhere (no torch); owns: nothing. One lowering serves every architecture, because a ModelSpec says all in
which they differ, and every device, because a matrix says itself what it is. On the CPU activations between the
operations are float32; what a matrix multiplies with is rounded to what its panels take (kernels/cpu/src/ek.h).

A lowering over declared weights costs nothing but reading headers, and tells what a model will take.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic

import numpy as np

from edgekv.kernels.cpu.abi import Epilogue, Form, OpKind
from edgekv.model.native_shape import unsupported as unsupported
from edgekv.model.packed_weights import MatrixSource, MatrixT, Vector
from edgekv.model.spec import ModelSpec, RopeSpec
from edgekv.model.step_memory import Slot

NOWHERE = -1
NO_FORM = Form(0)


@dataclass(frozen=True, slots=True, eq=False)
class Operation(Generic[MatrixT]):
    """One ek_op, with its matrices and vectors themselves."""

    kind: OpKind
    src: int = NOWHERE
    dst: int = NOWHERE
    width: int = 0
    forms: Form = NO_FORM
    of_samples: bool = False
    layer: int = 0
    window: int | None = None
    rope: int = 0
    matrix: MatrixT | None = None
    epilogue: Epilogue = Epilogue.STORE
    eps: float = 0.0
    scale: float = 1.0
    softcap: float | None = None
    weight: Vector | None = None
    weight2: Vector | None = None
    bias: Vector | None = None


@dataclass(frozen=True, slots=True, eq=False)
class LoweredModel(Generic[MatrixT]):
    """`inputs` are the most columns that prepared activations have, by form. `ropes` are the
    tables' by number.
    """

    spec: ModelSpec
    operations: tuple[Operation[MatrixT], ...]
    inputs: dict[Form, int]
    ropes: tuple[RopeSpec, ...]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all matrices and vectors, each counted once."""
        matrices = {id(op.matrix): op.matrix.num_bytes for op in self.operations if op.matrix is not None}
        vectors = {
            id(vector): vector.nbytes
            for op in self.operations
            for vector in (op.weight, op.weight2, op.bias)
            if vector is not None
        }
        return sum(matrices.values()) + sum(vectors.values())


def lower(spec: ModelSpec, weights: MatrixSource[MatrixT]) -> LoweredModel[MatrixT]:
    """Asks `weights` for every tensor of the model, and raises what it raises."""
    return _Lowering(spec, weights).run()


class _Lowering(Generic[MatrixT]):
    def __init__(self, spec: ModelSpec, weights: MatrixSource[MatrixT]) -> None:
        self._spec, self._weights = spec, weights
        self._is_gemma = spec.post_norms
        self._ops: list[Operation[MatrixT]] = []
        self._inputs: dict[Form, int] = {}
        self._ropes: dict[RopeSpec, int] = {}

    def run(self) -> LoweredModel[MatrixT]:
        spec, hidden = self._spec, self._spec.hidden_size
        table = self._weights.matrix(("model.embed_tokens.weight",), ((spec.vocab_size, hidden),))
        scale = table.rounded(math.sqrt(hidden)) if self._is_gemma else 1.0
        self._add(OpKind.EMBED, dst=Slot.RESIDUAL, width=hidden, matrix=table, scale=scale)
        for layer, rope in enumerate(spec.ropes):
            self._layer(layer, self._rope(rope))
        final = self._norm_weight("model.norm.weight", hidden)
        head = table
        if not spec.tie_word_embeddings:
            head = self._weights.matrix(("lm_head.weight",), ((spec.vocab_size, hidden),))
        self._norm(final, Slot.LAST, head, of_samples=True)
        self._add(OpKind.LINEAR, dst=Slot.LOGITS, width=hidden, matrix=head, of_samples=True)
        if spec.final_softcap is not None:
            self._add(
                OpKind.SOFTCAP, dst=Slot.LOGITS, width=spec.vocab_size, softcap=spec.final_softcap, of_samples=True
            )
        return LoweredModel(spec, tuple(self._ops), self._inputs, tuple(self._ropes))

    def _layer(self, layer: int, rope: int) -> None:
        spec, prefix = self._spec, f"model.layers.{layer}"
        last = layer == spec.num_layers - 1
        norms = [f"{prefix}.input_layernorm.weight", f"{prefix}.post_attention_layernorm.weight"]
        if self._is_gemma:
            norms += [f"{prefix}.{part}_feedforward_layernorm.weight" for part in ("pre", "post")]
        vectors = [self._norm_weight(name, spec.hidden_size) for name in norms]
        before_attention, before_mlp = vectors[0], vectors[2 if self._is_gemma else 1]

        self._attention(layer, rope, f"{prefix}.self_attn", before_attention)
        rows = Slot.RESIDUAL
        if last:
            # Past the last keys and values only the rows that are sampled matter.
            self._add(OpKind.GATHER, src=Slot.RESIDUAL, dst=Slot.LAST, width=spec.hidden_size, of_samples=True)
            self._add(
                OpKind.GATHER, src=Slot.WIDE, dst=Slot.QKV, width=spec.num_heads * spec.head_dim, of_samples=True
            )
            rows = Slot.LAST
        inner = spec.num_heads * spec.head_dim
        out = self._linear((f"{prefix}.self_attn.o_proj",), (spec.hidden_size,), inner, bias=spec.output_bias)
        self._prepare(Slot.QKV if last else Slot.WIDE, out, of_samples=last)
        self._project(out, rows, inner, vectors[1] if self._is_gemma else None, of_samples=last)

        gate_up = (f"{prefix}.mlp.gate_proj", f"{prefix}.mlp.up_proj")
        sizes = (spec.intermediate_size, spec.intermediate_size)
        pair = self._linear(gate_up, sizes, spec.hidden_size, bias=spec.mlp_bias, gated=True)
        down = self._linear(
            (f"{prefix}.mlp.down_proj",), (spec.hidden_size,), spec.intermediate_size, bias=spec.mlp_bias
        )
        self._norm(before_mlp, rows, pair[0], of_samples=last)
        gate = Epilogue.SILU_MUL if spec.activation == "silu" else Epilogue.GELU_MUL
        self._add(
            OpKind.LINEAR, dst=Slot.WIDE, width=spec.hidden_size, matrix=pair[0], bias=pair[1], epilogue=gate,
            of_samples=last,
        )  # fmt: skip
        self._prepare(Slot.WIDE, down, of_samples=last)
        self._project(down, rows, spec.intermediate_size, vectors[3] if self._is_gemma else None, of_samples=last)

    def _attention(self, layer: int, rope: int, prefix: str, before: Vector) -> None:
        spec = self._spec
        rows = tuple(count * spec.head_dim for count in (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads))
        names = tuple(f"{prefix}.{part}_proj" for part in "qkv")
        qkv, bias = self._linear(names, rows, spec.hidden_size, bias=spec.qkv_bias)
        q_norm = k_norm = None
        if spec.qk_norm:
            q_norm, k_norm = (self._norm_weight(f"{prefix}.{part}_norm.weight", spec.head_dim) for part in "qk")
        self._norm(before, Slot.RESIDUAL, qkv)
        self._add(OpKind.LINEAR, dst=Slot.QKV, width=spec.hidden_size, matrix=qkv, bias=bias)
        self._add(
            OpKind.ROPE_APPEND, src=Slot.QKV, dst=Slot.QKV, width=sum(rows), layer=layer, rope=rope,
            eps=spec.rms_norm_eps, weight=q_norm, weight2=k_norm,
        )  # fmt: skip
        self._add(
            OpKind.ATTEND, src=Slot.QKV, dst=Slot.WIDE, width=sum(rows), layer=layer, window=spec.windows[layer],
            scale=spec.attention_scale, softcap=spec.attention_softcap,
        )  # fmt: skip

    def _project(
        self, linear: tuple[MatrixT, Vector | None], rows: Slot, width: int, after: Vector | None, *,
        of_samples: bool,
    ) -> None:  # fmt: skip
        """Back into the residual `rows`, through a norm first where there is one (`after`)."""
        matrix, bias = linear
        hidden, eps = self._spec.hidden_size, self._spec.rms_norm_eps
        if after is None:
            self._add(
                OpKind.LINEAR, dst=rows, width=width, matrix=matrix, bias=bias, epilogue=Epilogue.ADD,
                of_samples=of_samples,
            )  # fmt: skip
            return
        self._add(OpKind.LINEAR, dst=Slot.BRANCH, width=width, matrix=matrix, bias=bias, of_samples=of_samples)
        self._add(
            OpKind.NORM_ADD, src=Slot.BRANCH, dst=rows, width=hidden, weight=after, eps=eps, of_samples=of_samples
        )

    def _linear(
        self, names: Sequence[str], rows: Sequence[int], columns: int, *, bias: bool, gated: bool = False
    ) -> tuple[MatrixT, Vector | None]:
        shapes = [(count, columns) for count in rows]
        matrix = self._weights.matrix([f"{name}.weight" for name in names], shapes, gated=gated)
        if not bias:
            return matrix, None
        return matrix, self._weights.bias([f"{name}.bias" for name in names], [(n,) for n in rows], gated=gated)

    def _norm_weight(self, name: str, size: int) -> Vector:
        weight = self._weights.vector(name, (size,))
        return (weight + np.float32(1.0)).astype(np.float32) if self._is_gemma else weight

    def _norm(self, weight: Vector, src: Slot, reader: MatrixT, *, of_samples: bool = False) -> None:
        """Normed activations in the form that `reader` takes."""
        size = self._spec.hidden_size
        self._add(
            OpKind.NORM, src=src, width=size, forms=self._forms(reader, size), weight=weight,
            eps=self._spec.rms_norm_eps, of_samples=of_samples,
        )  # fmt: skip

    def _prepare(self, src: Slot, linear: tuple[MatrixT, Vector | None], *, of_samples: bool) -> None:
        width = linear[0].cols
        self._add(OpKind.PREPARE, src=src, width=width, forms=self._forms(linear[0], width), of_samples=of_samples)

    def _forms(self, matrix: MatrixT, columns: int) -> Form:
        forms = matrix.forms
        for form in forms:
            self._inputs[form] = max(self._inputs.get(form, 0), columns)
        return forms

    def _rope(self, rope: RopeSpec) -> int:
        """The number of its table, computed at the first layer that turns by it."""
        if rope not in self._ropes:
            self._ropes[rope] = len(self._ropes)
            # Frequencies are the caller's to compute: torch does, bit for bit as the torch layers.
            self._add(OpKind.ROPE_TABLE, width=self._spec.head_dim // 2, rope=self._ropes[rope])
        return self._ropes[rope]

    def _add(self, kind: OpKind, **fields: object) -> None:
        self._ops.append(Operation(kind, **fields))  # type: ignore[arg-type]

