"""Whether a checkpoint is quantised as it is, told from its headers.

Runs in: anywhere (no torch, no numpy); owns: nothing.
"""

from pathlib import Path

from edgekv.config.model_path import gguf_at
from edgekv.formats.gguf_checkpoint import GgufCheckpoint
from edgekv.model.quantised_config import folder_quantisation


def quantised_before(path: Path) -> str | None:
    """To what, for people; None for a model of plain numbers. Raises ModelError."""
    file = gguf_at(path)
    if file is None:
        quantisation = folder_quantisation(path)
        return None if quantisation is None else quantisation.title
    with GgufCheckpoint(file) as checkpoint:
        kinds: dict[str, int] = {}
        for located in checkpoint.tensors.values():
            encoding = located.info.encoding
            if not encoding.is_float:
                kinds[encoding.name] = kinds.get(encoding.name, 0) + located.info.num_bytes
        return max(kinds, key=lambda name: kinds[name], default=None)
