"""Launches are prepared from shapes alone: tensors of the device "meta" have no memory."""

from collections.abc import Callable

import pytest
import torch

from edgekv.kernels.common.prepared import Prepared
from edgekv.kernels.gemm import acts, dequant, gemm, gemv, wide_gemv
from edgekv.kernels.gemm.acts import Int8Rows
from edgekv.kernels.gemm.epilogue import Epilogue
from edgekv.kernels.gemm.matrix import PlaneMatrix
from edgekv.kernels.gemm.shape import WARPS_WANTED, choose_shape
from edgekv.kernels.quant.encodings import Q5_K

META, CPU = torch.device("meta"), torch.device("cpu")
ROWS, COLS, CARD = 600, 5120, 40
GATED = Epilogue.SILU_MUL


def tensor(device: torch.device, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def of_acts(device: torch.device) -> list[Prepared]:
    return [acts.prepare(tensor(device, 3, COLS), Int8Rows.empty(3, COLS, device))]


def of_gemv(device: torch.device) -> list[Prepared]:
    matrix, x = PlaneMatrix.empty(Q5_K, ROWS, COLS, device), Int8Rows.empty(3, COLS, device)
    bias = tensor(device, ROWS, dtype=torch.float32)
    out = tensor(device, 3, ROWS // 2)
    return [gemv.prepare(matrix, x, out, multiprocessors=CARD, epilogue=GATED, bias=bias)]


def of_wide_gemv(device: torch.device) -> list[Prepared]:
    out = tensor(device, 3, ROWS // 2, dtype=torch.float32)
    weights, x = tensor(device, ROWS, COLS), tensor(device, 3, COLS)
    assert wide_gemv.is_supported(weights)
    return [wide_gemv.prepare(weights, x, out, multiprocessors=CARD, epilogue=GATED)]


def of_gemm(device: torch.device) -> list[Prepared]:
    matrix, parts = PlaneMatrix.empty(Q5_K, ROWS, COLS, device), tensor(device, 99_999_999, dtype=torch.float32)
    x, out = tensor(device, 20, COLS), tensor(device, 20, ROWS)
    return gemm.prepare(matrix, x, out, multiprocessors=CARD, parts=parts[:9_999_999])


def of_dequant(device: torch.device) -> list[Prepared]:
    matrix, ids = PlaneMatrix.empty(Q5_K, ROWS, COLS, device), tensor(device, 7, dtype=torch.int32)
    return [
        dequant.prepare(matrix, tensor(device, ROWS, COLS)),
        dequant.prepare(matrix, tensor(device, 7, COLS), ids=ids, scale=2.0),
    ]


@pytest.mark.parametrize("prepare", [of_acts, of_gemv, of_wide_gemv, of_gemm, of_dequant])
def test_without_memory_the_same_is_launched(prepare: Callable[[torch.device], list[Prepared]]) -> None:
    declared, real = prepare(META), prepare(CPU)
    assert [(each.spec, each.grid) for each in declared] == [(each.spec, each.grid) for each in real]
    assert [each.spec.defines for each in declared] == [each.spec.defines for each in real]


def test_a_tall_matrix_is_multiplied_at_once_and_a_wide_one_in_parts() -> None:
    def launches(rows: int, cols: int) -> list[str]:
        matrix, parts = PlaneMatrix.empty(Q5_K, rows, cols, META), tensor(META, 9_999_999, dtype=torch.float32)
        prepared = gemm.prepare(
            matrix, tensor(META, 20, cols), tensor(META, 20, rows), multiprocessors=CARD, parts=parts
        )
        return [each.spec.entry for each in prepared]

    assert launches(100_000, 1024) == ["ek_gemm"]
    assert launches(1024, 8192) == ["ek_gemm", "ek_gemm_merge"]


def test_a_card_of_larger_multiprocessors_shares_rows_among_more_warps() -> None:
    """As one of twice as many does."""
    twice = choose_shape(4096, 512, 1, gated=False, multiprocessors=CARD, warps_wanted=2 * WARPS_WANTED)
    assert twice == choose_shape(4096, 512, 1, gated=False, multiprocessors=2 * CARD)
    once = choose_shape(1024, 512, 1, gated=False, multiprocessors=CARD)
    assert choose_shape(1024, 512, 1, gated=False, multiprocessors=CARD, warps_wanted=2 * WARPS_WANTED) != once
    cut = gemm.choose_cut(4096, 512, gated=False, multiprocessors=CARD, blocks_wanted=2 * gemm.BLOCKS_WANTED)
    assert cut == gemm.choose_cut(4096, 512, gated=False, multiprocessors=2 * CARD)
    assert cut.splits > gemm.choose_cut(4096, 512, gated=False, multiprocessors=CARD).splits


def test_there_may_be_more_tokens_than_a_grid_has_in_y() -> None:
    prepared = acts.prepare(tensor(META, 70_000, COLS), Int8Rows.empty(70_000, COLS, META))
    assert prepared.grid == (70_000, 5, 1)
