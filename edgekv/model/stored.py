"""Matrices and vectors as a checkpoint stores them, whatever kind of file it is: rows of bytes in a known encoding.

Runs in: the thread that loads; owns: nothing. Loaders ask a `StoredTensors` for names of Hugging Face's kind
("model.layers.0.self_attn.q_proj.weight"); a file of another kind translates them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from edgekv.kernels.quant.encodings import Encoding


class StoredTensor(Protocol):
    """One tensor: `shape` is (rows, cols) of a matrix or (rows,) of a vector, whose rows have one element."""

    @property
    def path(self) -> Path:
        """The file it lies in, for messages."""

    @property
    def name(self) -> str:
        """What that file calls it, for messages."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As the model's code counts: [outputs, inputs]."""

    @property
    def encoding(self) -> Encoding:
        """What the bytes of a row mean."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all rows, as stored."""

    def read_rows(self, first: int, target: memoryview) -> None:
        """Fill `target` with whole rows from row `first` on, row after row. Raises ModelError where the file fails."""


class StoredTensors(Protocol):
    """All tensors of a model by the names that its code uses."""

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """By name; headers are checked, nothing of the data is read."""

    @property
    def source(self) -> Path:
        """The file or folder, for messages."""

    def close(self) -> None:
        """Close all files; may be called again."""
