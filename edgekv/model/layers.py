"""The parts that all architectures are made of.

Runs in: engine thread; owns: the weights. Each part asks a WeightSource for its tensors by their name in the
checkpoint, so that a model's constructor is the list of what its files must hold.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekv.kernels.attn.interface import Attention
from edgekv.model.rope import Rotation
from edgekv.model.spec import Activation, ModelSpec
from edgekv.model.weights import WeightSource


class RMSNorm:
    """x / rms(x) · weight over the last dimension, the root mean square in float32."""

    def __init__(self, weights: WeightSource, name: str, size: int, eps: float) -> None:
        self.weight, self._eps = weights.stacked((name,), ((size,),)), eps

    def __call__(self, x: Tensor) -> Tensor:
        """Of any shape that ends in `size`."""
        return F.rms_norm(x.float(), x.shape[-1:], None, self._eps).to(x.dtype).mul_(self.weight)


class UnitOffsetRMSNorm:
    """Gemma's: the weight is stored less one, and applied in float32 before rounding to the model's dtype."""

    def __init__(self, weights: WeightSource, name: str, size: int, eps: float) -> None:
        self.weight, self._eps = weights.stacked((name,), ((size,),)).float() + 1.0, eps

    def __call__(self, x: Tensor) -> Tensor:
        """Of any shape that ends in `size`."""
        return F.rms_norm(x.float(), x.shape[-1:], self.weight, self._eps).to(x.dtype)


Norm = RMSNorm | UnitOffsetRMSNorm


class Linear:
    """x @ weight.T + bias; several matrices of the checkpoint that read the same x are stacked into one."""

    def __init__(
        self, weights: WeightSource, names: tuple[str, ...], rows: tuple[int, ...], columns: int, *, bias: bool
    ) -> None:
        self.weight = weights.stacked([f"{name}.weight" for name in names], [(count, columns) for count in rows])
        self.bias = weights.stacked([f"{name}.bias" for name in names], [(count,) for count in rows]) if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        """`x` [tokens, columns] to [tokens, sum of rows]."""
        return F.linear(x, self.weight, self.bias)


class GatedMLP:
    """down(act(gate(x)) · up(x)), gate and up as one GEMM (arXiv:2002.05202)."""

    def __init__(self, spec: ModelSpec, weights: WeightSource, prefix: str) -> None:
        hidden, inner = spec.hidden_size, spec.intermediate_size
        names = (f"{prefix}.gate_proj", f"{prefix}.up_proj")
        self._gate_up = Linear(weights, names, (inner, inner), hidden, bias=spec.mlp_bias)
        self._down = Linear(weights, (f"{prefix}.down_proj",), (hidden,), inner, bias=spec.mlp_bias)
        self._activation: Activation = spec.activation

    def __call__(self, x: Tensor) -> Tensor:
        """`x` [tokens, hidden_size] in and out."""
        gate, up = self._gate_up(x).chunk(2, -1)
        gate = F.silu(gate) if self._activation == "silu" else F.gelu(gate, approximate="tanh")
        return self._down(gate.mul_(up))


class SelfAttention:
    """Projections, positions and the cache of one layer; q, k and v are one GEMM and one rotation.

    `norm` is the kind of RMSNorm put over each head of q and k before RoPE, where the spec has it.
    """

    def __init__(
        self, spec: ModelSpec, weights: WeightSource, layer: int, prefix: str, norm: type[Norm] = RMSNorm
    ) -> None:
        heads, kv_heads, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        names = (f"{prefix}.q_proj", f"{prefix}.k_proj", f"{prefix}.v_proj")
        rows = (heads * dim, kv_heads * dim, kv_heads * dim)
        self._qkv = Linear(weights, names, rows, spec.hidden_size, bias=spec.qkv_bias)
        self._out = Linear(weights, (f"{prefix}.o_proj",), (spec.hidden_size,), heads * dim, bias=spec.output_bias)
        self._qk_norms: tuple[Norm, Norm] | None = None
        if spec.qk_norm:
            self._qk_norms = (
                norm(weights, f"{prefix}.q_norm.weight", dim, spec.rms_norm_eps),
                norm(weights, f"{prefix}.k_norm.weight", dim, spec.rms_norm_eps),
            )
        self._layer, self._heads, self._kv_heads, self._dim = layer, heads, kv_heads, dim
        self._scale, self._window, self._softcap = spec.attention_scale, spec.windows[layer], spec.attention_softcap

    def __call__(self, x: Tensor, rotation: Rotation, attention: Attention) -> Tensor:
        """`x` [tokens, hidden_size] in and out; q, k and v reach `attention` as strided views of one tensor."""
        heads, rotated = self._heads, self._heads + self._kv_heads
        qkv = self._qkv(x).view(x.shape[0], -1, self._dim)  # [tokens, heads + 2 · kv_heads, head_dim]
        qk, v = qkv[:, :rotated], qkv[:, rotated:]
        if self._qk_norms is not None:
            q_norm, k_norm = self._qk_norms
            qk = torch.cat((q_norm(qk[:, :heads]), k_norm(qk[:, heads:])), 1)
        qk = rotation.apply(qk)
        attended = attention(
            self._layer, qk[:, :heads], qk[:, heads:], v, scale=self._scale, window=self._window, softcap=self._softcap
        )  # [tokens, heads, head_dim]
        return self._out(attended.reshape(x.shape[0], -1))
