"""A Llama to train: the same shapes and tensor names as ``LlamaForCausalLM`` in Hugging Face transformers.

Runs in: the training process; owns: the parameters. Written here in a hundred lines so that the training
recipe has no hidden part; ``export.py`` writes its ``state_dict`` and transformers reads it unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class LlamaShape:
    """The sizes of one model, under their names in ``config.json``."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5


def rope_tables(shape: LlamaShape, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines for positions 0..length-1, each [length, head_dim]; arXiv:2104.09864, half-split form."""
    inverse = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2).float() / shape.head_dim)
    angles = torch.outer(torch.arange(length).float(), inverse)
    angles = torch.cat([angles, angles], dim=1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions to ``x`` [batch, heads, length, head_dim]."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learnt scale, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.shape = shape
        hidden, dim = shape.hidden_size, shape.head_dim
        self.q_proj = nn.Linear(hidden, shape.num_attention_heads * dim, bias=False)
        self.k_proj = nn.Linear(hidden, shape.num_key_value_heads * dim, bias=False)
        self.v_proj = nn.Linear(hidden, shape.num_key_value_heads * dim, bias=False)
        self.o_proj = nn.Linear(shape.num_attention_heads * dim, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape

        def heads(projection: nn.Linear) -> Tensor:
            y: Tensor = projection(x)
            return y.view(batch, length, -1, self.shape.head_dim).transpose(1, 2)

        q, k, v = heads(self.q_proj), heads(self.k_proj), heads(self.v_proj)  # [batch, heads, length, head_dim]
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        shared = self.shape.num_attention_heads // self.shape.num_key_value_heads
        k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.o_proj(y.transpose(1, 2).reshape(batch, length, -1))
        return out


class MLP(nn.Module):
    """The gated feed-forward part (SwiGLU)."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Body(nn.Module):
    """Embedding, layers and last norm; a class of its own so that tensor names start with ``model.``."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)


class Llama(nn.Module):
    """The whole model; the output matrix is the embedding (tied)."""

    def __init__(self, shape: LlamaShape, seed: int) -> None:
        super().__init__()
        self.shape = shape
        self.model = Body(shape)
        self._initialise(seed)

    def _initialise(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        residual_std = 0.02 / (2 * self.shape.num_hidden_layers) ** 0.5  # GPT-2's scaling of what adds up
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                continue
            into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(parameter, 0.0, residual_std if into_residual else 0.02, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [batch, length, vocab] for ``tokens`` [batch, length]."""
        cos, sin = rope_tables(self.shape, tokens.shape[1])
        x = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)

    def num_parameters(self) -> int:
        """How many numbers are stored on disk (the tied output matrix counts once)."""
        return sum(p.numel() for p in self.parameters())
