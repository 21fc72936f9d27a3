"""amdsmi, AMD's own library, with its ways of failing made one: ReadingFailed. Runs in: anywhere (may block).

Owns: amdsmi's session, from `open` to `close`. The module is imported on use: without its C library it prints to
standard output and raises KeyError, with one of another version AttributeError.
"""

import contextlib
import io
from collections.abc import Callable
from typing import Any, TypeVar

from edgekv.smi.amdgpu_sysfs import CardTotals
from edgekv.smi.pci import parse_pci_address
from edgekv.smi.reader import ReadingFailed

T = TypeVar("T")


class NoLibrary(ReadingFailed):
    """amdsmi or the C library behind it is not installed."""


class OtherVersion(ReadingFailed):
    """The C library and the Python module do not belong together."""


class AmdSmi:
    """An open session of amdsmi."""

    def __init__(self, module: Any) -> None:
        self.module = module

    @classmethod
    def open(cls) -> "AmdSmi":
        """Raises NoLibrary, OtherVersion or, where it does not start, ReadingFailed."""
        module = _import()
        try:
            module.amdsmi_init()
        except Exception as error:  # amdsmi's errors share no base class across versions
            raise ReadingFailed(f"amdsmi does not start: {one_line(error)}") from error
        return cls(module)

    def close(self) -> None:
        """End the session; never raises."""
        with contextlib.suppress(Exception):
            self.module.amdsmi_shut_down()

    def handles(self) -> list[Any]:
        """Every card's handle. Raises ReadingFailed."""
        try:
            return list(self.module.amdsmi_get_processor_handles())
        except Exception as error:
            raise ReadingFailed(f"amdsmi: {one_line(error)}") from error

    def pci_address(self, handle: Any) -> str:
        """Raises ReadingFailed."""
        try:
            address = parse_pci_address(str(self.module.amdsmi_get_gpu_device_bdf(handle)))
        except Exception as error:
            raise ReadingFailed(f"amdsmi: {one_line(error)}") from error
        if address is None:
            raise ReadingFailed("amdsmi does not tell the card's PCI address")
        return address

    def handle(self, pci_id: str | None) -> Any:
        """The card at that address, or the only one. Raises ReadingFailed."""
        handles = self.handles()
        if pci_id is None and len(handles) == 1:
            return handles[0]
        for handle in handles:
            if self.pci_address(handle) == pci_id:
                return handle
        raise ReadingFailed(f"amdsmi knows no card at {pci_id or 'an unnamed address'}")

    def totals(self, handle: Any) -> CardTotals:
        """The card's memory now. Raises ReadingFailed."""
        types = self.module.AmdSmiMemoryType
        try:
            vram_total = int(self.module.amdsmi_get_gpu_memory_total(handle, types.VRAM))
            vram_used = int(self.module.amdsmi_get_gpu_memory_usage(handle, types.VRAM))
        except Exception as error:
            raise ReadingFailed(f"amdsmi: {one_line(error)}") from error
        try:
            gtt_total = int(self.module.amdsmi_get_gpu_memory_total(handle, types.GTT))
            gtt_used = int(self.module.amdsmi_get_gpu_memory_usage(handle, types.GTT))
        except Exception:
            return CardTotals(vram_total, vram_used, None, None)
        return CardTotals(vram_total, vram_used, gtt_total, gtt_used)

    def market_name(self, handle: Any) -> str | None:
        """What the card is sold as; None where amdsmi does not know."""
        name = self._optional(lambda: str(self.module.amdsmi_get_gpu_asic_info(handle)["market_name"]))
        return None if name in (None, "", "N/A") else name

    def bandwidth_bytes_per_s(self, handle: Any) -> int | None:
        """Between the card and its own memory; amdsmi tells it in GB/s where it knows."""
        told = self._optional(lambda: self.module.amdsmi_get_gpu_vram_info(handle)["vram_max_bandwidth"])
        return told * 10**9 if isinstance(told, int) and told > 0 else None

    def version(self) -> str:
        """The C library's."""
        told = self._optional(self.module.amdsmi_get_lib_version)
        return ".".join(str(told[part]) for part in ("major", "minor", "release")) if told else "unknown"

    def _optional(self, ask: Callable[[], T]) -> T | None:
        try:
            return ask()
        except Exception:  # what a card or a version does not tell is done without
            return None


def one_line(error: BaseException) -> str:
    """What the error says, in one line."""
    get_info = getattr(error, "get_error_info", None)
    text = str(get_info() if callable(get_info) else error)
    return " ".join(text.split()) or type(error).__name__


def _import() -> Any:
    try:
        # Its import prints to standard output what it then raises.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            import amdsmi
    except (ImportError, KeyError, OSError) as error:
        raise NoLibrary(f"amdsmi finds no library: {one_line(error)}") from error
    except Exception as error:  # AttributeError: a library of another version than the binding
        raise OtherVersion(f"amdsmi does not fit the installed ROCm library: {one_line(error)}") from error
    return amdsmi
