"""The rotary part of a GGUF file's metadata: base, scaling and Llama 3.1's frequency factors.

Runs in: anywhere (no torch); owns: nothing. Meanings as in llama.cpp (src/llama-model.cpp, src/llama-context.cpp).
"""

from edgekv.model.gguf_keys import ArchitectureKeys
from edgekv.model.rope_config import FACTOR_RANGE, MAX_POSITIONS, THETA_RANGE, yarn_magnitude
from edgekv.model.spec import FrequencyFactors, LinearScaling, RopeScaling, RopeSpec, YarnScaling

_FACTORS_TENSOR = "rope_freqs.weight"
_KINDS = ("none", "linear", "yarn")


def read_gguf_rope(keys: ArchitectureKeys, head_dim: int) -> RopeSpec:
    """The rotary embedding of the layers that see everything, which in most models are all."""
    rotated = keys.optional_integer("rope.dimension_count", 0, 1 << 16)
    if rotated not in (None, head_dim):
        message = f"rotating {rotated} of a head's {head_dim} dimensions is not supported"
        raise keys.fault("rope.dimension_count", message)
    theta = keys.optional_number("rope.freq_base", *THETA_RANGE)
    return RopeSpec(10_000.0 if theta is None else theta, _scaling(keys, head_dim))


def read_gguf_local_rope(keys: ArchitectureKeys, default_theta: float, scaling: RopeScaling | None) -> RopeSpec:
    """The rotary embedding of the layers that see a window."""
    theta = keys.optional_number("rope.freq_base_swa", *THETA_RANGE)
    return RopeSpec(default_theta if theta is None else theta, scaling)


def _scaling(keys: ArchitectureKeys, head_dim: int) -> RopeScaling | None:
    # Files from before the key have a factor alone, which is a linear one.
    kind = keys.optional_text("rope.scaling.type") or "linear"
    if kind not in _KINDS:
        raise keys.fault("rope.scaling.type", f"{kind!r:.80} is not supported; supported: {', '.join(_KINDS)}")
    name = "rope.scale_linear" if "rope.scaling.factor" not in keys else "rope.scaling.factor"
    factor = keys.optional_number(name, 0.0, FACTOR_RANGE[1]) or 1.0  # 0 is llama.cpp's word for none
    scaling: RopeScaling | None = None
    if kind == "yarn":
        scaling = _yarn(keys, factor)
    else:
        if keys.optional_number("rope.scaling.attn_factor", 0.0, 1e3) not in (None, 1.0):
            raise keys.fault("rope.scaling.attn_factor", f"is not supported for {kind} scaling")
        if kind == "linear" and factor != 1.0:
            scaling = LinearScaling(factor)
    located = keys.tensors.get(_FACTORS_TENSOR)
    if located is None:
        return scaling
    if scaling is not None:
        raise keys.fault("rope.scaling.type", f"{kind} scaling beside the tensor {_FACTORS_TENSOR} is not supported")
    return FrequencyFactors(keys.floats_of(located, head_dim // 2, *FACTOR_RANGE))


def _yarn(keys: ArchitectureKeys, factor: float) -> YarnScaling:
    original = keys.optional_integer("rope.scaling.original_context_length", 1, MAX_POSITIONS)
    if keys.optional_number("rope.scaling.yarn_ext_factor", -1e3, 1e3) not in (None, -1.0, 1.0):
        raise keys.fault("rope.scaling.yarn_ext_factor", "extrapolating other than in full is not supported")
    # The first is the `attention_factor` of config.json, the second its `mscale_all_dim` beside an `mscale` of 1.
    attention_factor = keys.optional_number("rope.scaling.yarn_attn_factor", *FACTOR_RANGE)
    if attention_factor is None:
        all_dim = keys.optional_number("rope.scaling.yarn_log_multiplier", 0.0, 1e3) or 0.0
        attention_factor = yarn_magnitude(factor, 1.0) / yarn_magnitude(factor, all_dim)
    further = keys.optional_number("rope.scaling.attn_factor", *FACTOR_RANGE)
    return YarnScaling(
        factor=factor,
        original_max_position_embeddings=original or keys.integer("context_length", 1, MAX_POSITIONS),
        attention_factor=attention_factor * (1.0 if further is None else further),
        beta_fast=keys.optional_number("rope.scaling.yarn_beta_fast", 0.0, 1e6) or 32.0,
        beta_slow=keys.optional_number("rope.scaling.yarn_beta_slow", 0.0, 1e6) or 1.0,
    )
