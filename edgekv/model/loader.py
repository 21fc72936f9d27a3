"""From a model folder to a model that runs: check everything, then read the weights once.

Runs in: the thread that loads; owns: nothing after it returns.
"""

from pathlib import Path

import torch

from edgekv.model.causal_lm import CausalLM
from edgekv.model.checkpoint import Checkpoint
from edgekv.model.gemma2 import Gemma2ForCausalLM
from edgekv.model.gemma3 import Gemma3ForCausalLM
from edgekv.model.hf_config import read_spec
from edgekv.model.llama import LlamaForCausalLM
from edgekv.model.mistral import MistralForCausalLM
from edgekv.model.qwen2 import Qwen2ForCausalLM
from edgekv.model.qwen3 import Qwen3ForCausalLM
from edgekv.model.weights import DeclaredWeights, Progress, StoredWeights

ARCHITECTURES: dict[str, type[CausalLM]] = {
    "LlamaForCausalLM": LlamaForCausalLM,
    "MistralForCausalLM": MistralForCausalLM,
    "Qwen2ForCausalLM": Qwen2ForCausalLM,
    "Qwen3ForCausalLM": Qwen3ForCausalLM,
    "Gemma2ForCausalLM": Gemma2ForCausalLM,
    "Gemma3ForCausalLM": Gemma3ForCausalLM,
}


def load_model(folder: Path, *, dtype: torch.dtype, device: torch.device, progress: Progress | None = None) -> CausalLM:
    """The model in `folder`, its weights converted to `dtype` on `device`.

    Names, shapes and sizes of all tensors are proved before anything is allocated. Peak memory is the model plus one
    chunk of 16 MiB. `progress(bytes done, bytes total, stage)` is called from this thread after every chunk; the total
    is 0 while files are checked. What it raises ends the load.

    Raises ModelError naming the file and the tensor or field.
    """
    tell = progress or (lambda done, total, stage: None)
    spec = read_spec(folder)
    architecture = ARCHITECTURES[spec.architecture]
    tell(0, 0, "checking files")
    with Checkpoint(folder) as checkpoint:
        declared = DeclaredWeights(checkpoint)
        architecture(spec, declared)
        declared.refuse_leftovers(tied_head=spec.tie_word_embeddings)
        tell(0, declared.num_bytes, "reading weights")
        stored = StoredWeights(checkpoint, dtype=dtype, device=device, total_bytes=declared.num_bytes, progress=tell)
        return architecture(spec, stored)
