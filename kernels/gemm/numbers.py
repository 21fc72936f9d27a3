"""numbers.h: rows of numbers as kernels take them. Runs in: engine thread; owns: nothing."""

from torch import Tensor

ALIGNMENT = 16  # of a row's address


def are_rows(x: Tensor, rows: int, cols: int) -> bool:
    """Whether `x` is [rows, cols], neighbouring columns side by side, each row from a multiple of 16 bytes on.

    What a row is followed by does not matter, nor what a tensor of the device "meta" would have at which address.
    """
    if x.shape != (rows, cols) or (cols > 1 and x.stride(1) != 1):
        return False
    return x.data_ptr() % ALIGNMENT == 0 and (rows == 1 or x.stride(0) * x.itemsize % ALIGNMENT == 0)


def described(x: Tensor) -> str:
    """For messages about tensors that are something else."""
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} of strides {list(x.stride())}"
