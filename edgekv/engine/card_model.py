"""A lowered model on a card: its operations, and the vectors of all layers in one allocation.

Runs in: engine thread; owns: the weights (through the lowered model) and the vectors.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edgekv.engine.card_linear import CardBias
from edgekv.kernels.cpu.abi import OpKind
from edgekv.model.card_layout import aligned, vector_bytes
from edgekv.model.card_matrices import Allocate, CardMatrix
from edgekv.model.card_memory import MatrixFacts
from edgekv.model.lowering import LoweredModel, Operation
from edgekv.model.packed_weights import Vector
from edgekv.model.rope import inverse_frequencies, rope_magnitude
from edgekv.model.spec import DtypeName, ModelSpec


@dataclass(frozen=True, slots=True, eq=False)
class CardOperation:
    """One operation with what it reads beside activations."""

    op: Operation[CardMatrix]
    weight: Tensor | None = None
    weight2: Tensor | None = None
    bias: CardBias | None = None


@dataclass(frozen=True, slots=True, eq=False)
class CardRope:
    """Radians per position, [head_dim / 2] float32, and what cosines and sines are multiplied with."""

    frequencies: Tensor
    magnitude: float


class CardModel:
    """What programs are made of."""

    def __init__(self, lowered: LoweredModel[CardMatrix], dtype: DtypeName, allocate: Allocate) -> None:
        """Raises MemoryError, or torch's like."""
        self.spec: ModelSpec = lowered.spec
        self.dtype = dtype
        self.lowered = lowered
        vectors = _Vectors(lowered, dtype, allocate)
        self.operations = tuple(vectors.attach(op) for op in lowered.operations)
        device = vectors.memory.device
        self.ropes = tuple(
            CardRope(inverse_frequencies(rope, self.spec.head_dim).to(device), rope_magnitude(rope))
            for rope in lowered.ropes
        )

    @property
    def facts(self) -> MatrixFacts:
        """What buffers depend on."""
        quantised = [
            (part.rows, part.cols)
            for each in self.operations
            if each.op.kind is OpKind.LINEAR and each.op.matrix is not None
            for part in each.op.matrix.parts
            if part.planes is not None
        ]
        return MatrixFacts.of(quantised, self.dtype)


class _Vectors:
    """Norms' weights in float32 and biases in both types, one behind the other."""

    def __init__(self, lowered: LoweredModel[CardMatrix], dtype: DtypeName, allocate: Allocate) -> None:
        self._dtype = dtype
        own: dict[int, tuple[Vector, bool]] = {}
        for op in lowered.operations:
            for vector, is_bias in ((op.weight, False), (op.weight2, False), (op.bias, True)):
                if vector is not None:
                    own[id(vector)] = vector, is_bias
        size = sum(vector_bytes(len(vector), is_bias=is_bias, dtype=dtype) for vector, is_bias in own.values())
        self.memory = allocate(size)
        self._next = 0
        self._made: dict[int, CardBias | Tensor] = {
            key: self._bias(vector) if is_bias else self._put(vector, torch.float32)
            for key, (vector, is_bias) in own.items()
        }

    def attach(self, op: Operation[CardMatrix]) -> CardOperation:
        weight, weight2, bias = (
            None if each is None else self._made[id(each)] for each in (op.weight, op.weight2, op.bias)
        )
        assert not isinstance(weight, CardBias)
        assert not isinstance(weight2, CardBias)
        assert not isinstance(bias, Tensor)
        return CardOperation(op, weight, weight2, bias)

    def _bias(self, vector: Vector) -> CardBias:
        narrow = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[self._dtype]
        return CardBias(self._put(vector, torch.float32), self._put(vector, narrow))

    def _put(self, vector: Vector, dtype: torch.dtype) -> Tensor:
        num_bytes = len(vector) * dtype.itemsize
        place = self.memory[self._next : self._next + num_bytes].view(dtype)
        self._next += aligned(num_bytes)
        place.copy_(torch.from_numpy(np.ascontiguousarray(vector)))
        return place
