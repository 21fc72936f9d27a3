"""A model's matrices as its files declare them: compared with the headers and measured, and nothing read.

Runs in: anywhere (no torch); owns: nothing.
"""

from collections.abc import Sequence

import numpy as np

from edgekv.model.asked_tensors import AskedTensors
from edgekv.model.matrix_layout import PANEL, WeightForm, lay_out
from edgekv.model.packed_weights import PackedMatrix, PackedPart, Shape, Vector
from edgekv.model.stored import StoredTensors


class DeclaredMatrices:
    """A `MatrixSource` whose answers have sizes and take no memory: single bytes and numbers, repeated."""

    def __init__(self, stored: StoredTensors, form: WeightForm) -> None:
        self.asked = AskedTensors(stored)
        self._form = form
        self.num_bytes = 0

    def matrix(self, names: Sequence[str], shapes: Sequence[Shape], *, gated: bool = False) -> PackedMatrix:
        """Counts panels, padding and all."""
        found = [self.asked.find(name, shape) for name, shape in zip(names, shapes, strict=True)]
        encodings = [self._form.encoding(name, tensor) for name, tensor in zip(names, found, strict=True)]
        parts = []
        for layout in lay_out(names, encodings, shapes, gated=gated):
            nothing = np.broadcast_to(np.uint8(0), (layout.num_bytes,))
            parts.append(PackedPart(layout.format, layout.rows, layout.cols, layout.group, nothing))
            self.num_bytes += layout.num_bytes
        return PackedMatrix(tuple(parts), gated)

    def vector(self, name: str, shape: Shape) -> Vector:
        """Counts float32."""
        self.asked.find(name, shape)
        return self._vector(shape[0])

    def bias(self, names: Sequence[str], shapes: Sequence[Shape], *, gated: bool = False) -> Vector:
        """Counts float32, padding and all."""
        for name, shape in zip(names, shapes, strict=True):
            self.asked.find(name, shape)
        return self._vector(sum(-(-shape[0] // PANEL) * PANEL if gated else shape[0] for shape in shapes))

    def _vector(self, size: int) -> Vector:
        self.num_bytes += 4 * size
        return np.broadcast_to(np.float32(0), (size,))
