"""Weights in the library's own panels: every row comes back from them as what went in, for every kind of file."""

import ctypes
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from edgekv.engine.native import LibraryPacker
from edgekv.kernels.cpu.abi import Matrix
from edgekv.kernels.cpu.library import KernelsUnavailable, load_library
from edgekv.kernels.cpu.program import Pool
from edgekv.model.hf_config import read_spec
from edgekv.model.matrix_layout import WeightForm
from edgekv.model.packed_weights import PackedPart
from edgekv.model.packing import load_packed
from tests.model.quantised_models import SHAPE, make_quantised
from tests.model.test_packing import Recorder, make_mixed_gguf, packed
from tests.model.tiny_models import make_tiny


@pytest.fixture(scope="module", params=[1, 2])
def pool(request: pytest.FixtureRequest) -> Pool:
    try:
        return Pool(load_library(), request.param)
    except KernelsUnavailable as error:
        pytest.skip(str(error))


def rows_of(pool: Pool, part: PackedPart) -> Tensor:
    """Every row of a part in float32, as the library reads it."""
    matrix = Matrix(part.data.ctypes.data, part.format, part.rows, part.cols, part.group)
    rows = np.arange(part.rows, dtype=np.int64)
    out = np.full((part.rows, part.cols), np.nan, np.float32)
    error = pool.library.functions.ek_matrix_rows(
        pool.handle, ctypes.byref(matrix), rows.ctypes.data, len(rows), out.ctypes.data, part.cols
    )
    assert error == 0
    return torch.from_numpy(out)


MIXED = {"*": "Q8_0", "blk.1.attn_v*": "F16", "blk.1.attn_k*": "Q5_0", "blk.0.attn_k*": "Q4_K", "blk.1.ffn_up*": "Q4_K"}
MAKERS: dict[str, Callable[[Path], Path]] = {
    "plain": lambda path: make_tiny("llama", path, **SHAPE | {"intermediate_size": 264}),
    "qwen3": lambda path: make_tiny("qwen3", path, dtype=torch.bfloat16),
    "awq": lambda path: make_quantised(path, "awq", 64)[0],
    "gptq": lambda path: make_quantised(path, "gptq", -1)[0],
    "gguf": lambda path: make_mixed_gguf(path, MIXED),
    "gguf-4": lambda path: make_mixed_gguf(path, {"*": "Q4_0", "blk.0.*": "Q5_1", "token_embd*": "BF16"}),
}
FORMS = [(kind, WeightForm(None)) for kind in MAKERS] + [
    ("plain", WeightForm("bfloat16")),
    ("plain", WeightForm("float16", "int8")),
    ("plain", WeightForm("bfloat16", "int4")),
    ("awq", WeightForm("bfloat16")),
]


@pytest.mark.parametrize(("kind", "form"), FORMS, ids=lambda value: str(value))
def test_rows_come_back_from_the_panels_as_they_went_in(
    kind: str, form: WeightForm, pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgekv.model.stored_rows._CHUNK_BYTES", 20_000)  # several chunks, which end within panels
    path = MAKERS[kind](tmp_path)
    meant, keeper = packed(path, form)
    loaded = load_packed(path, read_spec(path), Recorder, form=form, packer=LibraryPacker(pool))
    for name, matrix in loaded.matrices.items():
        for part, expected in zip(matrix.parts, meant.matrices[name].parts, strict=True):
            # Rows that only fill a panel up are nobody's in the one, and zeros in the other.
            assert torch.equal(rows_of(pool, part), keeper.rows(expected).nan_to_num(0.0)), name
