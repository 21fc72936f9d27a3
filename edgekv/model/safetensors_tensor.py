"""One tensor of a safetensors file as the loaders want it (`StoredTensor`), and its bytes as they lie there.

Runs in: anywhere (no torch); owns: nothing.
"""

from dataclasses import dataclass
from pathlib import Path

from edgekv.errors import ModelError
from edgekv.kernels.quant.encodings import BF16, F16, F32, Encoding
from edgekv.model.safetensors_file import SafetensorsFile, TensorEntry

# float64 has no encoding of its own: it is rounded to float32 as it is read.
_ENCODINGS = {"F64": F32, "F32": F32, "F16": F16, "BF16": BF16}


@dataclass(frozen=True, slots=True)
class SafetensorsTensor:
    """A tensor and the file it lies in."""

    file: SafetensorsFile
    entry: TensorEntry

    @property
    def path(self) -> Path:
        """The file."""
        return self.file.path

    @property
    def name(self) -> str:
        """In the file and in the model."""
        return self.entry.name

    @property
    def shape(self) -> tuple[int, ...]:
        """As in the file."""
        return self.entry.shape

    @property
    def encoding(self) -> Encoding:
        """Of a floating-point tensor; raises ModelError for any other."""
        if self.entry.dtype not in _ENCODINGS:
            raise self.fault(f"dtype {self.entry.dtype} is not supported: {', '.join(_ENCODINGS)}")
        return _ENCODINGS[self.entry.dtype]

    @property
    def num_bytes(self) -> int:
        """Of the rows in `encoding`."""
        return self.entry.num_bytes // (2 if self.entry.dtype == "F64" else 1)

    def read_rows(self, first: int, target: memoryview) -> None:
        """Rows from `first` on; raises ModelError where the file ends."""
        start = first * self.encoding.row_bytes(self.shape[1] if len(self.shape) > 1 else 1)
        if self.entry.dtype != "F64":
            self.file.read_into(self.entry, start, target)
            return
        import numpy as np  # which plans, who read no rows, do without

        doubles = np.empty(len(target) // 4, np.float64)
        self.file.read_into(self.entry, 2 * start, doubles.view(np.uint8).data)
        np.frombuffer(target, np.float32)[:] = doubles

    def read_bytes(self, start: int, target: memoryview) -> None:
        """Bytes as they are in the file, from byte `start` of the tensor on; raises ModelError where the file ends."""
        self.file.read_into(self.entry, start, target)

    def fault(self, message: str) -> ModelError:
        """The error to raise about this tensor."""
        return ModelError(f"{self.path}: tensor '{self.name}': {message}")
