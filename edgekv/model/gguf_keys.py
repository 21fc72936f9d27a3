"""The keys of a GGUF file that speak of its architecture, under the names that they have behind "llama." and the like.

Runs in: anywhere (no torch); owns: nothing.
"""

import struct

from edgekv.errors import ModelError
from edgekv.formats.gguf_checkpoint import GgufCheckpoint, Located


class ArchitectureKeys:
    """Typed and bounded access; every fault is a ModelError that names the file and the whole key."""

    def __init__(self, checkpoint: GgufCheckpoint, architecture: str) -> None:
        self.architecture = architecture
        self.tensors = checkpoint.tensors
        self._metadata = checkpoint.metadata

    def __contains__(self, name: str) -> bool:
        return self._key(name) in self._metadata

    def fault(self, name: str, message: str) -> ModelError:
        """The error to raise about a key."""
        return self._metadata.fault(self._key(name), message)

    @property
    def num_layers(self) -> int:
        """How many layers the model has."""
        return self.integer("block_count", 1, 1024)

    def is_one_of(self, name: str, values: tuple[object, ...]) -> bool:
        """Whether the key holds one of these, none of which is an array."""
        return self._metadata.is_one_of(self._key(name), values)

    def shown(self, name: str) -> str:
        """The value in at most 80 characters."""
        return self._metadata.shown(self._key(name))

    def optional_text(self, name: str) -> str | None:
        """A string."""
        return self._metadata.optional_text(self._key(name))

    def integer(self, name: str, low: int, high: int) -> int:
        """An integer from `low` to `high`."""
        return self._metadata.integer(self._key(name), low, high)

    def optional_integer(self, name: str, low: int, high: int) -> int | None:
        """An integer from `low` to `high`."""
        return self._metadata.optional_integer(self._key(name), low, high)

    def number(self, name: str, low: float, high: float) -> float:
        """A finite number from `low` to `high`."""
        return as_written(self._metadata.number(self._key(name), low, high))

    def optional_number(self, name: str, low: float, high: float) -> float | None:
        """A finite number from `low` to `high`."""
        return self.number(name, low, high) if name in self else None

    def same_in_every_layer(self, name: str, low: int, high: int) -> int:
        """An integer, given once or as one for each layer, which must be equal."""
        if not self._metadata.is_array(self._key(name)):
            return self.integer(name, low, high)
        self._check_layers(name)
        values = self._metadata.integers(self._key(name), low, high)
        if len(set(values)) > 1:
            raise self.fault(name, "differs from layer to layer, which is not supported")
        return values[0]

    def flags(self, name: str) -> tuple[bool, ...] | None:
        """An array of one true or false for each layer; None where the value is no array."""
        if not self._metadata.is_array(self._key(name)):
            return None
        self._check_layers(name)
        return self._metadata.flags(self._key(name))

    def floats_of(self, located: Located, count: int, low: float, high: float) -> tuple[float, ...]:
        """The elements of a small float32 vector."""
        info = located.info
        path = located.file.path
        if info.encoding.name != "f32" or info.shape != (count,):
            found = f"{info.encoding.name} {list(info.shape)}"
            raise ModelError(f"{path}: tensor '{info.name}': expected f32 [{count}], found {found}")
        data = bytearray(info.num_bytes)
        located.file.read_into(info, 0, memoryview(data))
        values: tuple[float, ...] = struct.unpack(f"<{count}f", data)
        if not all(low <= value <= high for value in values):
            raise ModelError(f"{path}: tensor '{info.name}': expected numbers from {low:g} to {high:g}")
        return values

    def _check_layers(self, name: str) -> None:
        self._metadata.check_count(self._key(name), self.num_layers, self.num_layers, "layers")

    def _key(self, name: str) -> str:
        return f"{self.architecture}.{name}"


def as_written(value: float) -> float:
    """The number that a float32 was made from: its shortest decimal. What config.json calls 1e-6 is 1e-6 again."""
    try:
        single = struct.pack("<f", value)
    except OverflowError:
        return value
    if struct.unpack("<f", single)[0] != value:
        return value  # a float64
    candidates = (float(f"{value:.{digits}g}") for digits in range(1, 10))
    return next(short for short in candidates if struct.pack("<f", short) == single)
