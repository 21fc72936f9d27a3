"""How each encoding's blocks come apart into codes, high bits and scales, and back: bytes alone, nothing is computed.

Runs in: anywhere (numpy, no torch); owns: nothing. planes.py says what the planes are; blocks are those of
kernels/quant/dequantise.py. Blocks are uint8 [rows, blocks, block_bytes]. A way apart answers q, h and s of as many
bytes as they have, rows first; a way back is given q and h [rows, groups, bytes] and s [rows, entries, bytes].
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Parts = tuple[Bytes, Bytes | None, Bytes]

GROUP = 32  # columns that a lane takes
_LOW, _FOUR = np.uint8(15), np.uint8(4)  # with plain numbers, types are lost

# ---- codes. In what follows one is a byte of its own: [rows, blocks, groups, 32] and the like.


def _pair(codes: Bytes) -> Bytes:
    """Four bits each, [..., 32] to [..., 16]."""
    return (codes[..., :16] & _LOW) | (codes[..., 16:] << _FOUR)


def _unpair(q: Bytes) -> Bytes:
    return np.concatenate((q & _LOW, q >> _FOUR), -1)


def _chunks(low: Bytes, size: int) -> Bytes:
    """K blocks' low halves: `size` bytes have `size` columns low, then the next `size` high. To [..., groups, 32]."""
    chunks = low.reshape(*low.shape[:-1], -1, size)
    return np.stack((chunks & _LOW, chunks >> _FOUR), -2).reshape(*low.shape[:-1], -1, GROUP)


def _unchunk(codes: Bytes, size: int) -> Bytes:
    chunks = codes.reshape(*codes.shape[:-2], -1, 2, size)
    low = (chunks[..., 0, :] & _LOW) | (chunks[..., 1, :] << _FOUR)
    return low.reshape(*codes.shape[:-2], -1)


