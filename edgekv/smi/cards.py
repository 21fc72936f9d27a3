"""Which cards there are and how full they are, as far as the vendors' libraries say.

Runs in: anywhere (calls may block: off the trio thread); owns: nothing. The libraries are imported on use, because both
fail in their own ways where their driver is missing: amdsmi raises KeyError or AttributeError at import.
"""

import contextlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Card:
    """One card and its memory now."""

    vendor: Literal["nvidia", "amd"]
    index: int
    name: str
    total_bytes: int
    used_bytes: int
    driver: str

    @property
    def free_bytes(self) -> int:
        """Memory that no program holds."""
        return self.total_bytes - self.used_bytes


@dataclass(frozen=True, slots=True)
class Survey:
    """The cards of one vendor; `problem` says why its library could not be asked, `absent` that this is no fault."""

    vendor: Literal["nvidia", "amd"]
    cards: tuple[Card, ...] = ()
    problem: str | None = None
    absent: bool = False


def survey() -> tuple[Survey, Survey]:
    """Ask both vendors' libraries; never raises."""
    return survey_nvidia(), survey_amd()


def survey_nvidia() -> Survey:
    """NVIDIA's cards through NVML."""
    try:
        import pynvml
    except Exception as error:  # the binding itself may be broken in any way
        return Survey("nvidia", problem=f"the pynvml module cannot be imported: {error}")
    try:
        with _session(pynvml.nvmlInit, pynvml.nvmlShutdown):
            driver = _text(pynvml.nvmlSystemGetDriverVersion())
            handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
            return Survey("nvidia", tuple(_nvidia_card(pynvml, i, h, driver) for i, h in enumerate(handles)))
    except pynvml.NVMLError as error:
        absent = isinstance(error, pynvml.NVMLError_LibraryNotFound | pynvml.NVMLError_DriverNotLoaded)
        return Survey("nvidia", problem=f"NVML: {error}", absent=absent)


def survey_amd() -> Survey:
    """AMD's cards through amdsmi."""
    try:
        # Its import prints to standard output what it then raises.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            import amdsmi
    except (ImportError, KeyError, OSError) as error:
        return Survey("amd", problem=f"amdsmi finds no library: {error}", absent=True)
    except Exception as error:  # AttributeError: a library of another version than the binding
        return Survey("amd", problem=f"amdsmi does not fit the installed ROCm library: {error}")
    try:
        with _session(amdsmi.amdsmi_init, amdsmi.amdsmi_shut_down):
            handles = amdsmi.amdsmi_get_processor_handles()
            return Survey("amd", tuple(_amd_card(amdsmi, i, handle) for i, handle in enumerate(handles)))
    except Exception as error:  # amdsmi's errors share no base class across versions
        first_line = next(iter(str(error).strip().splitlines()), repr(error))
        return Survey("amd", problem=f"amdsmi: {first_line}", absent=True)


def _nvidia_card(pynvml: Any, index: int, handle: Any, driver: str) -> Card:
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
    used = int(memory.used) + int(memory.reserved)
    return Card("nvidia", index, _text(pynvml.nvmlDeviceGetName(handle)), int(memory.total), used, driver)


def _amd_card(amdsmi: Any, index: int, handle: Any) -> Card:
    name = str(amdsmi.amdsmi_get_gpu_asic_info(handle)["market_name"])
    vram = amdsmi.amdsmi_get_gpu_vram_usage(handle)  # MiB
    driver = str(amdsmi.amdsmi_get_gpu_driver_info(handle)["driver_version"])
    return Card("amd", index, name, int(vram["vram_total"]) << 20, int(vram["vram_used"]) << 20, driver)


@contextmanager
def _session(start: Any, end: Any) -> Iterator[None]:
    start()
    try:
        yield
    finally:
        end()


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
