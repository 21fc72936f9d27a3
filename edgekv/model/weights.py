"""Where a model's layers get their tensors from: checked against the files first, then read, one at a time.

Runs in: the thread that loads; owns: nothing that outlives the load.

A model is built twice from the same code: once from `DeclaredWeights`, which compares every name and shape with the
headers and allocates nothing (meta tensors), and once from `StoredWeights`, which reads. So a wrong file is refused
before the first gigabyte is read, and the names and shapes are written down in one place, the layers themselves.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from edgekv.errors import ModelError
from edgekv.model.checkpoint import Checkpoint, Located

Shape = tuple[int, ...]
Progress = Callable[[int, int, str], None]

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CHUNK_BYTES = 16 << 20
# Tables that old transformers versions saved and that are computed from the config.
_HARMLESS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


class WeightSource(Protocol):
    """What a layer asks its tensors of; each name is asked for once."""

    def stacked(self, names: Sequence[str], shapes: Sequence[Shape]) -> Tensor:
        """The named tensors one under the other along dimension 0, so that one GEMM serves them all."""
        ...


class DeclaredWeights:
    """Meta tensors for what the checkpoint's headers promise; raises ModelError where they lack it."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._asked: set[str] = set()
        self.num_bytes = 0

    def stacked(self, names: Sequence[str], shapes: Sequence[Shape]) -> Tensor:
        """Checks names, shapes and dtypes."""
        for name, shape in zip(names, shapes, strict=True):
            located = self._checkpoint.tensors.get(name)
            if located is None:
                raise ModelError(f"{self._checkpoint.source}: tensor '{name}': is missing")
            path, entry = located.file.path, located.entry
            if entry.shape != shape:
                raise ModelError(
                    f"{path}: tensor '{name}': has shape {list(entry.shape)}, but config.json asks for {list(shape)}"
                )
            if entry.dtype not in _DTYPES:
                raise ModelError(f"{path}: tensor '{name}': dtype {entry.dtype} is not supported: {', '.join(_DTYPES)}")
            self._asked.add(name)
            self.num_bytes += entry.num_bytes
        return torch.empty(_stacked_shape(shapes), device="meta")

    def refuse_leftovers(self, *, tied_head: bool) -> None:
        """Raises ModelError for a tensor that no layer asked for: the config does not describe this checkpoint."""
        for name, located in self._checkpoint.tensors.items():
            harmless = _HARMLESS.fullmatch(name) or (tied_head and name == "lm_head.weight")
            if name not in self._asked and not harmless:
                raise ModelError(f"{located.file.path}: tensor '{name}': is not part of the model in config.json")


class StoredWeights:
    """Tensors read into memory of their own, converted to `dtype` on `device`; never more than one chunk is staged."""

    def __init__(
        self, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device, total_bytes: int, progress: Progress
    ) -> None:
        """`total_bytes` is what the checkpoint holds of this model; `progress` hears of every chunk."""
        self._checkpoint, self._dtype, self._device = checkpoint, dtype, device
        self._done_bytes, self._total_bytes, self._progress = 0, total_bytes, progress
        # One for the whole load: freed and taken again for each tensor, it leaves holes as large as the file.
        self._staging = torch.empty(_CHUNK_BYTES, dtype=torch.uint8)

    def stacked(self, names: Sequence[str], shapes: Sequence[Shape]) -> Tensor:
        """Reads; raises ModelError where a file fails."""
        stacked = torch.empty(_stacked_shape(shapes), dtype=self._dtype, device=self._device)
        row = 0
        for name, shape in zip(names, shapes, strict=True):
            self._read(self._checkpoint.tensors[name], stacked[row : row + shape[0]].view(-1))
            row += shape[0]
        return stacked

    def _read(self, located: Located, target: Tensor) -> None:
        entry, stored = located.entry, _DTYPES[located.entry.dtype]
        direct = stored == self._dtype and self._device.type == "cpu"
        chunk = max(1, _CHUNK_BYTES // stored.itemsize)
        for start in range(0, target.numel(), chunk):
            part = target[start : start + chunk]
            landing = part if direct else self._staging[: part.numel() * stored.itemsize].view(stored)
            located.file.read_into(entry, start * stored.itemsize, _bytes_of(landing))
            if not direct:
                part.copy_(landing)
            self._done_bytes += landing.nbytes
            self._progress(self._done_bytes, self._total_bytes, "reading weights")


def _stacked_shape(shapes: Sequence[Shape]) -> Shape:
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.view(torch.uint8).numpy().data


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