def _lift(bits: Bytes, width: int) -> Bytes:
    """`width` bits each, [..., 32], to h: bits i of a byte are those of word i of the codes."""
    words = bits.reshape(*bits.shape[:-1], width, 8 // width, 4)  # [word of h, word of codes, byte]
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    lifted: Bytes = np.bitwise_or.reduce(words << shifts, axis=-2)
    return lifted.reshape(*bits.shape[:-1], 4 * width)


def _unlift(h: Bytes, width: int) -> Bytes:
    words = h.reshape(*h.shape[:-1], width, 1, 4)
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    return ((words >> shifts) & np.uint8((1 << width) - 1)).reshape(*h.shape[:-1], GROUP)


def _by_group(blocks: Bytes) -> Bytes:
    """[rows, blocks, groups, n] to [rows, groups, n]."""
    return blocks.reshape(len(blocks), -1, blocks.shape[-1])


def _by_block(groups: Bytes) -> Bytes:
    """[rows, groups, n] to [rows, blocks of 256, 8, n]."""
    return groups.reshape(len(groups), groups.shape[1] // 8, 8, groups.shape[2])


# ---- blocks of 32 columns (affine4: of its group)


def _split_q8_0(blocks: Bytes) -> Parts:
    halves = blocks[..., 2:].reshape(*blocks.shape[:2], 2, 16)
    return halves.transpose(0, 2, 1, 3), None, blocks[..., :2]


def _join_q8_0(q: Bytes, _h: Bytes, s: Bytes) -> Bytes:
    rows, groups = q.shape[:2]
    halves = q.reshape(rows, 2, groups, 16).transpose(0, 2, 1, 3)
    return np.concatenate((s, halves.reshape(rows, groups, 32)), -1)


def _split_iq4_nl(blocks: Bytes) -> Parts:
    values = _IQ4[_unpair(blocks[..., 2:])].view(np.uint8)
    return _split_q8_0(np.concatenate((blocks[..., :2], values), -1))


def _join_iq4_nl(q: Bytes, h: Bytes, s: Bytes) -> Bytes:
    blocks = _join_q8_0(q, h, s)
    codes = np.searchsorted(_IQ4, blocks[..., 2:].view(np.int8)).astype(np.uint8)
    return np.concatenate((blocks[..., :2], _pair(codes)), -1)


def _split_nibbles(scale_bytes: int, blocks: Bytes) -> Parts:
    """Codes lie in the planes' order behind so many bytes of scales."""
    return blocks[..., scale_bytes:], None, blocks[..., :scale_bytes]


def _join_nibbles(q: Bytes, _h: Bytes, s: Bytes) -> Bytes:
    rows, entries = s.shape[:2]
    return np.concatenate((s, q.reshape(rows, entries, -1)), -1)


def _split_five_bits(scale_bytes: int, blocks: Bytes) -> Parts:
    """The same with four bytes of fifth bits in between, of which bit j is column j's."""
    fifths = np.unpackbits(blocks[..., scale_bytes : scale_bytes + 4], axis=-1, bitorder="little")
    return blocks[..., scale_bytes + 4 :], _lift(fifths, 1), blocks[..., :scale_bytes]


def _join_five_bits(q: Bytes, h: Bytes, s: Bytes) -> Bytes:
    return np.concatenate((s, np.packbits(_unlift(h, 1), axis=-1, bitorder="little"), q), -1)


# ---- super-blocks of 256 columns


def _unpack_six(packed: Bytes) -> Bytes:
    """Eight scales and eight minima of six bits each (get_scale_min_k4), [..., 12] to [..., 8, 2]."""
    scale, minimum, rest = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate((scale & 63, (rest & 15) | ((scale >> 2) & 48)), -1)
    minima = np.concatenate((minimum & 63, (rest >> 4) | ((minimum >> 2) & 48)), -1)
    return np.stack((scales, minima), -1)


def _pack_six(pairs: Bytes) -> Bytes:
    first, last = pairs[..., :4, :], pairs[..., 4:, :]  # [..., 4, 2]
    heads = first | ((last & 48) << 2)
    rest = (last[..., 0] & 15) | (last[..., 1] << 4)
    return np.concatenate((heads[..., 0], heads[..., 1], rest), -1)


def _split_q4_k(blocks: Bytes) -> Parts:
    q = _by_group(_pair(_chunks(blocks[..., 16:], 32)))
    return q, None, _scales_k(blocks)


def _join_q4_k(q: Bytes, _h: Bytes, s: Bytes) -> Bytes:
    return np.concatenate((_header_k(s), _unchunk(_unpair(_by_block(q)), 32)), -1)


def _split_q5_k(blocks: Bytes) -> Parts:
    q = _by_group(_pair(_chunks(blocks[..., 48:], 32)))
    high = blocks[..., None, 16:48]  # bit g of byte j: column j of group g
    fifths = (high >> np.arange(8, dtype=np.uint8)[:, None]) & np.uint8(1)
    return q, _by_group(_lift(fifths, 1)), _scales_k(blocks)


def _join_q5_k(q: Bytes, h: Bytes, s: Bytes) -> Bytes:
    fifths = _unlift(_by_block(h), 1) << np.arange(8, dtype=np.uint8)[:, None]
    high = np.bitwise_or.reduce(fifths, axis=-2)
    return np.concatenate((_header_k(s), high, _unchunk(_unpair(_by_block(q)), 32)), -1)


def _scales_k(blocks: Bytes) -> Bytes:
    pairs = _unpack_six(blocks[..., 4:16])
    return np.concatenate((blocks[..., :4], pairs.reshape(*pairs.shape[:-2], 16)), -1)


def _header_k(s: Bytes) -> Bytes:
    return np.concatenate((s[..., :4], _pack_six(s[..., 4:].reshape(*s.shape[:-1], 8, 2))), -1)


def _split_q6_k(blocks: Bytes) -> Parts:
    q = _by_group(_pair(_chunks(blocks[..., :128], 64)))
    # Twice 32 bytes, each with two bits of column j of four groups.
    high = blocks[..., 128:192].reshape(*blocks.shape[:2], 2, 1, 32)
    tops = (high >> np.arange(0, 8, 2, dtype=np.uint8)[:, None]) & np.uint8(3)
    h = _by_group(_lift(tops.reshape(*blocks.shape[:2], 8, 32), 2))
    padding = np.zeros((*blocks.shape[:2], 2), np.uint8)
    return q, h, np.concatenate((blocks[..., 192:], padding), -1)


def _join_q6_k(q: Bytes, h: Bytes, s: Bytes) -> Bytes:
    tops = _unlift(_by_block(h), 2)
    parts = tops.reshape(*tops.shape[:2], 2, 4, 32) << np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    high = np.bitwise_or.reduce(parts, axis=-2).reshape(*tops.shape[:2], 64)
    return np.concatenate((_unchunk(_unpair(_by_block(q)), 64), high, s[..., :18]), -1)


# Values of iq4_nl (kvalues_iq4nl), in the order of their codes.
_IQ4 = np.array((-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113), np.int8)

Split = Callable[[Bytes], Parts]
Join = Callable[[Bytes, Bytes, Bytes], Bytes]

_AFFINE4: tuple[Split, Join] = (partial(_split_nibbles, 4), _join_nibbles)
WAYS: Mapping[str, tuple[Split, Join]] = MappingProxyType(
    {
        "q8_0": (_split_q8_0, _join_q8_0),
        "iq4_nl": (_split_iq4_nl, _join_iq4_nl),
        "q4_0": (partial(_split_nibbles, 2), _join_nibbles),
        "q4_1": (partial(_split_nibbles, 4), _join_nibbles),
        "q5_0": (partial(_split_five_bits, 2), _join_five_bits),
        "q5_1": (partial(_split_five_bits, 4), _join_five_bits),
        "affine4_32": _AFFINE4,
        "affine4_64": _AFFINE4,
        "affine4_128": _AFFINE4,
        "q4_K": (_split_q4_k, _join_q4_k),
        "q5_K": (_split_q5_k, _join_q5_k),
        "q6_K": (_split_q6_k, _join_q6_k),
    }
)
"""By the encoding's name: apart, and back."""
