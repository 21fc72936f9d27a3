"""A model's weights on a card: plain matrices as torch multiplies them, quantised ones in planes.

Runs in: the thread that loads; owns: what it hands out, freed when dropped. Nothing is allocated twice on the way: rows
go to the card as they are read.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edgekv.kernels.cpu.abi import Form
from edgekv.kernels.gemm.matrix import PlaneMatrix
from edgekv.kernels.gemm.planes import plane_rows
from edgekv.kernels.quant.encodings import Encoding
from edgekv.model.asked_tensors import AskedTensors
from edgekv.model.card_layout import (
    CardPart,
    aligned,
    card_encoding,
    lay_out_on_card,
    layer_of,
    slab_bytes,
    slabs_of,
)
from edgekv.model.lowering import LoweredModel, lower
from edgekv.model.matrix_layout import WeightForm
from edgekv.model.open_weights import open_weights
from edgekv.model.packed_weights import Shape, Vector
from edgekv.model.spec import DtypeName, ModelSpec
from edgekv.model.stored import StoredTensors
from edgekv.model.stored_rows import Bytes, RowReader
from edgekv.model.weights import FLOATS, Progress

Allocate = Callable[[int], Tensor]
"""Bytes on the device, uint8, for one slab."""


@dataclass(frozen=True, slots=True, eq=False)
class CardRows:
    """One part of a matrix: `plain` [rows, cols], or `planes`."""

    plain: Tensor | None
    planes: PlaneMatrix | None

    @property
    def rows(self) -> int:
        """Outputs."""
        return self.plain.shape[0] if self.plain is not None else self._quantised.rows

    @property
    def cols(self) -> int:
        """Inputs."""
        return self.plain.shape[1] if self.plain is not None else self._quantised.cols

    @property
    def _quantised(self) -> PlaneMatrix:
        assert self.planes is not None
        return self.planes

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return self.plain.nbytes if self.plain is not None else self._quantised.num_bytes


@dataclass(frozen=True, slots=True, eq=False)
class CardMatrix:
    """Matrices one under the other; of a gated pair, always one part, the gate is the first half."""

    parts: tuple[CardRows, ...]
    dtype: torch.dtype
    gated: bool = False

    @property
    def rows(self) -> int:
        """Outputs, those of both halves of a gated pair."""
        return sum(part.rows for part in self.parts)

    @property
    def cols(self) -> int:
        """Inputs."""
        return self.parts[0].cols

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return sum(part.num_bytes for part in self.parts)

    @property
    def forms(self) -> Form:
        """None: a card's kernels prepare activations when they need them."""
        return Form(0)

    def rounded(self, value: float) -> float:
        """As torch rounds to its type."""
        return float(torch.tensor(value, dtype=self.dtype))


class Slabs:
    """The allocations from which matrices are taken. `layers` has the bytes of each layer's, as `card_bytes` counts."""

    def __init__(self, layers: Mapping[str, int], allocate: Allocate) -> None:
        self._allocate = allocate
        self._slab_of, self._sizes = slabs_of(layers), slab_bytes(layers)
        self._slabs: dict[int, Tensor] = {}
        self._taken: dict[int, int] = {}

    def take(self, name: str, num_bytes: int) -> Tensor:
        """Some bytes for the tensor of that name."""
        slab = self._slab_of[layer_of(name)]
        if slab not in self._slabs:
            self._slabs[slab], self._taken[slab] = self._allocate(self._sizes[slab]), 0
        first = self._taken[slab]
        self._taken[slab] = first + aligned(num_bytes)
        assert self._taken[slab] <= self._sizes[slab], f"the bytes of {name} were counted wrong"
        return self._slabs[slab][first : first + num_bytes]


class DeclaredCardMatrices:
    """A `MatrixSource` whose answers are meta tensors: compares names and shapes, and counts bytes by layer."""

    def __init__(self, stored: StoredTensors, form: WeightForm, dtype: DtypeName) -> None:
        self.asked = AskedTensors(stored)
        self.layers: dict[str, int] = {}
        self._form, self._dtype = form, dtype

    def matrix(self, names: Sequence[str], shapes: Sequence[Shape], *, gated: bool = False) -> CardMatrix:
        """Counts."""
        found = [self.asked.find(name, shape) for name, shape in zip(names, shapes, strict=True)]
        encodings = [
            card_encoding(self._form, name, tensor, self._dtype) for name, tensor in zip(names, found, strict=True)
        ]
        parts = lay_out_on_card(names, encodings, shapes, self._dtype, gated=gated)
        layer = layer_of(names[0])
        self.layers[layer] = self.layers.get(layer, 0) + sum(part.num_bytes for part in parts)
        return declared(parts, self._dtype, gated=gated)

    def vector(self, name: str, shape: Shape) -> Vector:
        """Checks; whoever puts vectors on the card counts them."""
        self.asked.find(name, shape)
        return np.broadcast_to(np.float32(0), shape)

    def bias(self, names: Sequence[str], shapes: Sequence[Shape], *, gated: bool = False) -> Vector:
        """Checks."""
        for name, shape in zip(names, shapes, strict=True):
            self.asked.find(name, shape)
        return np.broadcast_to(np.float32(0), (sum(shape[0] for shape in shapes),))


