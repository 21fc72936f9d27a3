"""What a model asks of a checkpoint, compared with what that holds: every name, shape and kind, and nothing left over.

Runs in: anywhere (no torch); owns: nothing.
"""

import re

from edgekv.errors import ModelError
from edgekv.model.stored import StoredTensor, StoredTensors

Shape = tuple[int, ...]

# Tables that old transformers versions saved and that are computed from the config.
_HARMLESS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


class AskedTensors:
    """The tensors of one model; `names` are those that were asked for."""

    def __init__(self, stored: StoredTensors) -> None:
        self.stored = stored
        self.names: set[str] = set()
        self.num_bytes = 0

    def find(self, name: str, shape: Shape) -> StoredTensor:
        """The tensor; its stored bytes are added to `num_bytes`. Raises ModelError where it is missing or not so."""
        tensor = self.stored.tensors.get(name)
        if tensor is None:
            raise ModelError(f"{self.stored.source}: tensor '{name}': is missing")
        if tensor.shape != shape:
            told = "its metadata" if tensor.path.suffix == ".gguf" else "config.json"
            raise _fault(tensor, f"has shape {list(tensor.shape)}, but {told} asks for {list(shape)}")
        if len(shape) == 1 and not tensor.encoding.is_float:
            raise _fault(tensor, f"is a vector in {tensor.encoding.name}, which only matrices can be")
        self.names.add(name)
        self.num_bytes += tensor.num_bytes
        return tensor

    def refuse_leftovers(self, *, tied_head: bool) -> None:
        """Raises ModelError for a tensor that nobody asked for: the config does not describe this checkpoint."""
        for name, tensor in self.stored.tensors.items():
            if name in self.names or _HARMLESS.fullmatch(name) or (tied_head and name == "lm_head.weight"):
                continue
            if not self._is_empty_bias(name, tensor):
                raise _fault(tensor, "is not part of the model in config.json")

    def _is_empty_bias(self, name: str, tensor: StoredTensor) -> bool:
        """GPTQ's tools write biases of zeros for layers that have none."""
        weight = f"{name.removesuffix('.bias')}.weight"
        if weight not in self.names or tensor.shape != self.stored.tensors[weight].shape[:1]:
            return False
        content = bytearray(tensor.num_bytes)
        tensor.read_rows(0, memoryview(content))
        return not any(content)


def _fault(tensor: StoredTensor, message: str) -> ModelError:
    return ModelError(f"{tensor.path}: tensor '{tensor.name}': {message}")
