"""What a natively run model is made of: matrices in panels (kernels/cpu/src/ek.h) and vectors in float32.

Runs in: anywhere (no torch); owns: what it hands out, freed when dropped.

A model is lowered twice by the same code: once over `DeclaredMatrices` (declared_matrices.py), which compares every
name and shape with the files' headers and only counts bytes, and once over `PackedMatrices` (packing.py), which reads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from edgekv.kernels.cpu.abi import Form
from edgekv.kernels.cpu.formats import PanelFormat, activation_form

Shape = tuple[int, ...]
Vector = npt.NDArray[np.float32]


class Matrix(Protocol):
    """What a lowering must know of a matrix, in whatever form a device wants it."""

    @property
    def cols(self) -> int:
        """Of the activations that it multiplies."""

    @property
    def num_bytes(self) -> int:
        """Bytes held."""

    @property
    def forms(self) -> Form:
        """The forms in which the CPU's kernels have to prepare its activations."""

    def rounded(self, value: float) -> float:
        """`value` in the type of its numbers."""


MatrixT = TypeVar("MatrixT", bound=Matrix)
MatrixT_co = TypeVar("MatrixT_co", bound=Matrix, covariant=True)


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
    def cols(self) -> int:
        """Of the activations that it multiplies."""
        return self.parts[0].cols

    @property
    def num_bytes(self) -> int:
        """Of all parts."""
        return sum(part.num_bytes for part in self.parts)

    @property
    def forms(self) -> Form:
        """In which its parts take activations."""
        forms = Form(0)
        for part in self.parts:
            forms |= activation_form(PanelFormat(part.format))
        return forms

    def rounded(self, value: float) -> float:
        """To nearest even in what its first part is kept in; float32 where that is quantised."""
        match self.parts[0].format:
            case PanelFormat.BF16:
                bits = int(np.float32(value).view(np.uint32))
                return float(np.uint32((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32))
            case PanelFormat.F16:
                return float(np.float16(value))
            case _:
                return float(np.float32(value))


class MatrixSource(Protocol[MatrixT_co]):
    """What a lowering asks its weights of, by their names in Hugging Face's checkpoints; each name is asked for once.

    Raises ModelError for what the files lack or where they fail.
    """

    def matrix(self, names: Sequence[str], shapes: Sequence[Shape], *, gated: bool = False) -> MatrixT_co:
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
