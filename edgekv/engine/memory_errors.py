"""How running out of memory is told, by whoever it is told. Runs in: anywhere (no torch of its own); owns: nothing.

torch's allocator has an error class of its own. Its CPU allocator raises RuntimeError; what the CUDA or HIP runtime has
no memory for (graphs, code that is loaded when it is first used) comes as AcceleratorError, as a lost device does; and
the matrix libraries say it in their status. None of these is sticky.
"""

import gc
import re
import sys

_WORDS = re.compile(
    r"can't allocate memory|out of memory|(CU|HIP)BLAS_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)|hipErrorOutOfMemory"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the host or the device had no memory for what was tried, and nothing else is wrong."""
    if isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and _WORDS.search(str(error)) is not None


def give_back_cached() -> None:
    """Return what nobody uses any more, but torch's allocator keeps, to the device; nothing where there is no card."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
