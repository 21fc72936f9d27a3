"""What all launches have in common."""

from collections.abc import Callable
from ctypes import Structure, c_uint64

import pytest
import torch

from edgekv.kernels.common.prepared import Grid, Prepared, address_of, blocks_of, kind, launch, row_stride
from edgekv.kernels.rt.registry import KernelSpec


class EkNothing(Structure):
    _fields_ = (("at", c_uint64),)


class Written:
    """Where launches are written down."""

    def __init__(self) -> None:
        self.launches: list[tuple[str, Grid, int, int]] = []

    def launcher(self, spec: KernelSpec) -> Callable[[Grid, Structure, int], None]:
        def write(grid: Grid, args: Structure, stream: int) -> None:
            assert isinstance(args, EkNothing)
            self.launches.append((spec.entry, grid, args.at, stream))

        return write


def test_launches_are_made_one_after_the_other_on_the_stream() -> None:
    written = Written()
    specs = [KernelSpec("attn/a.h", name, 32, EkNothing) for name in ("ek_first", "ek_second")]
    launch([Prepared(specs[0], (1, 2, 3), EkNothing(5)), Prepared(specs[1], (4, 1, 1), EkNothing(6))], written, 77)
    assert written.launches == [("ek_first", (1, 2, 3), 5, 77), ("ek_second", (4, 1, 1), 6, 77)]


def test_types_that_kernels_know_have_numbers() -> None:
    assert [kind(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)] == [0, 1, 2]
    with pytest.raises(ValueError, match=r"torch\.float64 is none of torch\.bfloat16, torch\.float16, torch\.float32"):
        kind(torch.float64)


def test_tensors_are_told_by_address_and_stride() -> None:
    wide = torch.zeros(4, 24)
    assert (address_of(None), address_of(wide[1:])) == (0, wide.data_ptr() + 96)
    assert row_stride(wide[:, 4:12]) == 96
    assert row_stride(wide.view(4, 3, 8)[:, 1:]) == 96
    assert row_stride(torch.zeros(2, 8, device="meta")) == 32


@pytest.mark.parametrize(
    "rows",
    [torch.zeros(4, 24)[:, 1:9], torch.zeros(4, 24)[:, ::2], torch.zeros(4, 6), torch.zeros(4, 3, 8)[:, :, :4]],
    ids=["begin between", "gaps", "rows between", "gaps within"],
)
def test_rows_that_kernels_could_not_read_in_whole_vectors_are_refused(rows: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="not dense or not aligned to 16"):
        row_stride(rows)


def test_blocks_are_rounded_up() -> None:
    assert [blocks_of(number, 4) for number in (0, 1, 4, 5)] == [0, 1, 1, 2]