class CardMatrices:
    """A `MatrixSource` that reads; what it asks for has been proved to be there (`DeclaredCardMatrices`)."""

    def __init__(
        self, stored: StoredTensors, form: WeightForm, dtype: DtypeName, slabs: Slabs, rows: RowReader
    ) -> None:
        self._stored, self._form, self._dtype, self._slabs, self._rows = stored, form, dtype, slabs, rows

    def matrix(self, names: Sequence[str], shapes: Sequence[Shape], *, gated: bool = False) -> CardMatrix:
        """Reads; raises ModelError where a file fails, and the device's out of memory."""
        encodings = [card_encoding(self._form, name, self._stored.tensors[name], self._dtype) for name in names]
        layout = lay_out_on_card(names, encodings, shapes, self._dtype, gated=gated)
        return CardMatrix(tuple(self._part(part) for part in layout), _torch_dtype(self._dtype), gated)

    def vector(self, name: str, shape: Shape) -> Vector:
        """Reads, in float32, in main memory."""
        return self._rows.vector(self._stored.tensors[name])

    def bias(self, names: Sequence[str], shapes: Sequence[Shape], *, gated: bool = False) -> Vector:
        """Reads, in float32, in main memory."""
        return np.concatenate([self._rows.vector(self._stored.tensors[name]) for name in names])

    def _part(self, part: CardPart) -> CardRows:
        name = part.members[0].name
        tensors = [self._slabs.take(name, num_bytes) for num_bytes in part.tensors]
        if part.encoding.is_float:
            made = CardRows(tensors[0].view(FLOATS[part.encoding]).view(part.rows, part.cols), None)
        else:
            made = CardRows(None, _planes(part, tensors))
        for member in part.members:
            for first, rows in self._rows.chunks(self._stored.tensors[member.name], part.encoding):
                self._put(made, part.encoding, member.first_row + first, rows)
        return made

    def _put(self, made: CardRows, encoding: Encoding, first: int, rows: Bytes) -> None:
        if made.planes is not None:
            made.planes.put(first, rows)
            return
        assert made.plain is not None
        values = torch.from_numpy(rows).view(FLOATS[encoding])
        made.plain[first : first + len(rows)].copy_(values)


def declared(parts: Sequence[CardPart], dtype: DtypeName, *, gated: bool) -> CardMatrix:
    """The same shapes, on torch's device without memory."""
    rows = []
    for part in parts:
        if part.encoding.is_float:
            plain = torch.empty(part.rows, part.cols, dtype=FLOATS[part.encoding], device="meta")
            rows.append(CardRows(plain, None))
        else:
            tensors = [torch.empty(num_bytes, dtype=torch.uint8, device="meta") for num_bytes in part.tensors]
            rows.append(CardRows(None, _planes(part, tensors)))
    return CardMatrix(tuple(rows), _torch_dtype(dtype), gated)


def load_on_card(
    path: Path,
    spec: ModelSpec,
    *,
    form: WeightForm,
    dtype: DtypeName,
    allocate: Allocate,
    progress: Progress | None = None,
) -> LoweredModel[CardMatrix]:
    """The lowered model at `path`, a folder or a GGUF file, its matrices on the device of `allocate`.

    As in `load_packed`: all headers are proved before anything is allocated. Raises ModelError naming the file and the
    tensor, and the device's out of memory.
    """
    tell = progress or (lambda done, total, stage: None)
    tell(0, 0, "checking files")
    with closing(open_weights(path)) as stored:
        counted = DeclaredCardMatrices(stored, form, dtype)
        lower(spec, counted)
        counted.asked.refuse_leftovers(tied_head=spec.tie_word_embeddings)
        total_bytes = counted.asked.num_bytes
        tell(0, total_bytes, "reading weights")
        reader = RowReader(total_bytes=total_bytes, progress=tell)
        return lower(spec, CardMatrices(stored, form, dtype, Slabs(counted.layers, allocate), reader))


def _planes(part: CardPart, tensors: Sequence[Tensor]) -> PlaneMatrix:
    sizes = plane_rows(part.encoding, part.cols)
    q, h, s = (tensor.view(part.rows, size) for tensor, size in zip(tensors, (sizes.q, sizes.h, sizes.s), strict=True))
    return PlaneMatrix(part.encoding, part.cols, q, h, s)


def _torch_dtype(dtype: DtypeName) -> torch.dtype:
    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[dtype]
