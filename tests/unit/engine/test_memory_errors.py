"""Out of memory is told in many ways, and none of them is a lost device."""

import pytest
import torch

from edgekv.actors.fault import is_device_error
from edgekv.engine.device_faults import OutOfCardMemory
from edgekv.engine.memory_errors import give_back_cached, is_out_of_memory

FULL = (
    MemoryError(),
    OutOfCardMemory("cuMemAlloc: CUDA_ERROR_OUT_OF_MEMORY (2)"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    torch.AcceleratorError("HIP error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("HIP error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory"),
)
OTHERS = (
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
    RuntimeError("shape mismatch"),
    ValueError("out of memory"),
)


@pytest.mark.parametrize("error", FULL, ids=repr)
def test_a_full_device_is_no_lost_one(error: BaseException) -> None:
    assert is_out_of_memory(error)
    assert not is_device_error(error)


@pytest.mark.parametrize("error", OTHERS, ids=repr)
def test_what_is_something_else(error: BaseException) -> None:
    assert not is_out_of_memory(error)
    assert is_device_error(error) == ("CUDA error" in str(error))


def test_giving_back_does_nothing_without_a_card() -> None:
    give_back_cached()
