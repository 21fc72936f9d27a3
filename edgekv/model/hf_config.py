"""config.json and generation_config.json of a Hugging Face model folder, as a ModelSpec and GenerationDefaults.

A model that is a GGUF file is handed on to `gguf_config`.

Runs in: anywhere; owns: nothing. Imports no torch, and never the code that an `auto_map` names. Every number is bounded
here, before anything is allocated from it; defaults are those of transformers' configuration classes.
"""

from collections.abc import Callable
from pathlib import Path

from edgekv.config.model_path import gguf_at
from edgekv.errors import ModelError
from edgekv.model.json_fields import Fields, read_object
from edgekv.model.quantised_config import read_quantisation
from edgekv.model.rope_config import MAX_POSITIONS, read_rope, read_rope_by_layer_type
from edgekv.model.spec import (
    MAX_PARAMETERS,
    MAX_VOCAB,
    Activation,
    DtypeName,
    GenerationDefaults,
    ModelSpec,
    RopeSpec,
)

_MAX_CONFIG_BYTES = 4 << 20
_DTYPES: dict[str, DtypeName] = {"float32": "float32", "float16": "float16", "bfloat16": "bfloat16"}


def read_spec(folder: Path) -> ModelSpec:
    """The shape of a model folder or a GGUF file; raises ModelError naming the file and the field."""
    if (file := gguf_at(folder)) is not None:
        from edgekv.model.gguf_config import read_gguf_spec

        return read_gguf_spec(file)
    config = _config(folder)
    names = config.texts("architectures")
    supported = ", ".join(_READERS)
    reader = next((_READERS[name] for name in names if name in _READERS), None)
    if reader is None:
        raise config.fault("architectures", f"{', '.join(names)!r:.200} is not supported; supported: {supported}")
    read_quantisation(config)
    spec = reader(config)
    if spec.num_parameters > MAX_PARAMETERS:
        raise config.fault("hidden_size", f"the shape asks for {spec.num_parameters:,} parameters, past any real model")
    return spec


def read_generation_config(folder: Path) -> GenerationDefaults:
    """generation_config.json, with ids it lacks from config.json; raises ModelError naming the file and the field.

    Of a GGUF file, what its metadata recommends.
    """
    if (file := gguf_at(folder)) is not None:
        from edgekv.model.gguf_config import read_gguf_generation

        return read_gguf_generation(file)
    path, config = folder / "generation_config.json", _config(folder)
    given = Fields(str(path), read_object(path, _MAX_CONFIG_BYTES)) if path.exists() else Fields(str(path), {})
    bos = given.optional_integer("bos_token_id", 0, MAX_VOCAB)
    return GenerationDefaults(
        eos_token_ids=_token_ids(given, "eos_token_id") or _token_ids(config, "eos_token_id"),
        bos_token_id=config.optional_integer("bos_token_id", 0, MAX_VOCAB) if bos is None else bos,
        do_sample=given.flag("do_sample", False) if "do_sample" in given else None,
        temperature=given.optional_number("temperature", 0.0, 100.0),
        top_p=given.optional_number("top_p", 0.0, 1.0),
        top_k=given.optional_integer("top_k", 0, MAX_VOCAB) or None,
        min_p=given.optional_number("min_p", 0.0, 1.0),
        repetition_penalty=given.optional_number("repetition_penalty", 1e-3, 1e3),
    )


def _config(folder: Path) -> Fields:
    path = folder / "config.json"
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such model folder")
    return Fields(str(path), read_object(path, _MAX_CONFIG_BYTES))


def _token_ids(fields: Fields, name: str) -> tuple[int, ...]:
    value = fields.values.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for item in ids:
        Fields(fields.origin, {name: item}).integer(name, 0, MAX_VOCAB)
    return tuple(dict.fromkeys(item for item in ids if isinstance(item, int)))


def _llama(config: Fields) -> ModelSpec:
    bias = config.flag("attention_bias", False)
    return _spec(config, "LlamaForCausalLM", qkv_bias=bias, output_bias=bias, mlp_bias=config.flag("mlp_bias", False))


