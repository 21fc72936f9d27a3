"""The metadata of a GGUF file as a ModelSpec and GenerationDefaults.

Runs in: anywhere (no torch); owns: nothing. Keys: docs/gguf.md of github.com/ggml-org/ggml; what is left out means what
llama.cpp takes it to mean (src/llama-model.cpp, src/models/). What would change the result and cannot be honoured is
refused by name.
"""

from collections.abc import Callable
from pathlib import Path

from edgekv.errors import ModelError
from edgekv.formats.gguf_checkpoint import GgufCheckpoint
from edgekv.formats.gguf_values import Metadata
from edgekv.formats.gguf_vocabulary import TOKENS_KEY, read_vocabulary
from edgekv.model.gguf_keys import ArchitectureKeys, as_written
from edgekv.model.gguf_rope import read_gguf_local_rope, read_gguf_rope
from edgekv.model.rope_config import MAX_POSITIONS
from edgekv.model.spec import MAX_PARAMETERS, MAX_VOCAB, DtypeName, GenerationDefaults, ModelSpec, RopeSpec

_EMBEDDING = "token_embd.weight"
_DTYPES: dict[str, DtypeName] = {"f32": "float32", "f16": "float16"}
# Keys of our architectures that change the computation, and the values at which they do not.
_HARMLESS: dict[str, tuple[object, ...]] = {
    "expert_count": (0,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.temperature_scale": (0.0,),
    "rope.dimension_sections": (),
    "rope.scaling.alpha": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "logit_scale": (0.0, 1.0),
}


def read_gguf_spec(path: Path) -> ModelSpec:
    """The model's shape; raises ModelError naming the file and the key or tensor."""
    with GgufCheckpoint(path) as checkpoint:
        metadata = checkpoint.metadata
        kind = metadata.optional_text("general.type")
        if kind not in (None, "model"):
            raise metadata.fault("general.type", f"{kind!r:.80} is no model: give the file of the model itself")
        architecture = metadata.text("general.architecture")
        if architecture not in _READERS:
            message = f"{architecture!r:.80} is not supported; supported: {', '.join(_READERS)}"
            raise metadata.fault("general.architecture", message)
        keys = ArchitectureKeys(checkpoint, architecture)
        for name, values in _HARMLESS.items():
            if name in keys and not keys.is_one_of(name, values):
                raise keys.fault(name, f"{keys.shown(name)} is not supported")
        spec = _READERS[architecture](keys, _vocab_size(checkpoint))
        if spec.num_parameters > MAX_PARAMETERS:
            message = f"the shape asks for {spec.num_parameters:,} parameters, past any real model"
            raise keys.fault("embedding_length", message)
        return spec


def read_gguf_generation(path: Path) -> GenerationDefaults:
    """What the file recommends; raises ModelError naming the file and the key."""
    with GgufCheckpoint(path) as checkpoint:
        metadata = checkpoint.metadata
        vocabulary = read_vocabulary(metadata)
        return GenerationDefaults(
            eos_token_ids=vocabulary.end_ids,
            bos_token_id=vocabulary.named.get("bos_token"),
            temperature=_number(metadata, "general.sampling.temp", 0.0, 100.0),
            top_p=_number(metadata, "general.sampling.top_p", 0.0, 1.0),
            top_k=metadata.optional_integer("general.sampling.top_k", 0, MAX_VOCAB) or None,
            min_p=_number(metadata, "general.sampling.min_p", 0.0, 1.0),
            repetition_penalty=_number(metadata, "general.sampling.penalty_repeat", 1e-3, 1e3),
        )


def _number(metadata: Metadata, key: str, low: float, high: float) -> float | None:
    value = metadata.optional_number(key, low, high)
    return None if value is None else as_written(value)


def _llama(keys: ArchitectureKeys, vocab_size: int) -> ModelSpec:
    """Llama, and Mistral too: converters call both so, and both are computed alike."""
    return _spec(keys, "LlamaForCausalLM", vocab_size)


def _qwen2(keys: ArchitectureKeys, vocab_size: int) -> ModelSpec:
    return _spec(keys, "Qwen2ForCausalLM", vocab_size)


def _qwen3(keys: ArchitectureKeys, vocab_size: int) -> ModelSpec:
    return _spec(keys, "Qwen3ForCausalLM", vocab_size, qk_norm=True)


def _gemma2(keys: ArchitectureKeys, vocab_size: int) -> ModelSpec:
    return _spec(
        keys,
        "Gemma2ForCausalLM",
        vocab_size,
        default_window=4096,
        default_period=2,
        local_rope=lambda rope: read_gguf_local_rope(keys, rope.theta, rope.scaling),
        gemma_27b_layers=46,
        attention_softcap=_softcap(keys, "attn_logit_softcapping", default=50.0),
        final_softcap=_softcap(keys, "final_logit_softcapping", default=30.0),
    )


def _gemma3(keys: ArchitectureKeys, vocab_size: int) -> ModelSpec:
    if _softcap(keys, "attn_logit_softcapping", default=None) is not None:
        raise keys.fault("attn_logit_softcapping", "Gemma 3 has no such cap")
    return _spec(
        keys,
        "Gemma3ForCausalLM",
        vocab_size,
        default_period=6,
        local_rope=lambda rope: read_gguf_local_rope(keys, 10_000.0, None),
        qk_norm=True,
        gemma_27b_layers=62,
        final_softcap=_softcap(keys, "final_logit_softcapping", default=None),
    )


def _spec(
    keys: ArchitectureKeys,
    architecture: str,
    vocab_size: int,
    *,
    default_window: int | None = None,
    default_period: int = 0,
    local_rope: Callable[[RopeSpec], RopeSpec] = lambda rope: rope,
    qk_norm: bool = False,
    gemma_27b_layers: int | None = None,
    attention_softcap: float | None = None,
    final_softcap: float | None = None,
) -> ModelSpec:
    """The spec of one architecture; `gemma_27b_layers` marks a Gemma, and how many layers its largest size has."""
    is_gemma = gemma_27b_layers is not None
    num_layers = keys.num_layers
    hidden_size = keys.integer("embedding_length", 1, 1 << 17)
    num_heads = keys.same_in_every_layer("attention.head_count", 1, 1024)
    num_kv_heads = num_heads
    if "attention.head_count_kv" in keys:
        num_kv_heads = keys.same_in_every_layer("attention.head_count_kv", 1, num_heads)
    if num_heads % num_kv_heads:
        raise keys.fault("attention.head_count_kv", f"{num_kv_heads} does not divide {num_heads} attention heads")
    head_dim = _head_dim(keys, hidden_size, num_heads)
    rope = read_gguf_rope(keys, head_dim)
    windows = _windows(keys, num_layers, default_window, default_period)
    narrow = local_rope(rope)
    return ModelSpec(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=keys.same_in_every_layer("feed_forward_length", 1, 1 << 20),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=keys.integer("context_length", 1, MAX_POSITIONS),
        windows=windows,
        ropes=tuple(rope if window is None else narrow for window in windows),
        rms_norm_eps=keys.number("attention.layer_norm_rms_epsilon", 1e-12, 1.0),
        attention_scale=_attention_scale(
            keys, hidden_size // num_heads if num_layers == gemma_27b_layers else head_dim
        ),
        tie_word_embeddings="output.weight" not in keys.tensors,
        dtype=_dtype(keys),
        activation="gelu_tanh" if is_gemma else "silu",
        qkv_bias="blk.0.attn_q.bias" in keys.tensors,
        output_bias="blk.0.attn_output.bias" in keys.tensors,
        mlp_bias="blk.0.ffn_down.bias" in keys.tensors,
        qk_norm=qk_norm,
        post_norms=is_gemma,
        attention_softcap=attention_softcap,
        final_softcap=final_softcap,
    )


def _vocab_size(checkpoint: GgufCheckpoint) -> int:
    """The rows of the embedding, which every one of has a token."""
    metadata = checkpoint.metadata
    located = checkpoint.tensors.get(_EMBEDDING)
    if located is None:
        raise ModelError(f"{checkpoint.source}: tensor '{_EMBEDDING}': is missing: the file holds no model's weights")
    rows = located.info.shape[0]
    if rows > MAX_VOCAB:
        raise ModelError(f"{located.file.path}: tensor '{_EMBEDDING}': {rows:,} rows are past any real vocabulary")
    listed = metadata.field(TOKENS_KEY)
    if listed is not None and listed.count != rows:
        raise metadata.fault(TOKENS_KEY, f"{listed.count:,} tokens, but {_EMBEDDING} has {rows:,} rows")
    return rows


def _head_dim(keys: ArchitectureKeys, hidden_size: int, num_heads: int) -> int:
    head_dim = keys.optional_integer("attention.key_length", 2, 1024) or hidden_size // num_heads
    if head_dim % 2 or not 2 <= head_dim <= 1024:
        message = f"must be even and from 2 to 1,024 for rotary positions, found {head_dim}"
        raise keys.fault("attention.key_length", message)
    for name in ("attention.value_length", "attention.key_length_swa", "attention.value_length_swa"):
        length = keys.optional_integer(name, 1, 1 << 16)
        if length not in (None, head_dim):
            raise keys.fault(name, f"{length} is not supported beside keys of {head_dim}")
    return head_dim


def _windows(
    keys: ArchitectureKeys, num_layers: int, default_window: int | None, default_period: int
) -> tuple[int | None, ...]:
    """The window of each layer: of a period's layers the last sees everything, none does where the period is 0."""
    window = keys.optional_integer("attention.sliding_window", 0, MAX_POSITIONS)
    window = default_window if window is None else window
    if not window:
        return (None,) * num_layers
    name = "attention.sliding_window_pattern"
    slides = keys.flags(name)
    if slides is None:
        period = keys.optional_integer(name, 0, 1024)
        period = default_period if period is None else period
        slides = tuple(period == 0 or layer % period < period - 1 for layer in range(num_layers))
    return tuple(window if slide else None for slide in slides)


def _attention_scale(keys: ArchitectureKeys, scalar: int) -> float:
    # No key holds Gemma's `query_pre_attn_scalar`; the 27B sizes are those in which it is not head_dim.
    scale = keys.optional_number("attention.scale", 0.0, 1e3)
    if scale:
        return scale
    if not scalar:
        raise keys.fault("attention.head_count", "more heads than embedding_length has columns, which give no scale")
    return float(scalar**-0.5)


def _softcap(keys: ArchitectureKeys, name: str, *, default: float | None) -> float | None:
    cap = keys.optional_number(name, 0.0, 1e6)
    return default if cap is None else cap or None


def _dtype(keys: ArchitectureKeys) -> DtypeName:
    encodings = {located.info.encoding.name for located in keys.tensors.values() if len(located.info.shape) > 1}
    return _DTYPES.get(encodings.pop(), "bfloat16") if len(encodings) == 1 else "bfloat16"


_READERS: dict[str, Callable[[ArchitectureKeys, int], ModelSpec]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
}
