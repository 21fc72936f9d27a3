"""The safetensors files of a model folder as one: which file holds which tensor.

Runs in: anywhere (no torch); owns: the open files.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from edgekv.errors import ModelError
from edgekv.model.json_fields import Fields, read_object
from edgekv.model.safetensors_file import SafetensorsFile, TensorEntry

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_MAX_INDEX_BYTES = 16 << 20
_MAX_SHARDS = 4096


@dataclass(frozen=True, slots=True)
class Located:
    """A tensor and the file it lies in."""

    file: SafetensorsFile
    entry: TensorEntry


class Checkpoint:
    """All tensors of a model folder; a context manager.

    Invariant: every name in `tensors` was found in exactly one file, in the file that the index names.
    """

    def __init__(self, folder: Path) -> None:
        """Opens every file and checks every header; raises ModelError."""
        self.tensors: dict[str, Located] = {}
        with ExitStack() as opening:
            if (folder / _SINGLE).exists():
                self._add(opening, folder / _SINGLE, None)
                self.source = folder / _SINGLE
            elif (folder / _INDEX).exists():
                self.source = folder / _INDEX
                for shard, names in _read_index(self.source).items():
                    self._add(opening, folder / shard, names)
            else:
                raise ModelError(f"{folder}: holds neither {_SINGLE} nor {_INDEX}{_remedy(folder)}")
            self._files = opening.pop_all()

    def _add(self, opening: ExitStack, path: Path, listed: set[str] | None) -> None:
        if not path.exists():
            raise ModelError(f"{path}: the shard is missing")
        file = opening.enter_context(SafetensorsFile(path))
        for name in sorted((listed or file.entries.keys()) ^ file.entries.keys()):
            if name in file.entries:
                raise ModelError(f"{path}: tensor '{name}': the index does not list it here")
            raise ModelError(f"{path}: tensor '{name}': is missing, though the index lists it here")
        self.tensors.update((name, Located(file, entry)) for name, entry in file.entries.items())

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


def _remedy(folder: Path) -> str:
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        return ". Pickled weights (.bin, .pt) can run code and are never loaded: convert them to safetensors"
    return ""
