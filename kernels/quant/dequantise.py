"""What the bytes of an encoded row mean, in float32: the reference of all kernels, and the way without them.

Runs in: anywhere; owns: nothing. Layouts: the block structs of ggml/src/ggml-common.h, the order of operations that of
dequantize_row_* in ggml/src/ggml-quants.c (github.com/ggml-org/llama.cpp), so that results are the same to the bit,
NaN for NaN.

Each function takes blocks, uint8 [blocks, block_bytes], to float32 [blocks, block_cols] of any equal shape. Fields lie
in the order in which its first line takes them. q4_0 and those like it have column j in the low half of byte j and
column j + 16 in its high half; super-blocks do the same 32 or 64 bytes at a time.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from edgekv.kernels.quant.encodings import Encoding

# The values of iq4_nl and iq4_xs (kvalues_iq4nl), and twice those of E2M1 in the OCP microscaling formats 1.0.
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
_FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def dequantise(encoding: Encoding, raw: Tensor, cols: int) -> Tensor:
    """Rows as stored, uint8 [rows, encoding.row_bytes(cols)], as float32 [rows, cols] of memory of its own."""
    rows, row_bytes = raw.shape
    if raw.dtype != torch.uint8 or row_bytes != encoding.row_bytes(cols):
        raise ValueError(
            f"{encoding.name} rows of {cols} columns have {encoding.row_bytes(cols)} bytes, not {row_bytes} {raw.dtype}"
        )
    if encoding.name in _FLOATS:
        return _numbers(raw, _FLOATS[encoding.name])
    return _MEANING[encoding.name](raw.reshape(-1, encoding.block_bytes)).reshape(rows, cols)


def _fields(blocks: Tensor, *sizes: int) -> tuple[Tensor, ...]:
    return torch.split_with_sizes(blocks, sizes, -1)


def _numbers(field: Tensor, dtype: torch.dtype) -> Tensor:
    return field.clone(memory_format=torch.contiguous_format).view(dtype).float()  # a copy is aligned


def _halves(field: Tensor) -> Tensor:
    return _numbers(field, torch.float16)


def _nibbles(q: Tensor) -> Tensor:
    """Bytes [..., n] to [..., 2, n]: the low halves, then the high ones."""
    return torch.stack((q & 15, q >> 4), -2)


def _bits(q: Tensor, width: int) -> Tensor:
    """Bytes [..., n] to [..., 8 / width, n]: the lowest `width` bits, then the next."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=q.device)
    return (q.unsqueeze(-2) >> shifts.unsqueeze(-1)) & (1 << width) - 1


def _table(values: tuple[int, ...], q: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=q.device)[q.int()]


def _q4_0(blocks: Tensor) -> Tensor:
    d, q = _fields(blocks, 2, 16)
    return _halves(d) * (_nibbles(q).flatten(1).char() - 8).float()


def _q4_1(blocks: Tensor) -> Tensor:
    d, m, q = _fields(blocks, 2, 2, 16)
    return _halves(d) * _nibbles(q).flatten(1).float() + _halves(m)


def _fifth_bits(high: Tensor) -> Tensor:
    """Four bytes of 32 bits, lowest first, to bit 4 of 32 columns."""
    return _bits(high, 1).transpose(-1, -2).flatten(1) << 4


def _q5_0(blocks: Tensor) -> Tensor:
    d, high, q = _fields(blocks, 2, 4, 16)
    return _halves(d) * ((_nibbles(q).flatten(1) | _fifth_bits(high)).char() - 16).float()


def _q5_1(blocks: Tensor) -> Tensor:
    d, m, high, q = _fields(blocks, 2, 2, 4, 16)
    return _halves(d) * (_nibbles(q).flatten(1) | _fifth_bits(high)).float() + _halves(m)


def _q8_0(blocks: Tensor) -> Tensor:
    d, q = _fields(blocks, 2, 32)
    return _halves(d) * q.view(torch.int8).float()


