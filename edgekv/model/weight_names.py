"""The names and shapes of all weights of a model, without building it.

Runs in: anywhere (no torch, no numpy); owns: nothing. What the architectures' own code and the lowering for the native
kernels ask for, which tests hold against this: building a model takes torch, and is too slow a way to count bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from edgekv.model.asked_tensors import Shape
from edgekv.model.matrix_layout import EMBEDDING, HEAD
from edgekv.model.spec import ModelSpec

Kind = Literal["matrix", "gated", "norm", "bias"]


@dataclass(frozen=True, slots=True)
class Asked:
    """What one operation needs: the tensors of these names, one under the other."""

    kind: Kind
    names: tuple[str, ...]
    shapes: tuple[Shape, ...]


def weight_names(spec: ModelSpec) -> Iterator[Asked]:
    """All that the model needs, in the order in which it needs it; of a tied head nothing."""
    table = (spec.vocab_size, spec.hidden_size)
    yield Asked("matrix", (EMBEDDING,), (table,))
    for layer in range(spec.num_layers):
        yield from _layer(spec, f"model.layers.{layer}")
    yield _norm("model.norm", spec.hidden_size)
    if not spec.tie_word_embeddings:
        yield Asked("matrix", (HEAD,), (table,))


def _layer(spec: ModelSpec, prefix: str) -> Iterator[Asked]:
    hidden, inner, dim = spec.hidden_size, spec.intermediate_size, spec.head_dim
    heads, kv_heads = spec.num_heads * dim, spec.num_kv_heads * dim
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    outer = ["input_layernorm", "post_attention_layernorm"]
    if spec.post_norms:
        outer += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    for name in outer:
        yield _norm(f"{prefix}.{name}", hidden)
    if spec.qk_norm:
        yield _norm(f"{attention}.q_norm", dim)
        yield _norm(f"{attention}.k_norm", dim)
    qkv = tuple(f"{attention}.{name}_proj" for name in "qkv")
    yield from _linear("matrix", qkv, (heads, kv_heads, kv_heads), hidden, spec.qkv_bias)
    yield from _linear("matrix", (f"{attention}.o_proj",), (hidden,), heads, spec.output_bias)
    yield from _linear("gated", (f"{mlp}.gate_proj", f"{mlp}.up_proj"), (inner, inner), hidden, spec.mlp_bias)
    yield from _linear("matrix", (f"{mlp}.down_proj",), (hidden,), inner, spec.mlp_bias)


def _linear(kind: Kind, modules: tuple[str, ...], rows: tuple[int, ...], cols: int, bias: bool) -> Iterator[Asked]:
    yield Asked(kind, tuple(f"{module}.weight" for module in modules), tuple((count, cols) for count in rows))
    if bias:
        yield Asked("bias", tuple(f"{module}.bias" for module in modules), tuple((count,) for count in rows))


def _norm(module: str, size: int) -> Asked:
    return Asked("norm", (f"{module}.weight",), ((size,),))
