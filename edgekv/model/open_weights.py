"""The weights at a path, whatever kind of file they are in. Runs in: anywhere (no torch); owns: nothing."""

from contextlib import ExitStack
from pathlib import Path

from edgekv.config.model_path import gguf_at
from edgekv.model.checkpoint import Checkpoint
from edgekv.model.stored import StoredTensors


def open_weights(path: Path) -> StoredTensors:
    """A folder of safetensors files (AWQ's and GPTQ's too), or a GGUF file; raises ModelError for what it finds wrong.

    Whoever asks closes it.
    """
    file = gguf_at(path)
    if file is None:
        return Checkpoint(path)
    from edgekv.formats.gguf_checkpoint import GgufCheckpoint
    from edgekv.model.gguf_tensors import GgufTensors

    with ExitStack() as opening:
        tensors = GgufTensors(opening.enter_context(GgufCheckpoint(file)))
        opening.pop_all()
        return tensors
