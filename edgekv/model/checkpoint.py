"""The safetensors files of a model folder as one: which file holds which tensor, and as what.

Runs in: anywhere (no torch); owns: the open files.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from edgekv.errors import ModelError
from edgekv.model.json_fields import Fields, read_object
from edgekv.model.no_weights import INDEX, SINGLE, no_weights
from edgekv.model.quantised_config import folder_quantisation
from edgekv.model.safetensors_file import SafetensorsFile
from edgekv.model.safetensors_tensor import SafetensorsTensor
from edgekv.model.stored import StoredTensor

_MAX_INDEX_BYTES = 16 << 20
_MAX_SHARDS = 4096


class Checkpoint:
    """All tensors of a model folder (`StoredTensors`); a context manager.

    Invariant: every tensor was found in exactly one file, in the file that the index names. The layers that config.json
    says were quantised are there under the names of their weights.
    """

    source: Path

    def __init__(self, folder: Path) -> None:
        """Opens every file and checks every header; raises ModelError."""
        self._found: dict[str, SafetensorsTensor] = {}
        with ExitStack() as opening:
            if (folder / SINGLE).exists():
                self._add(opening, folder / SINGLE, None)
                self.source = folder / SINGLE
            elif (folder / INDEX).exists():
                self.source = folder / INDEX
                for shard, names in _read_index(self.source).items():
                    self._add(opening, folder / shard, names)
            else:
                raise no_weights(folder)
            self.tensors = self._as_weights(folder)
            self._files = opening.pop_all()

    def _add(self, opening: ExitStack, path: Path, listed: set[str] | None) -> None:
        if not path.exists():
            raise ModelError(f"{path}: the shard is missing")
        file = opening.enter_context(SafetensorsFile(path))
        for name in sorted((listed or file.entries.keys()) ^ file.entries.keys()):
            if name in file.entries:
                raise ModelError(f"{path}: tensor '{name}': the index does not list it here")
            raise ModelError(f"{path}: tensor '{name}': is missing, though the index lists it here")
        self._found.update((name, SafetensorsTensor(file, entry)) for name, entry in file.entries.items())

    def _as_weights(self, folder: Path) -> Mapping[str, StoredTensor]:
        quantisation = folder_quantisation(folder)
        if quantisation is not None:
            from edgekv.model.awq_gptq import group_tensors  # and numpy

            return group_tensors(self._found, quantisation)
        for name, tensor in self._found.items():
            if name.endswith(".qweight"):
                raise tensor.fault("is quantised, but config.json has no quantization_config that says how")
        return {**self._found}

    def close(self) -> None:
        """Close all files; may be called again."""
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _read_index(path: Path) -> dict[str, set[str]]:
    """Tensor names by shard."""
    index = Fields(str(path), read_object(path, _MAX_INDEX_BYTES))
    weight_map = index.optional_object("weight_map")
    if weight_map is None or not weight_map.values:
        raise index.fault("weight_map", "is missing or empty")
    shards: dict[str, set[str]] = {}
    for name in weight_map.values:
        shard = weight_map.optional_text(name)
        # A bare file name: an index must not reach outside its folder.
        if shard is None or not shard.endswith(".safetensors") or {"/", "\\", "\0", ":"} & set(shard):
            raise weight_map.fault(
                name, f"expected the name of a .safetensors file beside the index, found {shard!r:.80}"
            )
        shards.setdefault(shard, set()).add(name)
    if len(shards) > _MAX_SHARDS:
        raise index.fault("weight_map", f"names {len(shards):,} files, over the limit of {_MAX_SHARDS:,}")
    return shards
