"""From a model folder to a model that runs: check everything, then read the weights once.

Runs in: the thread that loads; owns: nothing after it returns.
"""

from contextlib import closing
from pathlib import Path

import torch

from edgekv.model.causal_lm import CausalLM
from edgekv.model.gemma2 import Gemma2ForCausalLM
from edgekv.model.gemma3 import Gemma3ForCausalLM
from edgekv.model.hf_config import read_spec
from edgekv.model.llama import LlamaForCausalLM
from edgekv.model.mistral import MistralForCausalLM
from edgekv.model.open_weights import open_weights
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


def load_model(path: Path, *, dtype: torch.dtype, device: torch.device, progress: Progress | None = None) -> CausalLM:
    """The model at `path`, a folder or a GGUF file, its weights converted to `dtype` on `device`.

    Names, shapes and sizes of all tensors are proved before anything is allocated. Peak memory is the model plus a
    chunk of 16 MiB, a few times that where it is quantised. `progress(bytes done, bytes total, stage)` is called from
    this thread after every chunk; the total is 0 while files are checked. What it raises ends the load.

    Raises ModelError naming the file and the tensor or field.
    """
    tell = progress or (lambda done, total, stage: None)
    spec = read_spec(path)
    architecture = ARCHITECTURES[spec.architecture]
    tell(0, 0, "checking files")
    with closing(open_weights(path)) as stored:
        declared = DeclaredWeights(stored)
        architecture(spec, declared)
        declared.asked.refuse_leftovers(tied_head=spec.tie_word_embeddings)
        num_bytes = declared.asked.num_bytes
        tell(0, num_bytes, "reading weights")
        return architecture(
            spec, StoredWeights(stored, dtype=dtype, device=device, total_bytes=num_bytes, progress=tell)
        )
