"""Tiny AWQ and GPTQ checkpoints, packed here value by value as the formats are published, and what they mean.

AWQ: awq/modules/linear/gemm.py of AutoAWQ. GPTQ: auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py of AutoGPTQ.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.model.tiny_models import edit_config, make_tiny

SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Quantised:
    """One layer's integers: q [outputs, inputs], zero and scale [outputs, groups]."""

    q: npt.NDArray[np.int64]
    zero: npt.NDArray[np.int64]
    scale: Tensor
    group: int

    @property
    def weight(self) -> Tensor:
        """What they mean, float32 [outputs, inputs]."""
        centred = self.q - np.repeat(self.zero, self.group, 1)
        return torch.from_numpy(centred).float() * self.scale.float().repeat_interleave(self.group, 1)


def quantised(weight: Tensor, group: int, *, symmetric: bool, scale_dtype: torch.dtype = torch.float16) -> Quantised:
    """Round to the nearest of 16 values between each group's ends (or around zero)."""
    rows, cols = weight.shape
    group = cols if group == -1 else group
    grouped = weight.float().view(rows, cols // group, group)
    low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
    if symmetric:
        scale = (grouped.abs().amax(2) / 7).to(scale_dtype)
        zero = torch.full_like(low, 8)
    else:
        scale = ((high - low) / 15).to(scale_dtype)
        zero = (-low / scale.float()).round().clamp(0, 15)
    q = (grouped / scale.float()[..., None] + zero[..., None]).round().clamp(0, 15).view(rows, cols)
    return Quantised(q.long().numpy(), zero.long().numpy(), scale, group)


def packed(values: npt.NDArray[np.int64], order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """The last dimension, 8 values to an int32; value i of one is the order[i]-th of eight."""
    eights = values.reshape(*values.shape[:-1], -1, 8)
    words = np.zeros(eights.shape[:-1], np.uint32)
    for place, column in enumerate(order):
        words |= (eights[..., column].astype(np.uint32) & 15) << np.uint32(4 * place)
    return torch.from_numpy(words.view(np.int32).copy())


def awq_parts(layer: Quantised) -> dict[str, Tensor]:
    return {
        "qweight": packed(np.ascontiguousarray(layer.q.T), AWQ_ORDER),
        "qzeros": packed(np.ascontiguousarray(layer.zero.T), AWQ_ORDER),
        "scales": layer.scale.T.contiguous(),
    }


def gptq_parts(layer: Quantised, *, version: int = 1) -> dict[str, Tensor]:
    zero = np.ascontiguousarray(layer.zero.T)
    inputs = layer.q.shape[1]
    return {
        "qweight": packed(layer.q).T.contiguous(),
        "qzeros": packed(zero - 1 if version == 1 else zero),
        "scales": layer.scale.T.contiguous(),
        "g_idx": (torch.arange(inputs) // layer.group).int(),
    }


def quantise_folder(
    plain: Path, method: str, group: int, *, symmetric: bool = False, version: int = 1, **config: Any
) -> tuple[Path, Path]:
    """Copies of the model in `plain`: quantised, and with the weights that the quantised one means."""
    made, meant = plain.with_name(f"{plain.name}-{method}"), plain.with_name(f"{plain.name}-meant")
    for folder in (made, meant):
        shutil.copytree(plain, folder)
    tensors = load_file(plain / "model.safetensors")
    of_made, of_meant = {}, {}
    for name, tensor in tensors.items():
        of_made[name] = of_meant[name] = tensor
        if name.endswith("_proj.weight"):
            layer = quantised(tensor, group, symmetric=symmetric)
            parts = awq_parts(layer) if method == "awq" else gptq_parts(layer, version=version)
            del of_made[name]
            of_made |= {name.replace("weight", part): each for part, each in parts.items()}
            of_meant[name] = layer.weight
    save_file(of_made, made / "model.safetensors")
    save_file(of_meant, meant / "model.safetensors")
    told: dict[str, Any] = {"quant_method": method, "bits": 4, "group_size": group}
    if method == "awq":
        told |= {"version": "gemm", "zero_point": not symmetric, "modules_to_not_convert": None}
    else:
        told |= {"sym": symmetric, "desc_act": False, "checkpoint_format": "gptq_v2" if version == 2 else "gptq"}
    edit_config(made, quantization_config=told | config)
    return made, meant


def make_quantised(folder: Path, method: str, group: int, **changes: Any) -> tuple[Path, Path]:
    """A tiny Llama of sizes that groups of up to 128 divide, quantised; and what it means, in float32."""
    return quantise_folder(make_tiny("llama", folder / "plain", **SHAPE), method, group, **changes)
