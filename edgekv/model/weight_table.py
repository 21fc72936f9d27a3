"""What a checkpoint holds of a model, read once from its headers: what plans are made with, files closed.

Runs in: anywhere (no torch); owns: nothing (frozen data).
"""

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from edgekv.config.model_path import gguf_at
from edgekv.errors import ModelError
from edgekv.kernels.quant.encodings import Encoding
from edgekv.model.asked_tensors import AskedTensors
from edgekv.model.matrix_layout import DTYPE_ENCODINGS, EMBEDDING, HEAD
from edgekv.model.no_weights import has_weights
from edgekv.model.open_weights import open_weights
from edgekv.model.quantised_config import folder_quantisation
from edgekv.model.spec import DtypeName, ModelSpec
from edgekv.model.stored import StoredTensor
from edgekv.model.weight_names import weight_names

_DTYPES: dict[Encoding, DtypeName] = {encoding: dtype for dtype, encoding in DTYPE_ENCODINGS.items()}


@dataclass(frozen=True, slots=True)
class TableEntry:
    """A `StoredTensor` of which only the header is known."""

    path: Path
    name: str
    shape: tuple[int, ...]
    encoding: Encoding

    @property
    def num_bytes(self) -> int:
        """Of all rows, as stored."""
        return self.shape[0] * self.encoding.row_bytes(self.shape[1] if len(self.shape) > 1 else 1)

    def read_rows(self, first: int, target: memoryview) -> None:
        """Never: there is no file behind it."""
        raise ModelError(f"{self.path}: tensor '{self.name}': is not open")


@dataclass(frozen=True, slots=True)
class WeightTable:
    """`StoredTensors` that hold nothing: exactly the tensors that the model asks for.

    `is_assumed`: there were no files of weights, only a configuration, and this is what it describes.
    """

    source: Path
    tensors: Mapping[str, StoredTensor]
    is_assumed: bool

    @property
    def is_quantised(self) -> bool:
        """Whether any of its matrices is in something else than plain numbers."""
        return any(not tensor.encoding.is_float for tensor in self.tensors.values())

    @property
    def dtypes(self) -> tuple[DtypeName, ...]:
        """What the matrices are in that are plain numbers, the most bytes first."""
        plain: dict[DtypeName, int] = {}
        for tensor in self.tensors.values():
            if len(tensor.shape) > 1 and (dtype := _DTYPES.get(tensor.encoding)) is not None:
                plain[dtype] = plain.get(dtype, 0) + tensor.num_bytes
        return tuple(sorted(plain, key=lambda name: -plain[name]))

    @property
    def kinds(self) -> dict[str, int]:
        """Stored bytes by encoding, the most first."""
        kinds: dict[str, int] = {}
        for tensor in self.tensors.values():
            name = tensor.encoding.name
            kinds[name] = kinds.get(name, 0) + tensor.num_bytes
        return dict(sorted(kinds.items(), key=lambda kind: -kind[1]))

    def close(self) -> None:
        """Nothing is open."""


def read_weight_table(path: Path, spec: ModelSpec) -> WeightTable:
    """The headers of the files at `path`, a folder or a GGUF file, checked as a load checks them.

    A folder without any file of weights is taken for what its config.json describes. Raises ModelError as loading does.
    """
    if gguf_at(path) is None and not has_weights(path):
        return _assumed(path, spec)
    with closing(open_weights(path)) as stored:
        asked = AskedTensors(stored)
        tensors: dict[str, StoredTensor] = {}
        for each in weight_names(spec):
            for name, shape in zip(each.names, each.shapes, strict=True):
                found = asked.find(name, shape)
                tensors[name] = TableEntry(found.path, found.name, shape, found.encoding)
        asked.refuse_leftovers(tied_head=spec.tie_word_embeddings)
        return WeightTable(stored.source, tensors, is_assumed=False)


def _assumed(folder: Path, spec: ModelSpec) -> WeightTable:
    path, quantisation = folder / "config.json", folder_quantisation(folder)
    plain = DTYPE_ENCODINGS[spec.dtype]
    tensors: dict[str, StoredTensor] = {}
    for each in weight_names(spec):
        for name, shape in zip(each.names, each.shapes, strict=True):
            encoding = None
            is_linear = each.kind in ("matrix", "gated") and name not in (EMBEDDING, HEAD)
            if quantisation is not None and is_linear and not any(part in name for part in quantisation.kept):
                encoding = quantisation.encoding(shape[1])
            tensors[name] = TableEntry(path, name, shape, encoding or plain)
    return WeightTable(path, tensors, is_assumed=True)
