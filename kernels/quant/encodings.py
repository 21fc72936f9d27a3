"""The ways in which files store the rows of a matrix: how many columns make a block, and how many bytes that takes.

Runs in: anywhere (no torch); owns: nothing. `dequantise.py` says what the bytes of a block mean. The quantised
encodings are those of GGUF, named as there; affine4 is ours, for checkpoints of AWQ and GPTQ:

    for each `group` columns { f16 d; u8 z; u8 0; [group / 32][16] u8 q }     w = d (q - z)
    byte j of the 16 that 32 columns take: low nibble column j, high nibble column j + 16
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Encoding:
    """One way to store a row: blocks of `block_cols` columns in `block_bytes` bytes, end to end.

    `number` is what the compiled library calls it; `group` is the columns that share a scale where a number stands
    for several sizes (affine4), else 0.
    """

    name: str
    number: int
    block_cols: int
    block_bytes: int
    group: int = 0

    def row_bytes(self, cols: int) -> int:
        """Bytes of a row; raises ValueError where `cols` are no whole number of blocks."""
        blocks, rest = divmod(cols, self.block_cols)
        if rest or cols < 0:
            raise ValueError(f"{cols:,} columns are no multiple of the {self.block_cols} that a {self.name} block has")
        return blocks * self.block_bytes

    @property
    def is_float(self) -> bool:
        """Whether a column is a floating-point number of its own."""
        return self.block_cols == 1


F32 = Encoding("f32", 0, 1, 4)
F16 = Encoding("f16", 1, 1, 2)
BF16 = Encoding("bf16", 2, 1, 2)
Q4_0 = Encoding("q4_0", 3, 32, 18)
Q4_1 = Encoding("q4_1", 4, 32, 20)
Q5_0 = Encoding("q5_0", 5, 32, 22)
Q5_1 = Encoding("q5_1", 6, 32, 24)
Q8_0 = Encoding("q8_0", 7, 32, 34)
Q4_K = Encoding("q4_K", 8, 256, 144)
Q5_K = Encoding("q5_K", 9, 256, 176)
Q6_K = Encoding("q6_K", 10, 256, 210)
IQ4_NL = Encoding("iq4_nl", 11, 32, 18)
IQ4_XS = Encoding("iq4_xs", 12, 256, 136)
MXFP4 = Encoding("mxfp4", 13, 32, 17)
AFFINE4_32 = Encoding("affine4_32", 14, 32, 20, group=32)
AFFINE4_64 = Encoding("affine4_64", 14, 64, 36, group=64)
AFFINE4_128 = Encoding("affine4_128", 14, 128, 68, group=128)

AFFINE4: Mapping[int, Encoding] = MappingProxyType({32: AFFINE4_32, 64: AFFINE4_64, 128: AFFINE4_128})
"""By group size."""

_FLOATS = (F32, F16, BF16)
_GGUF_BLOCKS = (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, MXFP4)
ENCODINGS: Mapping[str, Encoding] = MappingProxyType(
    {encoding.name: encoding for encoding in (*_FLOATS, *_GGUF_BLOCKS, *AFFINE4.values())}
)
"""All, by name."""
