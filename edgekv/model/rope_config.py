"""The rotary part of config.json, in its old form (`rope_theta` + `rope_scaling`) and its new one (`rope_parameters`).

Runs in: anywhere; owns: nothing. Meanings and defaults as in transformers' `modeling_rope_utils.py`.
"""

import math

from edgekv.model.json_fields import Fields
from edgekv.model.spec import LinearScaling, Llama3Scaling, RopeScaling, RopeSpec, YarnScaling

MAX_POSITIONS = 1 << 25
THETA_RANGE = (2.0, 1e15)
FACTOR_RANGE = (1e-3, 1e5)
_KNOWN = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "truncate", "finetuned"),
    ),
}
_COMMON = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def read_rope(config: Fields, default_theta: float = 10_000.0) -> RopeSpec:
    """The one rotary embedding of a model that uses the same in every layer."""
    scaling = config.optional_object("rope_scaling") or Fields(config.origin, {})
    parameters = scaling if scaling.values else config.optional_object("rope_parameters") or scaling
    theta = config.optional_number("rope_theta", *THETA_RANGE)
    return _rope(config, parameters, default_theta if theta is None else theta)


def read_rope_by_layer_type(config: Fields, global_theta: float, local_theta: float) -> dict[str, RopeSpec]:
    """Gemma 3's two rotary embeddings, by layer type; the old form scales the global one only."""
    parameters = config.optional_object("rope_parameters") or Fields(config.origin, {})
    parameters.only(("full_attention", "sliding_attention"))
    empty = Fields(config.origin, {})
    wide = parameters.optional_object("full_attention") or empty
    if scaling := config.optional_object("rope_scaling"):
        wide = Fields(config.origin, {**wide.values, **scaling.values}, "rope_scaling.")
    narrow = parameters.optional_object("sliding_attention") or empty
    old_global = config.optional_number("rope_theta", *THETA_RANGE)
    old_local = config.optional_number("rope_local_base_freq", *THETA_RANGE)
    return {
        "full_attention": _rope(config, wide, global_theta if old_global is None else old_global),
        "sliding_attention": _rope(config, narrow, local_theta if old_local is None else old_local),
    }


def _rope(config: Fields, parameters: Fields, default_theta: float) -> RopeSpec:
    kind = parameters.optional_text("rope_type") or parameters.optional_text("type") or "default"
    if kind not in _KNOWN:
        raise parameters.fault("rope_type", f"{kind!r:.80} is not supported; supported: {', '.join(_KNOWN)}")
    parameters.only((*_COMMON, *_KNOWN[kind]))
    for place in (config, parameters):
        if place.optional_number("partial_rotary_factor", 0.0, 1.0) not in (None, 1.0):
            raise place.fault("partial_rotary_factor", "rotating a part of the head is not supported")
    theta = parameters.optional_number("rope_theta", *THETA_RANGE)
    return RopeSpec(default_theta if theta is None else theta, _scaling(kind, config, parameters))


def _scaling(kind: str, config: Fields, parameters: Fields) -> RopeScaling | None:
    match kind:
        case "linear":
            return LinearScaling(parameters.number("factor", *FACTOR_RANGE))
        case "llama3":
            low = parameters.number("low_freq_factor", *FACTOR_RANGE)
            high = parameters.number("high_freq_factor", *FACTOR_RANGE)
            if high <= low:
                raise parameters.fault("high_freq_factor", f"must be above low_freq_factor ({low:g}), found {high:g}")
            return Llama3Scaling(parameters.number("factor", *FACTOR_RANGE), low, high, _original(config, parameters))
        case "yarn":
            return _yarn(config, parameters)
        case _:
            # Dynamic NTK changes nothing up to max_position_embeddings, where our contexts end.
            return None


def _original(config: Fields, parameters: Fields) -> int:
    """The context length of pre-training; a top-level field wins over the one beside the factor."""
    return (
        config.optional_integer("original_max_position_embeddings", 1, MAX_POSITIONS)
        or parameters.optional_integer("original_max_position_embeddings", 1, MAX_POSITIONS)
        or config.integer("max_position_embeddings", 1, MAX_POSITIONS)
    )


def _yarn(config: Fields, parameters: Fields) -> YarnScaling:
    original = _original(config, parameters)
    factor = parameters.optional_number("factor", *FACTOR_RANGE)
    if factor is None:
        factor = config.integer("max_position_embeddings", 1, MAX_POSITIONS) / original
    attention_factor = parameters.optional_number("attention_factor", *FACTOR_RANGE)
    mscale = parameters.optional_number("mscale", 0.0, 1e3)
    mscale_all_dim = parameters.optional_number("mscale_all_dim", 0.0, 1e3)
    if attention_factor is None and mscale and mscale_all_dim:
        attention_factor = yarn_magnitude(factor, mscale) / yarn_magnitude(factor, mscale_all_dim)
    return YarnScaling(
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=yarn_magnitude(factor, 1.0) if attention_factor is None else attention_factor,
        beta_fast=parameters.optional_number("beta_fast", 0.0, 1e6) or 32.0,
        beta_slow=parameters.optional_number("beta_slow", 0.0, 1e6) or 1.0,
        truncate=parameters.flag("truncate", True),
    )


def yarn_magnitude(factor: float, weight: float) -> float:
    """YaRN's recommended growth of cosines and sines, 0.1 · ln(s) + 1 (arXiv:2309.00071, equation 22)."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
