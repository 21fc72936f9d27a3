"""What the rest of the program knows about a model: its shape and its generation defaults, without torch.

Runs in: anywhere; owns: nothing (frozen data).
"""

from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu_tanh"]
DtypeName = Literal["float32", "float16", "bfloat16"]

MAX_VOCAB = 1 << 22
MAX_PARAMETERS = 1 << 42
"""No real model goes past either: a shape that does is refused before anything is allocated from it."""


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Every frequency divided by `factor` (position interpolation, arXiv:2306.15595)."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1's: long wavelengths divided by `factor`, short ones kept, those between blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN (arXiv:2309.00071); `attention_factor` multiplies cosines and sines and is already resolved."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class FrequencyFactors:
    """Every frequency divided by a factor of its own, [head_dim / 2]: how a GGUF carries Llama 3.1's scaling."""

    factors: tuple[float, ...]


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling | FrequencyFactors


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary positions of one layer: base `theta` and how it was stretched."""

    theta: float
    scaling: RopeScaling | None = None


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The shape of a decoder-only model; everything that code needs to build and feed it.

    `windows` and `ropes` have one entry per layer. `attention_scale` multiplies q·k. `dtype` is what the checkpoint
    says that it was saved in. `qk_norm`: RMSNorm over each head of q and k before RoPE. `post_norms`: a second norm
    after attention and after the MLP (Gemma).
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    windows: tuple[int | None, ...]
    ropes: tuple[RopeSpec, ...]
    rms_norm_eps: float
    attention_scale: float
    tie_word_embeddings: bool
    dtype: DtypeName
    activation: Activation = "silu"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    attention_softcap: float | None = None
    final_softcap: float | None = None

    @property
    def num_parameters(self) -> int:
        """Weights of the model, computed from its shape; a tied output head is counted once."""
        heads_dim, kv_dim = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = self.hidden_size * (heads_dim + 2 * kv_dim) + heads_dim * self.hidden_size
        attention += (heads_dim + 2 * kv_dim) * self.qkv_bias + self.hidden_size * self.output_bias
        attention += 2 * self.head_dim * self.qk_norm
        mlp = 3 * self.hidden_size * self.intermediate_size
        mlp += (2 * self.intermediate_size + self.hidden_size) * self.mlp_bias
        norms = self.hidden_size * (4 if self.post_norms else 2)
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_layers * (attention + mlp + norms) + self.hidden_size


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What the model's makers recommend; None where they say nothing.

    `do_sample` False asks for greedy decoding whatever the temperature says.
    """

    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
