"""Tiny random models as Hugging Face folders, one per architecture, for every suite that needs real weights.

Their shapes are irregular on purpose (grouped heads, a head_dim that is not hidden / heads, windows shorter than a
prompt), and norms and biases are noise: transformers starts them at 1 and 0, where a forgotten one would not show.
"""

import json
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

_SHAPE: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
_YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 256}
_GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}

ARCHITECTURES = ("llama", "llama3", "mistral", "qwen2", "qwen3", "gemma2", "gemma3")


def make_tiny(
    arch: str,
    folder: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    vocab_size: int = 199,
    window: int = 64,
    max_shard_size: str = "1GB",
    **overrides: Any,
) -> Path:
    """Save a random model of `arch` in `folder` and answer it; the same arguments give the same weights.

    `arch` is one of ARCHITECTURES. `window` is the sliding window of those that have one. `overrides` are fields of
    the transformers configuration.
    """
    model: Any = tiny_model(arch, seed=seed, vocab_size=vocab_size, window=window, **overrides)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def tiny_model(
    arch: str, *, seed: int = 0, vocab_size: int = 199, window: int = 64, **overrides: Any
) -> PreTrainedModel:
    """The model that `make_tiny` saves, in float32."""
    config = tiny_config(arch, vocab_size=vocab_size, window=window, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cast(Any, AutoModelForCausalLM).from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    centre = 1.0 if "norm" in name and not arch.startswith("gemma") else 0.0
                    parameter.normal_(centre, 0.3)
                else:
                    parameter.normal_(0.0, 0.12)
    return cast(PreTrainedModel, model.eval())


def tiny_config(arch: str, *, vocab_size: int = 199, window: int = 64, **overrides: Any) -> PreTrainedConfig:
    """The configuration of `tiny_model`."""
    shape = {**_SHAPE, "vocab_size": vocab_size}

    def config(kind: type[PreTrainedConfig], **fields: Any) -> PreTrainedConfig:
        return kind(**{**shape, **fields, **overrides})

    match arch:
        case "llama":
            return config(LlamaConfig, rms_norm_eps=1e-5, attention_bias=True, mlp_bias=True)
        case "llama3":
            return config(LlamaConfig, head_dim=20, tie_word_embeddings=True, rope_parameters=dict(_LLAMA3))
        case "mistral":
            return config(MistralConfig, head_dim=10, sliding_window=window)
        case "qwen2":
            return config(
                Qwen2Config,
                use_sliding_window=True,
                sliding_window=window,
                max_window_layers=1,
                tie_word_embeddings=True,
                rope_parameters=dict(_YARN),
            )
        case "qwen3":
            return config(Qwen3Config, head_dim=16, num_key_value_heads=3, rope_parameters={"rope_theta": 1e6})
        case "gemma2":
            return config(Gemma2Config, head_dim=12, query_pre_attn_scalar=20, sliding_window=window)
        case "gemma3":
            return config(
                Gemma3TextConfig,
                head_dim=14,
                num_hidden_layers=7,
                query_pre_attn_scalar=20,
                sliding_window=window,
                rope_parameters={kind: dict(rope) for kind, rope in _GEMMA3_ROPE.items()},
            )
        case _:
            raise ValueError(f"no tiny model for {arch!r}: one of {', '.join(ARCHITECTURES)}")


def edit_config(folder: Path, **changes: Any) -> None:
    """Set fields of the folder's config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def to_old_style(folder: Path) -> None:
    """Rewrite config.json as transformers 4 would have: `rope_theta`, `rope_scaling`, `torch_dtype`."""
    config = json.loads((folder / "config.json").read_text())
    rope = config["rope_parameters"]
    changes: dict[str, Any] = {
        "rope_parameters": None,
        "dtype": None,
        "torch_dtype": config["dtype"],
        "layer_types": None,
    }
    if "full_attention" in rope:
        changes["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    changes["rope_theta"] = rope.pop("rope_theta")
    if (kind := rope.pop("rope_type")) != "default":
        # Both spellings are about; transformers reads Gemma 3 only with the younger one.
        spelling = "rope_type" if "rope_local_base_freq" in changes else "type"
        changes["rope_scaling"] = {spelling: kind, **rope}
    edit_config(folder, **changes)
