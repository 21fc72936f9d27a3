"""In which encoding each matrix of a natively run model is kept, and how matrices come to lie in panels.

Runs in: anywhere (no torch, no numpy); owns: nothing. What `edgekv plan` adds up and what the loader allocates is
decided here, once for both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from edgekv.errors import ModelError
from edgekv.kernels.cpu.formats import PanelFormat, panel_bytes, panel_format
from edgekv.kernels.quant.encodings import BF16, F16, F32, Q4_0, Q8_0, Encoding
from edgekv.model.spec import DtypeName
from edgekv.model.stored import StoredTensor

WeightsName = Literal["auto", "int8", "int4"]

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PANEL = 16  # rows of a panel: EK_PANEL
DTYPE_ENCODINGS: dict[DtypeName, Encoding] = {"float32": F32, "float16": F16, "bfloat16": BF16}


@dataclass(frozen=True, slots=True)
class WeightForm:
    """How matrices are kept. Vectors (norms, biases) are float32 always.

    `weights`: "auto" leaves what is quantised as it is; "int8" and "int4" quantise the linear layers of a checkpoint
    that is not, to q8_0 or q4_0, and embedding and head to q8_0 in both. `dtype`: of what is not quantised; None: as
    the file has it.
    """

    dtype: DtypeName | None
    weights: WeightsName = "auto"

    def encoding(self, name: str, stored: StoredTensor) -> Encoding:
        """What the matrix is kept in. Raises ModelError where it is quantised already and was to be quantised."""
        kept = stored.encoding
        if kept.is_float and self.dtype is not None:
            kept = DTYPE_ENCODINGS[self.dtype]
        if self.weights == "auto":
            return kept
        if not kept.is_float:
            raise ModelError(
                f"{stored.path}: tensor '{stored.name}': is in {kept.name} already, and weights: {self.weights} is for "
                "checkpoints that are not quantised: leave it at auto, or take another file"
            )
        wanted = Q8_0 if self.weights == "int8" or name in (EMBEDDING, HEAD) else Q4_0
        return kept if stored.shape[1] % wanted.block_cols else wanted


@dataclass(frozen=True, slots=True)
class Member:
    """A matrix within a part: what its rows are kept in, and where among the part's rows they begin.

    `half`: of a gated pair, whose panels alternate, 0 for the gate and 1 for what it gates; None for all others.
    """

    name: str
    encoding: Encoding
    rows: int
    first_row: int
    half: int | None = None


@dataclass(frozen=True, slots=True)
class PartLayout:
    """One part of a packed matrix: see `PackedPart`."""

    format: PanelFormat
    rows: int
    cols: int
    group: int
    members: tuple[Member, ...]

    @property
    def num_bytes(self) -> int:
        """Of its panels."""
        return panel_bytes(self.format, self.rows, self.cols, self.group)


def lay_out(
    names: Sequence[str], encodings: Sequence[Encoding], shapes: Sequence[tuple[int, ...]], *, gated: bool
) -> tuple[PartLayout, ...]:
    """The parts of some matrices with the same number of columns, as `MatrixSource.matrix` has them."""
    cols = shapes[0][1]
    if gated:
        return (_gated(names, encodings, shapes),)
    parts = []
    rows = {name: shape[0] for name, shape in zip(names, shapes, strict=True)}
    kept = dict(zip(names, encodings, strict=True))
    for (form, group), neighbours in groupby(names, lambda name: (panel_format(kept[name]), kept[name].group)):
        members, end = [], 0
        for name in neighbours:
            members.append(Member(name, kept[name], rows[name], end))
            end += rows[name]
        parts.append(PartLayout(form, end, cols, group, tuple(members)))
    return tuple(parts)


def _gated(
    names: Sequence[str], encodings: Sequence[Encoding], shapes: Sequence[tuple[int, ...]]
) -> PartLayout:
    (gate, up), (rows, cols) = encodings, shapes[0]
    if (panel_format(gate), gate.group) != (panel_format(up), up.group):
        gate = up = BF16
    padded = -(-rows // PANEL) * PANEL
    members = tuple(
        Member(name, encoding, rows, 0, half)
        for half, (name, encoding) in enumerate(zip(names, (gate, up), strict=True))
    )
    return PartLayout(panel_format(gate), 2 * padded, cols, gate.group, members)
