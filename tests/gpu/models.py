"""Random models as Hugging Face folders, one per architecture, made without transformers (which may read them)."""

import json
import struct
from pathlib import Path
from typing import Any

import torch

from edgekv.model.hf_config import read_spec
from edgekv.model.spec import ModelSpec
from edgekv.model.weight_names import weight_names

TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "vocab_size": 199,
}
# Of the shapes that real models have, but few and small matrices.
SMALL: dict[str, Any] = TINY | {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "vocab_size": 8000,
}
_WINDOW = 24
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip
_YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 256}
_GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
_GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 40, "sliding_window": _WINDOW}
# The class, transformers' name for the type, and what is the architecture's own.
_OWN: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3": ("LlamaForCausalLM", "llama", {"tie_word_embeddings": True, "rope_parameters": _LLAMA3}),
    "mistral": ("MistralForCausalLM", "mistral", {"sliding_window": _WINDOW}),
    "qwen2": (
        "Qwen2ForCausalLM", "qwen2",
        {
            "use_sliding_window": True, "sliding_window": _WINDOW, "max_window_layers": 1, "tie_word_embeddings": True,
            "rope_parameters": _YARN,
        },
    ),
    "qwen3": ("Qwen3ForCausalLM", "qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "gemma2": ("Gemma2ForCausalLM", "gemma2", _GEMMA | {"tie_word_embeddings": True}),
    "gemma3": (
        "Gemma3ForCausalLM", "gemma3_text",
        _GEMMA | {"num_hidden_layers": 7, "tie_word_embeddings": True, "rope_parameters": _GEMMA3_ROPE},
    ),
}  # fmt: skip
ARCHITECTURES = tuple(_OWN)


def make_model(arch: str, folder: Path, shape: dict[str, Any] = TINY, seed: int = 0) -> Path:
    """A model folder in float32, the same for the same arguments; the folder is answered."""
    name, kind, own = _OWN[arch]
    config = {"architectures": [name], "model_type": kind, "rms_norm_eps": 1e-5, "dtype": "float32"}
    config |= {"tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | shape | own, indent=1))
    spec = read_spec(folder)
    write_safetensors(folder / "model.safetensors", _weights(spec, seed))
    return folder


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Float32 tensors, one behind the other."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(tensor.contiguous().numpy().tobytes())


def _weights(spec: ModelSpec, seed: int) -> dict[str, torch.Tensor]:
    """Norms and biases are noise too: a forgotten one shows."""
    generator, made = torch.Generator().manual_seed(seed), {}
    width = 0.12 * (64 / spec.hidden_size) ** 0.5
    for asked in weight_names(spec):
        for name, shape in zip(asked.names, asked.shapes, strict=True):
            centre = 1.0 if asked.kind == "norm" and not spec.post_norms else 0.0
            own = width if len(shape) == 2 else 0.3
            made[name] = torch.randn(shape, generator=generator) * own + centre
    return made
