"""Blocks are as large as the gguf package says, and rows are whole blocks."""

import subprocess
import sys

import gguf
import pytest

from edgekv.kernels.quant.encodings import AFFINE4, ENCODINGS, F32, Q4_K, Encoding

OF_GGUF = [encoding for encoding in ENCODINGS.values() if encoding.group == 0]


@pytest.mark.parametrize("encoding", OF_GGUF, ids=lambda encoding: encoding.name)
def test_a_block_is_as_large_as_ggufs(encoding: Encoding) -> None:
    kind = gguf.GGMLQuantizationType[encoding.name.upper()]
    assert gguf.GGML_QUANT_SIZES[kind] == (encoding.block_cols, encoding.block_bytes)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_an_affine_group_is_its_scale_and_zero_and_half_a_byte_a_column(group: int) -> None:
    encoding = AFFINE4[group]
    assert (encoding.group, encoding.block_cols, encoding.block_bytes) == (group, group, 4 + group // 2)
    assert encoding.number == 14


def test_names_are_keys_and_numbers_name_a_layout() -> None:
    assert all(name == encoding.name for name, encoding in ENCODINGS.items())
    assert sorted(encoding.number for encoding in ENCODINGS.values()) == [*range(14), 14, 14, 14]


def test_rows_are_whole_blocks() -> None:
    assert (Q4_K.row_bytes(1024), Q4_K.row_bytes(0), F32.row_bytes(3)) == (576, 0, 12)
    with pytest.raises(ValueError, match="1,000 columns are no multiple of the 256 that a q4_K block has"):
        Q4_K.row_bytes(1000)
    with pytest.raises(ValueError, match="no multiple"):
        F32.row_bytes(-4)


def test_only_plain_numbers_are_floats() -> None:
    assert [encoding.name for encoding in ENCODINGS.values() if encoding.is_float] == ["f32", "f16", "bf16"]


def test_torch_is_not_needed() -> None:
    program = (
        "import sys, edgekv.kernels.quant.encodings, edgekv.formats.gguf_checkpoint; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