def _six_bit_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight minima out of 12 bytes, each uint8 [blocks, 8]: get_scale_min_k4.

    Bytes 0-3 and 4-7 hold the first four of each in their low six bits; bytes 8-11 the low four bits of the others,
    whose high two are the top bits of bytes 0-7.
    """
    scale, minimum, rest = _fields(packed, 4, 4, 4)
    scales = torch.cat((scale & 63, (rest & 15) | (scale >> 2 & 48)), 1)
    minima = torch.cat((minimum & 63, (rest >> 4) | (minimum >> 2 & 48)), 1)
    return scales, minima


def _scaled_k(d: Tensor, dmin: Tensor, packed: Tensor, q: Tensor) -> Tensor:
    """Eight sub-blocks of 32 columns, each with a scale and a minimum of its own; q [blocks, 8, 32]."""
    scales, minima = _six_bit_scales(packed)
    step = (_halves(d) * scales.float()).unsqueeze(-1)
    return step * q.float() - (_halves(dmin) * minima.float()).unsqueeze(-1)


def _q4_k(blocks: Tensor) -> Tensor:
    d, dmin, packed, q = _fields(blocks, 2, 2, 12, 128)
    return _scaled_k(d, dmin, packed, _nibbles(q.reshape(-1, 4, 32)).flatten(1, 2))


def _q5_k(blocks: Tensor) -> Tensor:
    d, dmin, packed, high, q = _fields(blocks, 2, 2, 12, 32, 128)
    low = _nibbles(q.reshape(-1, 4, 32)).flatten(1, 2)
    return _scaled_k(d, dmin, packed, low | _bits(high, 1) << 4)


def _q6_k(blocks: Tensor) -> Tensor:
    low, high, scales, d = _fields(blocks, 128, 64, 16, 2)
    step = _halves(d) * scales.view(torch.int8).float()
    q = _nibbles(low.reshape(-1, 2, 64)).flatten(1) | _bits(high.reshape(-1, 2, 32), 2).flatten(1) << 4
    return step.unsqueeze(-1) * (q.char() - 32).float().reshape(-1, 16, 16)


def _iq4_nl(blocks: Tensor) -> Tensor:
    d, q = _fields(blocks, 2, 16)
    return _halves(d) * _table(_IQ4, _nibbles(q).flatten(1))


def _iq4_xs(blocks: Tensor) -> Tensor:
    d, high, low, q = _fields(blocks, 2, 2, 4, 128)
    scales = _nibbles(low).transpose(-1, -2).flatten(1) | _bits(high, 2).transpose(-1, -2).flatten(1) << 4
    step = _halves(d) * (scales.char() - 32).float()
    return step.unsqueeze(-1) * _table(_IQ4, _nibbles(q.reshape(-1, 8, 16)).flatten(2))


def _mxfp4(blocks: Tensor) -> Tensor:
    exponent, q = _fields(blocks, 1, 16)
    return _half_of_e8m0(exponent) * _table(_E2M1_DOUBLED, _nibbles(q).flatten(1))


def _half_of_e8m0(exponent: Tensor) -> Tensor:
    """2^(e - 128), as the table holds doubled values; the two smallest are denormal: ggml_e8m0_to_fp32_half."""
    e = exponent.int()
    return torch.where(e < 2, 0x00200000 << e.clamp(max=1), (e - 1) << 23).view(torch.float32)


def _affine4(blocks: Tensor) -> Tensor:
    d, z, _, q = _fields(blocks, 2, 1, 1, blocks.shape[1] - 4)
    values = _nibbles(q.reshape(len(q), -1, 16)).flatten(1)
    return _halves(d) * (values.short() - z.short()).float()


_MEANING: dict[str, Callable[[Tensor], Tensor]] = {
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "q5_0": _q5_0,
    "q5_1": _q5_1,
    "q8_0": _q8_0,
    "q4_K": _q4_k,
    "q5_K": _q5_k,
    "q6_K": _q6_k,
    "iq4_nl": _iq4_nl,
    "iq4_xs": _iq4_xs,
    "mxfp4": _mxfp4,
    "affine4_32": _affine4,
    "affine4_64": _affine4,
    "affine4_128": _affine4,
}
