"""What every architecture shares: embedding in, decoder layers, final norm and output head out.

Runs in: engine thread; owns: the weights of one model.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekv.kernels.attn.interface import Attention
from edgekv.model.layers import Norm, RMSNorm
from edgekv.model.rope import RotaryEmbedding, Rotation
from edgekv.model.spec import ModelSpec
from edgekv.model.weights import WeightSource


class DecoderLayer(Protocol):
    """One layer of one architecture."""

    def __call__(self, hidden: Tensor, rotation: Rotation, attention: Attention) -> Tensor:
        """`hidden` [tokens, hidden_size] in and out."""
        ...


class CausalLM:
    """A decoder-only model. An architecture says what a layer is (`make_layer`), its norm and how it embeds."""

    norm: type[Norm] = RMSNorm

    def __init__(self, spec: ModelSpec, weights: WeightSource) -> None:
        """Asks `weights` for every tensor of the model, and raises what it raises."""
        self.spec = spec
        size = (spec.vocab_size, spec.hidden_size)
        self._embedding = weights.stacked(("model.embed_tokens.weight",), (size,))
        self._layers = [self.make_layer(weights, layer, f"model.layers.{layer}") for layer in range(spec.num_layers)]
        self._final_norm = self.norm(weights, "model.norm.weight", spec.hidden_size, spec.rms_norm_eps)
        self._head = self._embedding if spec.tie_word_embeddings else weights.stacked(("lm_head.weight",), (size,))
        self._rotary = {rope: RotaryEmbedding(rope, spec.head_dim, self.device) for rope in set(spec.ropes)}

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights and of everything between the layers."""
        return self._embedding.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are; `forward` wants its tensors there."""
        return self._embedding.device

    def make_layer(self, weights: WeightSource, layer: int, prefix: str) -> DecoderLayer:
        """The decoder layer whose tensors' names start with `prefix`."""
        raise NotImplementedError

    def embed(self, token_ids: Tensor) -> Tensor:
        """The input of the first layer, [tokens, hidden_size]."""
        return F.embedding(token_ids, self._embedding)

    @torch.inference_mode()
    def forward(self, token_ids: Tensor, positions: Tensor, attention: Attention, sample_rows: Tensor) -> Tensor:
        """Run one step's ragged batch.

        `token_ids` and `positions` [tokens] int64 are those of all chunks laid end to end; `sample_rows` [rows] int64
        are the rows whose logits are wanted, and only these pass the final norm and the head. Answers
        [rows, vocab_size] float32, an inference tensor: outside `torch.inference_mode` it cannot be changed in place.
        """
        rotations = {rope: rotary.at(positions) for rope, rotary in self._rotary.items()}
        hidden = self.embed(token_ids)
        for layer, rope in zip(self._layers, self.spec.ropes, strict=True):
            hidden = layer(hidden, rotations[rope], attention)
        logits = F.linear(self._final_norm(hidden.index_select(0, sample_rows)), self._head).float()
        cap = self.spec.final_softcap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)
