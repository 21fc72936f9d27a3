"""Gemma 2 (arXiv:2408.00118): norms on both sides of attention and MLP, soft-caps, a window in every other layer.

Runs in: engine thread; owns: the weights of one model.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekv.kernels.attn.interface import Attention
from edgekv.model.causal_lm import CausalLM
from edgekv.model.layers import GatedMLP, SelfAttention, UnitOffsetRMSNorm
from edgekv.model.rope import Rotation
from edgekv.model.spec import ModelSpec
from edgekv.model.weights import WeightSource


class GemmaLayer:
    """Norm, attention, norm, add; norm, MLP, norm, add."""

    def __init__(self, spec: ModelSpec, weights: WeightSource, layer: int, prefix: str) -> None:
        def norm(name: str) -> UnitOffsetRMSNorm:
            return UnitOffsetRMSNorm(weights, f"{prefix}.{name}.weight", spec.hidden_size, spec.rms_norm_eps)

        self._attention = SelfAttention(spec, weights, layer, f"{prefix}.self_attn", norm=UnitOffsetRMSNorm)
        self._mlp = GatedMLP(spec, weights, f"{prefix}.mlp")
        self._before_attention = norm("input_layernorm")
        self._after_attention = norm("post_attention_layernorm")
        self._before_mlp = norm("pre_feedforward_layernorm")
        self._after_mlp = norm("post_feedforward_layernorm")

    def __call__(self, hidden: Tensor, rotation: Rotation, attention: Attention) -> Tensor:
        """`hidden` [tokens, hidden_size] in and out."""
        attended = self._attention(self._before_attention(hidden), rotation, attention)
        hidden = hidden + self._after_attention(attended)
        return hidden + self._after_mlp(self._mlp(self._before_mlp(hidden)))


class Gemma2ForCausalLM(CausalLM):
    """Gemma 2."""

    norm = UnitOffsetRMSNorm

    def make_layer(self, weights: WeightSource, layer: int, prefix: str) -> GemmaLayer:
        """A Gemma layer."""
        return GemmaLayer(self.spec, weights, layer, prefix)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Embeddings times √hidden_size, the factor rounded to the model's dtype as in training."""
        scale = float(torch.tensor(math.sqrt(self.spec.hidden_size), dtype=self.dtype))
        return F.embedding(token_ids, self._embedding) * scale
