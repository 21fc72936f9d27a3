"""What a natively run model is made of: matrices in panels (kernels/cpu/src/ek.h) and vectors in float32.

Runs in: anywhere (no torch); owns: what it hands out, freed when dropped.

A model is lowered twice by the same code: once over `DeclaredMatrices` (declared_matrices.py), which compares every
name and shape with the files' headers and only counts bytes, and once over `PackedMatrices` (packing.py), which reads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Shape = tuple[int, ...]
Vector = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class PackedPart:
    """Rows of one panel format, as an ek_matrix tells of them: `data.ctypes.data` is 64-byte aligned.

    Of a declared part `data` has its length and takes no memory.
    """

    format: int
    rows: int
    cols: int
    group: int
    data: npt.NDArray[np.uint8]

    @property
    def num_bytes(self) -> int:
        """Of all panels, padding and all."""
        return self.data.nbytes


@dataclass(frozen=True, slots=True, eq=False)
class PackedMatrix:
    """Matrices one under the other, one part for neighbours that share a panel format.

    `gated`: the one part's panels alternate gate and up, each filled up with zero rows to whole panels.
    """

    parts: tuple[PackedPart, ...]
    gated: bool = False

    @property
    def num_bytes(self) -> int:
        """Of all parts."""
        return sum(part.num_bytes for part in self.parts)


class MatrixSource(Protocol):
    """What a lowering asks its weights of, by their names in Hugging Face's checkpoints; each name is asked for once.

    Raises ModelError for what the files lack or where they fail.
    """

    def matrix(self, names: Sequence[str], shapes: Sequence[Shape], *, gated: bool = False) -> PackedMatrix:
        """The named matrices, [rows, cols] each, as one operation multiplies with them.

        `gated`: two of the same shape, gate and up. Where the file keeps those in different encodings, both are
        rounded to bfloat16, as they have to share a part.
        """
        ...

    def vector(self, name: str, shape: Shape) -> Vector:
        """A norm's weight or the like, as it is in the file (Gemma's without its 1)."""
        ...

    def bias(self, names: Sequence[str], shapes: Sequence[Shape], *, gated: bool = False) -> Vector:
        """The biases of what `matrix` answers for the same names: in the order of its rows, zeros in the padding."""
        ...
