"""Rotary positions (arXiv:2104.09864, half-split form): frequencies from a RopeSpec, then one rotation per step.

Runs in: engine thread; owns: one frequency vector per kind of layer. Cosines and sines are computed in float32 from the
positions of a step, once for all layers that share a RopeSpec: 64 of each a token, less than reading a table would
cost, and no table of max_position_embeddings rows to keep (67 MB at 131,072).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from edgekv.model.spec import FrequencyFactors, Llama3Scaling, RopeSpec, YarnScaling


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """One step's angles. The sign of the half-swap is folded into `sin`: x · cos + swap(x) · sin rotates x."""

    cos: Tensor  # [tokens, 1, head_dim] float32
    sin: Tensor  # [tokens, 1, head_dim] float32

    def apply(self, x: Tensor) -> Tensor:
        """Rotate every head of `x` [tokens, heads, head_dim], in float32; answers a new tensor of x's dtype."""
        wide = x.float()
        swapped = wide.roll(wide.shape[-1] // 2, -1)
        return (wide * self.cos).addcmul_(swapped, self.sin).to(x.dtype)


class RotaryEmbedding:
    """Makes a step's Rotation from its positions."""

    def __init__(self, rope: RopeSpec, head_dim: int, device: torch.device) -> None:
        """Computes the frequencies on the CPU, so that they are the same bits on every device."""
        self._magnitude = rope_magnitude(rope)
        self._frequencies = inverse_frequencies(rope, head_dim).to(device)  # [head_dim / 2]

    def at(self, positions: Tensor) -> Rotation:
        """The rotation of tokens at `positions` [tokens]."""
        angles = positions.float().unsqueeze(1) * self._frequencies
        cos, sin = angles.cos() * self._magnitude, angles.sin() * self._magnitude
        return Rotation(torch.cat((cos, cos), 1).unsqueeze(1), torch.cat((-sin, sin), 1).unsqueeze(1))


def rope_magnitude(rope: RopeSpec) -> float:
    """What cosines and sines are multiplied with."""
    return rope.scaling.attention_factor if isinstance(rope.scaling, YarnScaling) else 1.0


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> Tensor:
    """Radians per position of each pair of dimensions, [head_dim / 2] float32."""
    powers = rope.theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    plain = 1.0 / powers
    match rope.scaling:
        case None:
            return plain
        case Llama3Scaling() as scaling:
            return _llama3(plain, scaling)
        case YarnScaling() as scaling:
            return _yarn(powers, scaling, rope.theta, head_dim)
        case FrequencyFactors(factors):
            return plain / torch.tensor(factors)
        case linear:
            return plain / linear.factor


def _llama3(plain: Tensor, scaling: Llama3Scaling) -> Tensor:
    """As in Meta's llama-models, `apply_scaling`: by wavelength, against the context of pre-training."""
    context = scaling.original_max_position_embeddings
    wavelength = 2 * math.pi / plain
    blend = (context / wavelength - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blended = (1 - blend) * plain / scaling.factor + blend * plain
    stretched = torch.where(wavelength > context / scaling.low_freq_factor, plain / scaling.factor, blended)
    return torch.where(wavelength < context / scaling.high_freq_factor, plain, stretched)


def _yarn(powers: Tensor, scaling: YarnScaling, theta: float, head_dim: int) -> Tensor:
    """YaRN's "NTK-by-parts": fast dimensions kept, slow ones interpolated, a ramp between (arXiv:2309.00071, 3.2)."""

    def dimension(rotations: float) -> float:
        """Where a pair turns `rotations` times over the context of pre-training."""
        turns = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = ((torch.arange(head_dim // 2).float() - low) / (high - low or 0.001)).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (scaling.factor * powers) * (1 - kept) + 1.0 / powers * kept
