"""Which kernels the models that people run need, found out from their shapes: what a wheel brings compiled along.

No model is here: a shape, the encodings that its usual files have, and the cards' numbers of compute units are enough.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from edgekv.core.dtype_choice import DtypeName
from edgekv.core.kv_format import KVFormatName
from edgekv.engine.card_specs import kernels_of
from edgekv.kernels.quant.encodings import AFFINE4_128, BF16, F16, Q4_0, Q4_K, Q6_K, Q8_0, Encoding
from edgekv.kernels.rt.registry import KernelSpec
from edgekv.model.card_memory import CardLimits
from edgekv.model.matrix_layout import EMBEDDING, HEAD, WeightForm
from edgekv.model.spec import ModelSpec, RopeSpec
from edgekv.model.stored import StoredTensor
from edgekv.model.weight_names import weight_names
from edgekv.model.weight_table import TableEntry, WeightTable

LIMITS = CardLimits(step_tokens=512, sequences=16, context_blocks=512, proposed=16)
COMPUTE_UNITS = (32, 60, 96)  # RX 7600 and 9060, RX 7800 XT and 9070, RX 7900 XTX


@dataclass(frozen=True)
class Shape:
    """As in a model's config.json."""

    hidden: int
    inner: int
    heads: int
    kv_heads: int
    dim: int
    vocab: int
    tied: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    gemma: bool = False

    @property
    def spec(self) -> ModelSpec:
        """Of two layers: all of them are alike but the last."""
        rope = RopeSpec(10_000.0)
        return ModelSpec(
            architecture="Gemma2ForCausalLM" if self.gemma else "LlamaForCausalLM",
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_layers=2,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.dim,
            max_position_embeddings=8192,
            windows=(4096, None) if self.gemma else (None, None),
            ropes=(rope, rope),
            rms_norm_eps=1e-6,
            attention_scale=self.dim**-0.5,
            tie_word_embeddings=self.tied,
            dtype="bfloat16",
            activation="gelu_tanh" if self.gemma else "silu",
            qkv_bias=self.qkv_bias,
            qk_norm=self.qk_norm,
            post_norms=self.gemma,
            attention_softcap=50.0 if self.gemma else None,
            final_softcap=30.0 if self.gemma else None,
        )


SHAPES = (
    Shape(2048, 8192, 32, 8, 64, 128_256, tied=True),  # Llama 3.2 1B
    Shape(3072, 8192, 24, 8, 128, 128_256, tied=True),  # Llama 3.2 3B
    Shape(4096, 14336, 32, 8, 128, 128_256),  # Llama 3.1 8B; Mistral 7B but for its vocabulary
    Shape(1536, 8960, 12, 2, 128, 151_936, tied=True, qkv_bias=True),  # Qwen 2.5 1.5B
    Shape(3584, 18944, 28, 4, 128, 152_064, qkv_bias=True),  # Qwen 2.5 7B
    Shape(5120, 13824, 40, 8, 128, 152_064, qkv_bias=True),  # Qwen 2.5 14B
    Shape(2560, 9728, 32, 8, 128, 151_936, tied=True, qk_norm=True),  # Qwen 3 4B
    Shape(4096, 12288, 32, 8, 128, 151_936, qk_norm=True),  # Qwen 3 8B
    Shape(2304, 9216, 8, 4, 256, 256_000, tied=True, gemma=True),  # Gemma 2 2B
    Shape(3584, 14336, 16, 8, 256, 256_000, tied=True, gemma=True),  # Gemma 2 9B
)
# What files hold: of linear layers, of v and down projections, of embedding and head.
FILES: tuple[tuple[Encoding, Encoding, Encoding], ...] = (
    (BF16, BF16, BF16),
    (Q8_0, Q8_0, Q8_0),
    (Q4_0, Q4_0, Q6_K),
    (Q4_K, Q6_K, Q6_K),
    (Q4_K, Q4_K, Q6_K),
    (AFFINE4_128, AFFINE4_128, F16),
)
KV_FORMATS: tuple[tuple[DtypeName, KVFormatName], ...] = (
    ("bfloat16", "bfloat16"),
    ("bfloat16", "int8"),
    ("float16", "float16"),
    ("float16", "int8"),
)


def model_kernels(*, has_bf16: bool = True) -> tuple[KernelSpec, ...]:
    """Each once, in a steady order. Cards without matrix units for bfloat16 compute in float16."""
    formats = [each for each in KV_FORMATS if has_bf16 or each[0] != "bfloat16"]
    return tuple(dict.fromkeys(_all(formats)))


def _all(formats: Sequence[tuple[DtypeName, KVFormatName]]) -> Iterator[KernelSpec]:
    for shape, files, (dtype, kv_format), units in product(SHAPES, FILES, formats, COMPUTE_UNITS):
        yield from kernels_of(
            shape.spec,
            _table(shape.spec, *files),
            form=WeightForm(None),
            dtype=dtype,
            kv_format=kv_format,
            limits=LIMITS,
            compute_units=units,
        )


def _table(spec: ModelSpec, most: Encoding, some: Encoding, ends: Encoding) -> WeightTable:
    path = Path("model")
    tensors: dict[str, StoredTensor] = {}
    for asked in weight_names(spec):
        for name, shape in zip(asked.names, asked.shapes, strict=True):
            encoding = BF16
            if name in (EMBEDDING, HEAD):
                encoding = ends
            elif len(shape) == 2:
                wanted = some if ".v_proj." in name or ".down_proj." in name else most
                encoding = wanted if shape[1] % wanted.block_cols == 0 else Q8_0
            tensors[name] = TableEntry(path, name, shape, encoding)
    return WeightTable(path, tensors, is_assumed=True)
