"""Keys and values as common/kv.h stores them, in plain torch: what the kernels' references encode and decode with.

Runs in: anywhere; owns: nothing.
"""

import torch
from torch import Tensor

from edgekv.kernels.attn.gpu_layout import GpuKvFormat

E4M3_MOST = 448.0


def encode(rows: Tensor, kv_format: GpuKvFormat) -> tuple[Tensor, Tensor]:
    """Float32 rows [..., head_dim] as bytes [..., row_bytes] and float16 scales [..., 0, 1 or 2].

    int8 and int4: a row with a NaN or an infinity gets a scale of NaN, so that none of it reads as a number.
    """
    no_scales = rows.new_empty((*rows.shape[:-1], 0), dtype=torch.float16)
    match kv_format:
        case GpuKvFormat.BF16:
            return rows.to(torch.bfloat16).contiguous().view(torch.uint8), no_scales
        case GpuKvFormat.F16:
            return rows.to(torch.float16).contiguous().view(torch.uint8), no_scales
        case GpuKvFormat.E4M3:
            bounded = torch.where(rows.isfinite(), rows.clamp(-E4M3_MOST, E4M3_MOST), torch.nan)
            return bounded.to(torch.float8_e4m3fn).contiguous().view(torch.uint8), no_scales
        case GpuKvFormat.INT8:
            return _to_int8(rows)
        case GpuKvFormat.INT4:
            return _to_int4(rows)
        case GpuKvFormat.F32:
            return rows.float().contiguous().view(torch.uint8), no_scales


def decode(codes: Tensor, scales: Tensor, kv_format: GpuKvFormat) -> Tensor:
    """The reverse, [..., head_dim] float32. As in the kernels, e4m3's two NaNs are read as 480."""
    codes = codes.contiguous()
    match kv_format:
        case GpuKvFormat.BF16:
            return codes.view(torch.bfloat16).float()
        case GpuKvFormat.F16:
            return codes.view(torch.float16).float()
        case GpuKvFormat.E4M3:
            numbers = codes.view(torch.float8_e4m3fn).float()
            return torch.where(numbers.isnan(), torch.where(codes >= 128, -480.0, 480.0), numbers)
        case GpuKvFormat.INT8:
            return codes.view(torch.int8).float() * scales.float()
        case GpuKvFormat.INT4:
            nibbles = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
            return nibbles.float() * scales[..., :1].float() + scales[..., 1:].float()
        case GpuKvFormat.F32:
            return codes.view(torch.float32)


def hadamard_rotated(rows: Tensor) -> Tensor:
    """Rows [..., head_dim] times a Hadamard matrix that is its own inverse.

    Its order is the largest power of two that divides head_dim, and every so many numbers are rotated by it.
    """
    order = rows.shape[-1] & -rows.shape[-1]
    matrix = torch.ones(1, 1, device=rows.device)
    while len(matrix) < order:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    parts = rows.float().reshape(*rows.shape[:-1], -1, order)
    return torch.matmul(parts, matrix / order**0.5).flatten(-2)


def _poison(rows: Tensor) -> Tensor:
    """0 for each row, NaN for one with a NaN or an infinity."""
    return rows.sum(-1, keepdim=True) * 0


def _to_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    scales = (rows.abs().amax(-1, keepdim=True) / 127 + _poison(rows)).to(torch.float16)
    codes = (rows / _divisor(scales)).nan_to_num(127.0).round().clamp(-127, 127)
    return codes.to(torch.int8).contiguous().view(torch.uint8), scales


def _to_int4(rows: Tensor) -> tuple[Tensor, Tensor]:
    zeros = rows.amin(-1, keepdim=True).to(torch.float16)
    spans = (rows.amax(-1, keepdim=True) - zeros.float()).clamp(min=0)
    scales = (spans / 15 + _poison(rows)).to(torch.float16)
    codes = ((rows - zeros.float()) / _divisor(scales)).nan_to_num(15.0).round().clamp(0, 15).to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, torch.cat((scales, zeros), -1)


def _divisor(scales: Tensor) -> Tensor:
    """1 for a scale that is too small for float16, or none: all codes are then 0, or mean nothing."""
    wide = scales.float()
    return torch.where(wide > 0, wide, 1.0)
