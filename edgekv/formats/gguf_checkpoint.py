"""The GGUF file of a model, or the several that it was split into, as one.

Runs in: anywhere (no torch); owns: the open files. Parts are named model-00001-of-00003.gguf; the first holds the
metadata, each says its number, and all stand in one folder (tools/gguf-split of github.com/ggml-org/llama.cpp).
"""

import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

from edgekv.errors import ModelError
from edgekv.formats.gguf import GgufFile, TensorInfo
from edgekv.formats.gguf_values import Metadata

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
_MAX_PARTS = 4096


@dataclass(frozen=True, slots=True)
class Located:
    """A tensor and the file it lies in."""

    file: GgufFile
    info: TensorInfo


class GgufCheckpoint:
    """All tensors and the metadata of a model; a context manager.

    Invariant: every name in `tensors` was found in exactly one file, and no part of the model is missing.
    """

    def __init__(self, path: Path) -> None:
        """Opens the file and, where it is any part of several, all of them; raises ModelError."""
        tensors: dict[str, Located] = {}
        with ExitStack() as opening:
            paths = _parts(path)
            for index, part in enumerate(paths):
                if part != path and not part.exists():
                    raise ModelError(f"{part}: part {index + 1} of {len(paths)} is missing: download it too")
                file = opening.enter_context(GgufFile(part))
                _check_part(file.metadata, index, len(paths))
                if index == 0:
                    self.metadata: Metadata = file.metadata
                for name, info in file.tensors.items():
                    if name in tensors:
                        raise ModelError(f"{part}: tensor '{name}': is in {tensors[name].file.path.name} too")
                    tensors[name] = Located(file, info)
            _check_sum(self.metadata, len(tensors))
            self._files = opening.pop_all()
        self.source = paths[0]
        self.tensors: Mapping[str, Located] = MappingProxyType(tensors)

    def close(self) -> None:
        """Close all files; may be called again. The metadata stays readable."""
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _parts(path: Path) -> list[Path]:
    """The files that `path` is one of, in order; itself where its name is not that of a part."""
    found = _PART.fullmatch(path.name)
    count = int(found["count"]) if found else 1
    if found is None or not 1 <= int(found["number"]) <= count <= _MAX_PARTS:
        return [path]
    return [path.with_name(f"{found['stem']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]


def _check_part(metadata: Metadata, index: int, count: int) -> None:
    told = metadata.optional_integer("split.count", 0, 65535) or 1
    number = metadata.optional_integer("split.no", 0, 65535) or 0
    if told != count:
        raise metadata.fault(
            "split.count", f"is {told} in a file whose name makes it {count}: give the parts their own names back"
        )
    if number != index:
        raise metadata.fault("split.no", f"is {number} in a file whose name makes it {index}: the parts were renamed")


def _check_sum(metadata: Metadata, found: int) -> None:
    told = metadata.optional_integer("split.tensors.count", 0, 1 << 31)
    if told is not None and told != found:
        raise metadata.fault("split.tensors.count", f"is {told:,}, but the files hold {found:,} tensors")
