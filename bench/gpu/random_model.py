"""A model of random weights on the card: the shape of a real one, and no file. Text means nothing, speed does.

Runs in: the main thread; owns: the weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bench.gpu.bench import Bench
from bench.gpu.weights import random_plain, random_planes
from edgekv.core.dtype_choice import DtypeName
from edgekv.engine.card_model import CardModel
from edgekv.kernels.quant.encodings import BF16, F16, Q4_K, Q6_K, Encoding
from edgekv.model.card_layout import lay_out_on_card
from edgekv.model.card_matrices import Allocate, CardMatrix, CardRows
from edgekv.model.lowering import lower
from edgekv.model.matrix_layout import HEAD
from edgekv.model.packed_weights import Shape, Vector
from edgekv.model.spec import ModelSpec, RopeSpec

_DTYPES: dict[DtypeName, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Made:
    """What is measured as a whole: its shape, and whether its weights have four bits."""

    title: str
    spec: ModelSpec
    is_quantised: bool


def llama(
    *, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, dim: int, vocab: int, tied: bool
) -> ModelSpec:
    """Of Llama's architecture."""
    return ModelSpec(
        architecture="LlamaForCausalLM", vocab_size=vocab, hidden_size=hidden, intermediate_size=inner,
        num_layers=layers, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, max_position_embeddings=131072,
        windows=(None,) * layers, ropes=(RopeSpec(500_000.0),) * layers, rms_norm_eps=1e-5,
        attention_scale=dim**-0.5, tie_word_embeddings=tied, dtype="bfloat16",
    )  # fmt: skip


def models(bench: Bench) -> tuple[Made, ...]:
    """Llama-3.2-1B in 16 bits, and Llama-3.1-8B in four; on fibers two that are tiny."""
    if not bench.rig.is_real:
        tiny = llama(hidden=64, inner=256, layers=2, heads=2, kv_heads=1, dim=32, vocab=256, tied=True)
        wide = llama(hidden=256, inner=256, layers=1, heads=4, kv_heads=2, dim=64, vocab=256, tied=False)
        return Made("tiny", tiny, False), Made("tiny, q4_K", wide, True)
    one = llama(hidden=2048, inner=8192, layers=16, heads=32, kv_heads=8, dim=64, vocab=128256, tied=True)
    eight = llama(hidden=4096, inner=14336, layers=32, heads=32, kv_heads=8, dim=128, vocab=128256, tied=False)
    return Made("Llama-3.2-1B, 16 bits", one, False), Made("Llama-3.1-8B, q4_K, head q6_K", eight, True)


def make_model(bench: Bench, made: Made) -> CardModel:
    """On the card. Raises NotMeasured where there is no room, torch's out of memory where others were quicker."""
    name: DtypeName = "bfloat16" if bench.rig.card.has_bf16_units else "float16"
    bits = 5 if made.is_quantised else 16
    bench.need(made.spec.num_parameters * bits // 8 + (1 << 30))
    source = _RandomMatrices(bench.rig.card.allocate, name, is_quantised=made.is_quantised)
    return CardModel(lower(made.spec, source), name, bench.rig.card.allocate)


class _RandomMatrices:
    """A `MatrixSource` that needs no file."""

    def __init__(self, allocate: Allocate, dtype: DtypeName, *, is_quantised: bool) -> None:
        self._allocate, self._dtype, self._is_quantised = allocate, dtype, is_quantised

    def matrix(self, names: Sequence[str], shapes: Sequence[Shape], *, gated: bool = False) -> CardMatrix:
        """Parts as a file's would be laid out."""
        encodings = [self._encoding(name) for name in names]
        rows = []
        for part in lay_out_on_card(names, encodings, shapes, self._dtype, gated=gated):
            if part.encoding.is_float:
                plain = random_plain(_DTYPES[self._dtype], part.rows, part.cols, self._allocate)
                rows.append(CardRows(plain, None))
            else:
                rows.append(CardRows(None, random_planes(part.encoding, part.rows, part.cols, self._allocate)))
        return CardMatrix(tuple(rows), _DTYPES[self._dtype], gated)

    def vector(self, name: str, shape: Shape) -> Vector:
        """Of a norm, a copy of its own for each."""
        return np.ones(shape, np.float32)

    def bias(self, names: Sequence[str], shapes: Sequence[Shape], *, gated: bool = False) -> Vector:
        """Of nothing."""
        return np.zeros(sum(shape[0] for shape in shapes), np.float32)

    def _encoding(self, name: str) -> Encoding:
        if not self._is_quantised:
            return BF16 if self._dtype == "bfloat16" else F16
        return Q6_K if name == HEAD else Q4_K


def step_bytes(model: CardModel, contexts: Sequence[int], kv_token_bytes: int) -> int:
    """What a decode step has to read: every weight once, and every key and value of its contexts."""
    matrices = {
        id(each.op.matrix): each.op.matrix.num_bytes
        for each in model.operations
        if each.op.matrix is not None and (each.op.kind.name != "EMBED" or model.spec.tie_word_embeddings)
    }
    return sum(matrices.values()) + sum(contexts) * kv_token_bytes


def hf_config(spec: ModelSpec) -> dict[str, Any]:
    """The same shape for transformers' LlamaConfig."""
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "max_position_embeddings": spec.max_position_embeddings,
        "tie_word_embeddings": spec.tie_word_embeddings,
        "rms_norm_eps": spec.rms_norm_eps,
        "eos_token_id": None,
        "bos_token_id": None,
    }

