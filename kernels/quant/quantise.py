"""Rows of floats as q8_0 or q4_0 blocks: what `weights: int8` and `weights: int4` do to a checkpoint when it is loaded.

Runs in: anywhere; owns: nothing. Works through the rows in slices that stay in the processor's cache; torch's threads
share each slice.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from edgekv.kernels.quant.encodings import Q4_0, Q8_0, Encoding

_BLOCK = 32
_SLICE_BLOCKS = 8192
# Where the element of the largest magnitude may come to lie, at the end of -8 .. 7 that has more room or a little past
# it: cutting it off can be worth it for the others. More places than these gain less than 1 % of the error.
_PEAKS = (-8.75, -8.25, -7.75, -7.25, -6.75)


def quantise(encoding: Encoding, rows: Tensor) -> Tensor:
    """`rows` [rows, cols] of any floating dtype as bytes [rows, row bytes] of `encoding`, q8_0 or q4_0.

    A row's bytes depend on that row alone. Raises ValueError where cols are no multiple of 32, and for values that no
    float16 scale can reach (infinities, NaN, magnitudes beyond some 500,000).
    """
    target = torch.empty(rows.shape[0], encoding.row_bytes(rows.shape[1]), dtype=torch.uint8)
    blocks = rows.reshape(-1, _BLOCK)
    made = target.view(-1, encoding.block_bytes)
    kind = _KINDS[encoding]
    for first in range(0, len(blocks), _SLICE_BLOCKS):
        scale = kind(blocks[first : first + _SLICE_BLOCKS].float(), made[first : first + _SLICE_BLOCKS])
        if not scale.isfinite().all():
            raise ValueError("holds infinities, NaN or values too large for a float16 scale")
    return target


def _q8_0(blocks: Tensor, target: Tensor) -> Tensor:
    """As ggml's reference: the scale is max |x| / 127, and halves are rounded away from zero."""
    scale = blocks.abs().amax(1, keepdim=True).div_(127)  # [blocks, 1]
    scaled = blocks * torch.where(scale == 0, 0.0, 1 / scale)
    # Not floor(x + 0.5): that is 1 for the float32 just below 0.5.
    size = scaled.abs()
    whole = size.floor()
    whole += (size.sub_(whole).mul_(2)).floor_()
    return _store(target, scale, whole.copysign_(scaled).to(torch.int8).view(torch.uint8))


def _q4_0(blocks: Tensor, target: Tensor) -> Tensor:
    """The scale with the least squared error among those that put the peak on one of _PEAKS.

    For given q the best scale is d = x·q / q·q, which takes (x·q)² / q·q off the error (as ggml's make_qx_quants).
    """
    low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    peak = torch.where(-low > high, low, high)
    peak = torch.where(peak == 0, 1.0, peak)  # [blocks, 1]
    best_gain, best_scale = torch.full_like(peak, -1.0), torch.zeros_like(peak)
    scaled = torch.empty_like(blocks)
    for place in _PEAKS:
        torch.mul(blocks, place / peak, out=scaled).round_().clamp_(-8, 7)
        dot = torch.linalg.vecdot(blocks, scaled).unsqueeze(1)
        scale = dot / torch.linalg.vecdot(scaled, scaled).unsqueeze(1)
        gain = dot.mul_(scale)
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        best_scale = torch.where(better, scale, best_scale)
    # What was not finite never is "better": let it reach the scale.
    best_scale = torch.where(peak.isfinite(), best_scale, peak)
    kept = best_scale.half().float()
    torch.mul(blocks, torch.where(kept == 0, 0.0, 1 / kept), out=scaled).round_().clamp_(-8, 7)
    codes = scaled.add_(8).to(torch.uint8)
    return _store(target, best_scale, codes[:, :16] | codes[:, 16:] << 4)


def _store(target: Tensor, scale: Tensor, codes: Tensor) -> Tensor:
    """Write the blocks { f16 scale; codes }; answers the scales as they are in there."""
    halves = scale.half()
    target[:, :2] = halves.view(torch.uint8)
    target[:, 2:] = codes
    return halves


_KINDS: dict[Encoding, Callable[[Tensor, Tensor], Tensor]] = {Q8_0: _q8_0, Q4_0: _q4_0}