def _mistral(config: Fields) -> ModelSpec:
    window = _window(config, default=4096)
    return _spec(config, "MistralForCausalLM", window_of=lambda layer: window)


def _qwen2(config: Fields) -> ModelSpec:
    return _spec(config, "Qwen2ForCausalLM", window_of=_qwen_windows(config), qkv_bias=True)


def _qwen3(config: Fields) -> ModelSpec:
    bias = config.flag("attention_bias", False)
    return _spec(
        config,
        "Qwen3ForCausalLM",
        window_of=_qwen_windows(config),
        head_dim=128,
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=True,
    )


def _gemma2(config: Fields) -> ModelSpec:
    sliding = _sliding_layers(config, lambda layer: layer % 2 == 0)
    window = _window(config, default=4096)
    return _gemma(
        config,
        "Gemma2ForCausalLM",
        window_of=lambda layer: window if sliding(layer) else None,
        attention_softcap=_softcap(config, "attn_logit_softcapping", default=50.0),
        final_softcap=_softcap(config, "final_logit_softcapping", default=30.0),
    )


def _gemma3(config: Fields) -> ModelSpec:
    pattern = config.optional_integer("sliding_window_pattern", 1, 1024) or 6
    sliding = _sliding_layers(config, lambda layer: (layer + 1) % pattern != 0)
    window = _window(config, default=4096)
    ropes = read_rope_by_layer_type(config, global_theta=1e6, local_theta=1e4)
    return _gemma(
        config,
        "Gemma3ForCausalLM",
        window_of=lambda layer: window if sliding(layer) else None,
        rope_of=lambda layer: ropes["sliding_attention" if sliding(layer) else "full_attention"],
        qk_norm=True,
        final_softcap=_softcap(config, "final_logit_softcapping", default=None),
    )


def _gemma(
    config: Fields,
    architecture: str,
    *,
    window_of: Callable[[int], int | None],
    rope_of: Callable[[int], RopeSpec] | None = None,
    qk_norm: bool = False,
    attention_softcap: float | None = None,
    final_softcap: float | None,
) -> ModelSpec:
    if config.flag("use_bidirectional_attention", False):
        raise config.fault("use_bidirectional_attention", "only causal models are supported")
    bias = config.flag("attention_bias", False)
    return _spec(
        config,
        architecture,
        window_of=window_of,
        rope_of=rope_of,
        head_dim=256,
        tied=True,
        activation="gelu_tanh",
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=qk_norm,
        post_norms=True,
        attention_scale=(config.optional_number("query_pre_attn_scalar", 1e-3, 1e6) or 256.0) ** -0.5,
        attention_softcap=attention_softcap,
        final_softcap=final_softcap,
    )


