"""In which encoding a card keeps each matrix, and how many bytes that takes.

Runs in: anywhere (no torch; numpy only for quantised weights); owns: nothing. What `edgekv plan` adds up and what the
loader allocates is decided here, once for both.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from edgekv.core.dtype_choice import DTYPE_BYTES
from edgekv.core.kv_format import CARD_PAGE_BYTES
from edgekv.core.model_shape import WeightBytes
from edgekv.kernels.quant.encodings import Encoding
from edgekv.model.matrix_layout import DTYPE_ENCODINGS, EMBEDDING, WeightForm
from edgekv.model.spec import DtypeName, ModelSpec
from edgekv.model.stored import StoredTensor, StoredTensors
from edgekv.model.weight_names import weight_names

ALIGNMENT = 256
"""Of every tensor's first byte: what vector loads and matrix units like."""
_SLAB_BYTES = 32 << 20
_LAYER = re.compile(r"model\.layers\.\d+")


@dataclass(frozen=True, slots=True)
class CardMember:
    """A matrix of the checkpoint within a part, and the first of its rows there."""

    name: str
    rows: int
    first_row: int


@dataclass(frozen=True, slots=True)
class CardPart:
    """Rows of one encoding, which one launch multiplies with."""

    encoding: Encoding
    rows: int
    cols: int
    members: tuple[CardMember, ...]

    @property
    def tensors(self) -> tuple[int, ...]:
        """Bytes of its tensors: the rows of plain numbers, or the planes q, h and s (kernels/gemm/planes.py)."""
        if self.encoding.is_float:
            return (self.rows * self.encoding.row_bytes(self.cols),)
        from edgekv.kernels.gemm.planes import plane_rows

        sizes = plane_rows(self.encoding, self.cols)
        return tuple(self.rows * size for size in (sizes.q, sizes.h, sizes.s))

    @property
    def num_bytes(self) -> int:
        """Of all its tensors, each aligned."""
        return sum(map(aligned, self.tensors))


def card_encoding(form: WeightForm, name: str, stored: StoredTensor, dtype: DtypeName) -> Encoding:
    """What a matrix is kept in where activations are `dtype`.

    Plain numbers become `dtype`, and so does what the kernels have no format for. Raises ModelError as `WeightForm`.
    """
    kept = form.encoding(name, stored)
    if not kept.is_float:
        from edgekv.kernels.gemm.planes import is_supported

        if is_supported(kept, stored.shape[1]):
            return kept
    return DTYPE_ENCODINGS[dtype]


def lay_out_on_card(
    names: Sequence[str], encodings: Sequence[Encoding], shapes: Sequence[tuple[int, ...]], dtype: DtypeName,
    *, gated: bool,
) -> tuple[CardPart, ...]:  # fmt: skip
    """The parts of matrices that read the same activations: neighbours in the same encoding are one.

    A gated pair is always one part, the gate's rows first.
    """
    cols = shapes[0][1]
    rows = {name: shape[0] for name, shape in zip(names, shapes, strict=True)}
    kept = dict(zip(names, encodings, strict=True))
    if gated and len(set(encodings)) > 1:
        kept = dict.fromkeys(names, DTYPE_ENCODINGS[dtype])
    parts = []
    for encoding, neighbours in groupby(names, kept.__getitem__):
        members, end = [], 0
        for name in neighbours:
            members.append(CardMember(name, rows[name], end))
            end += rows[name]
        parts.append(CardPart(encoding, end, cols, tuple(members)))
    return tuple(parts)


def vector_bytes(size: int, *, is_bias: bool, dtype: DtypeName) -> int:
    """Of a norm's weight in float32; a bias is kept in `dtype` too, as torch's products want it."""
    return aligned(4 * size) + (aligned(DTYPE_BYTES[dtype] * size) if is_bias else 0)


def card_bytes(stored: StoredTensors, spec: ModelSpec, form: WeightForm, dtype: DtypeName) -> WeightBytes:
    """What all weights take on a card. Raises ModelError where `form` does not suit the files."""
    kinds: dict[str, int] = {}
    layers: dict[str, int] = {}
    vectors = unread = 0
    for asked in weight_names(spec):
        if asked.kind in ("norm", "bias"):
            size = sum(shape[0] for shape in asked.shapes)
            vectors += vector_bytes(size, is_bias=asked.kind == "bias", dtype=dtype)
            continue
        layer = layer_of(asked.names[0])
        encodings = [card_encoding(form, name, stored.tensors[name], dtype) for name in asked.names]
        for part in lay_out_on_card(asked.names, encodings, asked.shapes, dtype, gated=asked.kind == "gated"):
            kinds[part.encoding.name] = kinds.get(part.encoding.name, 0) + part.num_bytes
            layers[layer] = layers.get(layer, 0) + part.num_bytes
            if asked.names == (EMBEDDING,) and not spec.tie_word_embeddings:
                unread = part.num_bytes
    total = sum(map(allocation_bytes, (*slab_bytes(layers), vectors)))
    kinds["f32"] = kinds.get("f32", 0) + vectors
    step = sum(kinds.values()) - unread
    ordered = {name: count for name, count in sorted(kinds.items(), key=lambda kind: -kind[1]) if count}
    return WeightBytes(total, step, ordered)


def layer_of(name: str) -> str:
    """The layer to which a matrix belongs; embedding and head are layers of their own."""
    layer = _LAYER.match(name)
    return layer[0] if layer else name


def slabs_of(layers: Mapping[str, int]) -> dict[str, int]:
    """The number of the allocation to which the matrices of each layer go; `layers` has their bytes, in order.

    A large layer has one for itself, so that none is large (a spill moves it whole); small ones share one, since each
    takes whole pages. Vectors of all layers are one more.
    """
    slabs: dict[str, int] = {}
    number = filled = 0
    for layer, num_bytes in layers.items():
        if filled >= _SLAB_BYTES:
            number, filled = number + 1, 0
        slabs[layer] = number
        filled += num_bytes
    return slabs


def slab_bytes(layers: Mapping[str, int]) -> list[int]:
    """Of each allocation that there is for matrices."""
    sizes: dict[int, int] = {}
    for layer, slab in slabs_of(layers).items():
        sizes[slab] = sizes.get(slab, 0) + layers[layer]
    return list(sizes.values())


def allocation_bytes(num_bytes: int) -> int:
    """What torch's allocator takes of a card for a large tensor: whole pages."""
    return -(-num_bytes // CARD_PAGE_BYTES) * CARD_PAGE_BYTES


def aligned(num_bytes: int) -> int:
    """Rounded up."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
