"""Where a model's layers get their tensors from: checked against the files first, then read, one at a time.

Runs in: the thread that loads; owns: nothing that outlives the load.

A model is built twice from the same code: once from `DeclaredWeights`, which compares every name and shape with the
headers and allocates nothing (meta tensors), and once from `StoredWeights`, which reads. So a wrong file is refused
before the first gigabyte is read, and the names and shapes are written down in one place, the layers themselves.
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from edgekv.kernels.quant.dequantise import dequantise
from edgekv.kernels.quant.encodings import BF16, F16, F32, Encoding
from edgekv.model.asked_tensors import AskedTensors, Shape
from edgekv.model.stored import StoredTensor, StoredTensors

Progress = Callable[[int, int, str], None]

FLOATS: dict[Encoding, torch.dtype] = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}
_CHUNK_BYTES = 16 << 20


class WeightSource(Protocol):
    """What a layer asks its tensors of; each name is asked for once."""

    def stacked(self, names: Sequence[str], shapes: Sequence[Shape]) -> Tensor:
        """The named tensors one under the other along dimension 0, so that one GEMM serves them all."""
        ...


class DeclaredWeights:
    """Meta tensors for what the checkpoint's headers promise; raises ModelError where they lack it."""

    def __init__(self, stored: StoredTensors) -> None:
        self.asked = AskedTensors(stored)

    def stacked(self, names: Sequence[str], shapes: Sequence[Shape]) -> Tensor:
        """Checks names, shapes and encodings."""
        for name, shape in zip(names, shapes, strict=True):
            _ = self.asked.find(name, shape).encoding
        return torch.empty(_stacked_shape(shapes), device="meta")


class StoredWeights:
    """Tensors read into memory of their own, converted to `dtype` on `device`; never more than one chunk is staged.

    What is quantised becomes plain numbers of `dtype`, as it has to for whoever multiplies with torch.
    """

    def __init__(
        self, stored: StoredTensors, *, dtype: torch.dtype, device: torch.device, total_bytes: int, progress: Progress
    ) -> None:
        """`total_bytes` is what the checkpoint holds of this model; `progress` hears of every chunk."""
        self._stored, self._dtype, self._device = stored, dtype, device
        self._done_bytes, self._total_bytes, self._progress = 0, total_bytes, progress
        # One for the whole load: freed and taken again for each tensor, it leaves holes as large as the file.
        self._staging = torch.empty(_CHUNK_BYTES, dtype=torch.uint8)

    def stacked(self, names: Sequence[str], shapes: Sequence[Shape]) -> Tensor:
        """Reads; raises ModelError where a file fails."""
        stacked = torch.empty(_stacked_shape(shapes), dtype=self._dtype, device=self._device)
        row = 0
        for name, shape in zip(names, shapes, strict=True):
            self._read(self._stored.tensors[name], stacked[row : row + shape[0]])
            row += shape[0]
        return stacked

    def _read(self, tensor: StoredTensor, target: Tensor) -> None:
        encoding, cols = tensor.encoding, math.prod(target.shape[1:])
        row_bytes = encoding.row_bytes(cols)
        plain = FLOATS.get(encoding)
        direct = plain == self._dtype and self._device.type == "cpu"
        # Of what is quantised, a chunk is counted as the float32 numbers that it becomes on the way.
        chunk = max(1, _CHUNK_BYTES // (row_bytes if plain else 4 * cols))
        for first in range(0, len(target), chunk):
            part = target[first : first + chunk]
            raw = part if direct else self._room_for(len(part) * row_bytes).view(len(part), row_bytes)
            tensor.read_rows(first, _bytes_of(raw))
            if plain is None:
                part.copy_(dequantise(encoding, raw, cols))
            elif not direct:
                part.copy_(raw.view(plain).view(part.shape))
            self._done_bytes += raw.nbytes
            self._progress(self._done_bytes, self._total_bytes, "reading weights")

    def _room_for(self, num_bytes: int) -> Tensor:
        if num_bytes > len(self._staging):  # a single row of that length
            self._staging = torch.empty(num_bytes, dtype=torch.uint8)
        return self._staging[:num_bytes]


def _stacked_shape(shapes: Sequence[Shape]) -> Shape:
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


class RandomWeights:
    """Reproducible noise of a sane scale, for tests and measurements of shapes that have no checkpoint here."""

    def __init__(self, *, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        self._dtype, self._device = dtype, device
        self._generator = torch.Generator(device).manual_seed(seed)

    def stacked(self, names: Sequence[str], shapes: Sequence[Shape]) -> Tensor:
        """Normal noise; matrices scaled by 1/√fan-in."""
        shape = _stacked_shape(shapes)
        noise = torch.empty(shape, dtype=self._dtype, device=self._device).normal_(generator=self._generator)
        return noise.mul_(1 / math.sqrt(shape[-1])) if len(shape) > 1 else noise.mul_(0.1).add_(1)
