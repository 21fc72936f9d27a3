"""Write a trained model as a Hugging Face folder.

Runs in: the training process; owns: the files of one folder. The same weights give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .corpus import IM_END
from .model import Llama
from .tokenizer import BOS, BOS_ID, EOS_ID, IM_END_ID, SPECIALS, UNK, write_tokenizer

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def config(model: Llama) -> dict[str, Any]:
    """The content of ``config.json``."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **asdict(model.shape),
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": BOS_ID,
        "eos_token_id": IM_END_ID,
        "torch_dtype": "bfloat16",
    }


def tokenizer_config(context: int) -> dict[str, Any]:
    """The content of ``tokenizer_config.json``, chat template included."""
    flags = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": IM_END,
        "unk_token": UNK,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        "chat_template": CHAT_TEMPLATE,
        "added_tokens_decoder": {str(i): {"content": token, **flags} for i, token in enumerate(SPECIALS)},
    }


def save_weights(model: Llama, path: Path) -> None:
    """The weights in bfloat16, under the names transformers knows."""
    weights = {name: p.detach().to(torch.bfloat16).contiguous() for name, p in model.named_parameters()}
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(0o644)  # save_file leaves it to its owner alone


def load_weights(model: Llama, path: Path) -> None:
    """Put what ``save_weights`` wrote back into ``model``."""
    for name, tensor in load_file(path).items():
        model.get_parameter(name).data.copy_(tensor)


def export(model: Llama, tokenizer: bytes, folder: Path) -> None:
    """Everything transformers, vLLM or edgekv need to serve ``model``."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", config(model))
    _write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": BOS_ID,
            "eos_token_id": [IM_END_ID, EOS_ID],
            "do_sample": True,
            "temperature": 0.7,
            "top_p": 0.9,
        },
    )
    _write_json(folder / "tokenizer_config.json", tokenizer_config(model.shape.max_position_embeddings))
    _write_json(folder / "special_tokens_map.json", {"bos_token": BOS, "eos_token": IM_END, "unk_token": UNK})
    write_tokenizer(tokenizer, folder)
    save_weights(model, folder / "model.safetensors")


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def manifest(root: Path) -> str:
    """Lines for ``sha256sum --check`` run in ``root``."""
    files = sorted(path for name in ("target", "draft") for path in (root / name).iterdir())
    return "".join(f"{sha256(path)}  {path.relative_to(root).as_posix()}\n" for path in files)
