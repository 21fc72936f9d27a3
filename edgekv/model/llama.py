"""Llama 2 and 3 (arXiv:2307.09288, arXiv:2407.21783).

Runs in: engine thread; owns: the weights of one model.
"""

from torch import Tensor

from edgekv.kernels.attn.interface import Attention
from edgekv.model.causal_lm import CausalLM
from edgekv.model.layers import GatedMLP, RMSNorm, SelfAttention
from edgekv.model.rope import Rotation
from edgekv.model.spec import ModelSpec
from edgekv.model.weights import WeightSource


class LlamaLayer:
    """Norm, attention, add; norm, MLP, add."""

    def __init__(self, spec: ModelSpec, weights: WeightSource, layer: int, prefix: str) -> None:
        size, eps = spec.hidden_size, spec.rms_norm_eps
        self._attention_norm = RMSNorm(weights, f"{prefix}.input_layernorm.weight", size, eps)
        self._attention = SelfAttention(spec, weights, layer, f"{prefix}.self_attn")
        self._mlp_norm = RMSNorm(weights, f"{prefix}.post_attention_layernorm.weight", size, eps)
        self._mlp = GatedMLP(spec, weights, f"{prefix}.mlp")

    def __call__(self, hidden: Tensor, rotation: Rotation, attention: Attention) -> Tensor:
        """`hidden` [tokens, hidden_size] in and out."""
        hidden = hidden + self._attention(self._attention_norm(hidden), rotation, attention)
        return hidden + self._mlp(self._mlp_norm(hidden))


class LlamaForCausalLM(CausalLM):
    """Llama."""

    def make_layer(self, weights: WeightSource, layer: int, prefix: str) -> LlamaLayer:
        """A Llama layer."""
        return LlamaLayer(self.spec, weights, layer, prefix)