def _spec(
    config: Fields,
    architecture: str,
    *,
    window_of: Callable[[int], int | None] = lambda layer: None,
    rope_of: Callable[[int], RopeSpec] | None = None,
    head_dim: int | None = None,
    tied: bool = False,
    activation: Activation = "silu",
    qkv_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    post_norms: bool = False,
    attention_scale: float | None = None,
    attention_softcap: float | None = None,
    final_softcap: float | None = None,
) -> ModelSpec:
    """The spec of one architecture: the fields that all share, read here, and its own, given."""
    hidden_size = config.integer("hidden_size", 1, 1 << 17)
    num_heads = config.integer("num_attention_heads", 1, 1024)
    num_layers = config.integer("num_hidden_layers", 1, 1024)
    head_dim = config.optional_integer("head_dim", 2, 1024) or head_dim or hidden_size // num_heads
    if head_dim % 2 or not 2 <= head_dim <= 1024:
        raise config.fault("head_dim", f"must be even and from 2 to 1,024 for rotary positions, found {head_dim}")
    num_kv_heads = config.optional_integer("num_key_value_heads", 1, num_heads)
    if num_kv_heads is None:
        # Only the first Llamas leave it out; every other family has its own default that no checkpoint relies on.
        if architecture != "LlamaForCausalLM":
            raise config.fault("num_key_value_heads", "is missing")
        num_kv_heads = num_heads
    if num_heads % num_kv_heads:
        raise config.fault("num_key_value_heads", f"{num_kv_heads} does not divide {num_heads} attention heads")
    _check_activation(config, activation)
    layers = range(num_layers)
    ropes = (read_rope(config),) * num_layers if rope_of is None else tuple(rope_of(layer) for layer in layers)
    return ModelSpec(
        architecture=architecture,
        vocab_size=config.integer("vocab_size", 1, MAX_VOCAB),
        hidden_size=hidden_size,
        intermediate_size=config.integer("intermediate_size", 1, 1 << 20),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=config.integer("max_position_embeddings", 1, MAX_POSITIONS),
        windows=tuple(window_of(layer) for layer in layers),
        ropes=ropes,
        rms_norm_eps=config.number("rms_norm_eps", 1e-12, 1.0),
        attention_scale=head_dim**-0.5 if attention_scale is None else attention_scale,
        tie_word_embeddings=config.flag("tie_word_embeddings", tied),
        dtype=_dtype(config),
        activation=activation,
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        post_norms=post_norms,
        attention_softcap=attention_softcap,
        final_softcap=final_softcap,
    )


def _check_activation(config: Fields, activation: Activation) -> None:
    # Gemma's `hidden_act` is a leftover that transformers ignores; Gemma's own field is `hidden_activation`.
    field, expected = {"silu": ("hidden_act", "silu"), "gelu_tanh": ("hidden_activation", "gelu_pytorch_tanh")}[
        activation
    ]
    found = config.optional_text(field)
    if found not in (None, expected):
        raise config.fault(field, f"{found!r:.80} is not supported for this architecture; supported: {expected}")


def _dtype(config: Fields) -> DtypeName:
    field = "dtype" if "dtype" in config else "torch_dtype"
    name = config.optional_text(field) or "float32"
    known = _DTYPES.get(name.removeprefix("torch."))
    if known is None:
        raise config.fault(field, f"{name!r:.80} is not supported; supported: {', '.join(_DTYPES)}")
    return known


def _softcap(config: Fields, field: str, *, default: float | None) -> float | None:
    """Null turns a cap off; a field that is not there does not."""
    return config.optional_number(field, 1e-3, 1e6) if field in config.values else default


def _window(config: Fields, *, default: int) -> int | None:
    if "sliding_window" not in config.values:
        return default
    return config.optional_integer("sliding_window", 1, MAX_POSITIONS)


def _sliding_layers(config: Fields, default: Callable[[int], bool]) -> Callable[[int], bool]:
    """Which layers slide: `layer_types` where it is given, else the architecture's pattern."""
    if "layer_types" not in config:
        return default
    types = config.texts("layer_types")
    num_layers = config.integer("num_hidden_layers", 1, 1024)
    if len(types) != num_layers:
        raise config.fault("layer_types", f"has {len(types)} entries for {num_layers} layers")
    for name in types:
        if name not in ("full_attention", "sliding_attention"):
            raise config.fault("layer_types", f"{name!r:.80} is not supported")
    return lambda layer: types[layer] == "sliding_attention"


def _qwen_windows(config: Fields) -> Callable[[int], int | None]:
    window = _window(config, default=4096) if config.flag("use_sliding_window", False) else None
    first = config.optional_integer("max_window_layers", 0, MAX_POSITIONS)
    sliding = _sliding_layers(config, lambda layer: layer >= (28 if first is None else first))
    return lambda layer: window if sliding(layer) else None


_READERS: dict[str, Callable[[Fields], ModelSpec]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "Gemma2ForCausalLM": _gemma2,
    "Gemma3ForCausalLM": _gemma3,
}
SUPPORTED_ARCHITECTURES = tuple(_READERS)
