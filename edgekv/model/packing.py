"""Weights read from their files into the panels of the native kernels, converted or quantised on the way.

Runs in: the thread that loads; owns: nothing that outlives the load. Never more than one chunk is staged, and no value
that is kept as it is stored changes.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from edgekv.kernels.pages import map_pages
from edgekv.kernels.quant.encodings import Encoding
from edgekv.model.declared_matrices import DeclaredMatrices
from edgekv.model.matrix_layout import PANEL, Member, PartLayout, WeightForm, lay_out
from edgekv.model.open_weights import open_weights
from edgekv.model.packed_weights import MatrixSource, PackedMatrix, PackedPart, Shape, Vector
from edgekv.model.spec import ModelSpec
from edgekv.model.stored import StoredTensors
from edgekv.model.stored_rows import RowReader
from edgekv.model.weights import Progress

T = TypeVar("T")
Bytes = npt.NDArray[np.uint8]


class Packer(Protocol):
    """ek_pack: rows of an encoding into panels."""

    def pack(self, encoding: Encoding, rows: Bytes, part_rows: npt.NDArray[np.int64], part: PackedPart) -> None:
        """Row i of `rows` [rows, row bytes] becomes row part_rows[i] of `part`, whose memory was zeros."""
        ...


def load_packed(
    path: Path,
    spec: ModelSpec,
    lower: Callable[[ModelSpec, MatrixSource[PackedMatrix]], T],
    *,
    form: WeightForm,
    packer: Packer,
    progress: Progress | None = None,
) -> T:
    """What `lower` makes of the model at `path`, a folder or a GGUF file.

    As in `load_model`: all headers are proved before anything is allocated, by lowering once over declared weights.
    Peak memory is the panels plus a chunk or two of 16 MiB. Raises ModelError naming the file and the tensor.
    """
    tell = progress or (lambda done, total, stage: None)
    tell(0, 0, "checking files")
    with closing(open_weights(path)) as stored:
        declared = DeclaredMatrices(stored, form)
        lower(spec, declared)
        declared.asked.refuse_leftovers(tied_head=spec.tie_word_embeddings)
        total_bytes = declared.asked.num_bytes
        tell(0, total_bytes, "reading weights")
        return lower(spec, PackedMatrices(stored, form, packer, total_bytes=total_bytes, progress=tell))


class PackedMatrices:
    """A `MatrixSource` that reads; what it asks for has been proved to be there (`DeclaredMatrices`)."""

    def __init__(
        self, stored: StoredTensors, form: WeightForm, packer: Packer, *, total_bytes: int, progress: Progress
    ) -> None:
        """`total_bytes` is what the checkpoint holds of this model; `progress` hears of every chunk."""
        self._stored, self._form, self._packer = stored, form, packer
        self._rows = RowReader(total_bytes=total_bytes, progress=progress)

    def matrix(self, names: Sequence[str], shapes: Sequence[Shape], *, gated: bool = False) -> PackedMatrix:
        """Reads and packs; raises ModelError where a file fails, and MemoryError."""
        encodings = [self._form.encoding(name, self._stored.tensors[name]) for name in names]
        layouts = lay_out(names, encodings, shapes, gated=gated)
        return PackedMatrix(tuple(self._part(layout) for layout in layouts), gated)

    def vector(self, name: str, shape: Shape) -> Vector:
        """Reads, in float32."""
        return self._rows.vector(self._stored.tensors[name])

    def bias(self, names: Sequence[str], shapes: Sequence[Shape], *, gated: bool = False) -> Vector:
        """Reads, in float32, in the order of the matrix's rows."""
        vectors = [self.vector(name, shape) for name, shape in zip(names, shapes, strict=True)]
        return _alternated(*vectors) if gated else np.concatenate(vectors)

    def _part(self, layout: PartLayout) -> PackedPart:
        # Pages come as they are written to, by the threads that pack.
        panels = np.frombuffer(map_pages(layout.num_bytes, commit=False), np.uint8)
        part = PackedPart(layout.format, layout.rows, layout.cols, layout.group, panels[: layout.num_bytes])
        for member in layout.members:
            self._fill(part, member)
        return part

    def _fill(self, part: PackedPart, member: Member) -> None:
        for first, rows in self._rows.chunks(self._stored.tensors[member.name], member.encoding):
            self._packer.pack(member.encoding, rows, _part_rows(member, first, len(rows)), part)


def _part_rows(member: Member, first: int, count: int) -> npt.NDArray[np.int64]:
    """Which of the part's rows those of the matrix from `first` on become."""
    rows: npt.NDArray[np.int64] = np.arange(first, first + count, dtype=np.int64)
    shift = member.first_row if member.half is None else (rows // PANEL + member.half) * PANEL
    return np.asarray(rows + shift)


def _alternated(gate: Vector, up: Vector) -> Vector:
    """Two biases in the order of a gated part's rows."""
    panels = -(-len(gate) // PANEL)
    halves = np.zeros((2, panels * PANEL), np.float32)
    halves[0, : len(gate)], halves[1, : len(up)] = gate, up
    return halves.reshape(2, panels, PANEL).swapaxes(0, 1).reshape(-1)

