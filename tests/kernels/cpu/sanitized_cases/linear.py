"""Packing, looking up rows, and linear layers of up to three parts, in all encodings."""

import ctypes

import numpy as np

from edgekv.kernels.cpu import abi
from edgekv.kernels.cpu.abi import Epilogue
from edgekv.kernels.cpu.formats import panel_bytes, panel_format
from edgekv.kernels.quant.encodings import ENCODINGS, Encoding
from tests.kernels.cpu.sanitized_cases._memory import any_pool, guarded, library


def run(rng: np.random.Generator) -> None:
    gated = bool(rng.integers(0, 4) == 0)
    cols = int(rng.choice([32, 64, 256, 512, 768]))
    usable = [encoding for encoding in ENCODINGS.values() if cols % encoding.block_cols == 0]
    tokens = int(rng.choice([1, 2, 3, 4, 5, 7, 9, 13, 17, 29, 50]))
    if rng.integers(0, 6) == 0:  # floats alone may have any number of columns
        cols = int(rng.integers(1, 70))
        usable = [encoding for encoding in usable if encoding.is_float]
    chosen = [usable[int(i)] for i in rng.integers(0, len(usable), 1 if gated else rng.integers(1, 4))]
    rows = [32 * int(rng.integers(1, 4)) if gated else int(rng.integers(1, 70)) for _ in chosen]
    handle = any_pool(rng)
    parts = (abi.Matrix * len(chosen))(
        *(packed(handle, encoding, count, cols, rng) for encoding, count in zip(chosen, rows, strict=True))
    )
    columns = sum(rows) // 2 if gated else sum(rows)
    out = guarded((tokens, columns + int(rng.integers(0, 3))), np.float32, last=columns)
    bias = guarded(sum(rows), np.float32)
    acts = activations(tokens, cols, rng)
    epilogues = (Epilogue.SILU_MUL, Epilogue.GELU_MUL) if gated else (Epilogue.STORE, Epilogue.ADD)
    linear = abi.Linear(
        parts=ctypes.addressof(parts), num_parts=len(parts), epilogue=int(rng.choice(epilogues)),
        bias=bias.ctypes.data if rng.integers(0, 2) else None, acts=ctypes.addressof(acts),
        out=out.ctypes.data, out_stride=out.shape[1], tokens=tokens,
    )  # fmt: skip
    assert library().functions.ek_linear_run(handle, ctypes.byref(linear)) == 0


def packed(handle: int, encoding: Encoding, rows: int, cols: int, rng: np.random.Generator) -> abi.Matrix:
    """Random bytes in panels, one of whose rows is looked up."""
    panels, row_bytes = panel_format(encoding), encoding.row_bytes(cols)
    data = guarded(panel_bytes(panels, rows, cols, encoding.group), np.uint8)
    raw = guarded((rows, row_bytes + int(rng.integers(0, 3))), np.uint8, last=row_bytes)
    raw[:, :row_bytes] = rng.integers(0, 256, (rows, row_bytes), np.uint8)
    places = guarded(rows, np.int64)
    places[:] = rng.permutation(rows)
    matrix = abi.Matrix(data.ctypes.data, int(panels), rows, cols, encoding.group)
    functions = library().functions
    assert not functions.ek_pack(
        handle, encoding.number, encoding.group, raw.ctypes.data, raw.shape[1], rows, places.ctypes.data,
        ctypes.byref(matrix),
    )  # fmt: skip
    wanted, values = guarded(3, np.int64), guarded((3, cols), np.float32)
    wanted[:] = rng.integers(0, rows, 3)
    assert not functions.ek_matrix_rows(
        handle, ctypes.byref(matrix), wanted.ctypes.data, 3, values.ctypes.data, cols
    )
    return matrix


def activations(tokens: int, cols: int, rng: np.random.Generator) -> abi.Acts:
    """All forms, with no more room in the last row than a matrix may read."""
    groups, odd, gap = -(-cols // 32), cols % 2, int(rng.integers(0, 4))
    arrays = (
        guarded((tokens, cols + gap), np.float32, last=cols),
        guarded((tokens, cols + odd + 2 * gap), np.uint16, last=cols + odd),
        guarded((tokens, 32 * (groups + gap)), np.int8, last=32 * groups),
        guarded((tokens, groups + gap), np.float32, last=groups),
        guarded((tokens, groups + gap), np.int32, last=groups),
    )
    arrays[2][:, : 32 * groups] = rng.integers(-127, 128, (tokens, 32 * groups), np.int8)
    arrays[4][:, :groups] = arrays[2][:, : 32 * groups].reshape(tokens, groups, 32).sum(2)
    return abi.Acts(*(each.ctypes.data for each in arrays), *(each.shape[1] for each in arrays[:4]))
