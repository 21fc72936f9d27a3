"""NVML, NVIDIA's own library, with its ways of failing made one: ReadingFailed. Runs in: anywhere (may block).

Owns: one of NVML's sessions (it counts them), from `open` to `close`.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from edgekv.smi.pci import parse_pci_address
from edgekv.smi.reader import ReadingFailed


class NoLibrary(ReadingFailed):
    """NVML, or its Python module, is not installed."""


class NoDriver(ReadingFailed):
    """NVML is there, the kernel's driver is not loaded."""


class OtherVersion(ReadingFailed):
    """The library does not belong to the Python module, or not to the driver."""


class Nvml:
    """An open session of NVML. `missing` says so once a function that is needed was not found in the library."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.missing: str | None = None
        self._memory_version: int | None = module.nvmlMemory_v2
        self._listings: dict[str, Callable[[Any], Any] | None] = {}

    @classmethod
    def open(cls) -> "Nvml":
        """Raises NoLibrary, NoDriver, OtherVersion or, where it does not start otherwise, ReadingFailed."""
        try:
            import pynvml
        except Exception as error:  # the binding itself may be broken in any way
            raise NoLibrary(f"the pynvml module cannot be imported: {error}") from error
        with _failures(pynvml):
            pynvml.nvmlInit()
        return cls(pynvml)

    def close(self) -> None:
        """End the session; never raises."""
        with contextlib.suppress(Exception):
            self.module.nvmlShutdown()

    def num_cards(self) -> int:
        """How many cards NVML knows, lost ones among them. Raises ReadingFailed."""
        with _failures(self.module):
            return int(self.module.nvmlDeviceGetCount())

    def nth(self, index: int) -> Any:
        """The handle of a card by its number in NVML's order (by PCI address). Raises ReadingFailed: it may be lost."""
        with _failures(self.module):
            return self.module.nvmlDeviceGetHandleByIndex(index)

    def handle(self, pci_id: str | None) -> Any:
        """The card at that address, or the only one. Raises ReadingFailed."""
        with _failures(self.module):
            if pci_id is not None:
                try:
                    return self.module.nvmlDeviceGetHandleByPciBusId(pci_id)
                except self.module.NVMLError_NotFound:
                    raise ReadingFailed(f"NVML knows no card at {pci_id}") from None
        if (count := self.num_cards()) != 1:
            raise ReadingFailed(f"NVML: which of {count} cards is meant was not said")
        return self.nth(0)

    def pci_address(self, handle: Any) -> str | None:
        """None where it is not told. Raises ReadingFailed."""
        with _failures(self.module):
            raw = self.module.nvmlDeviceGetPciInfo(handle).busId
        return parse_pci_address(raw.decode("ascii", "replace") if isinstance(raw, bytes) else str(raw))

    def memory(self, handle: Any) -> tuple[int, int]:
        """Total and used bytes, with what the driver keeps for itself. Raises ReadingFailed.

        nvmlMemory_v2 is total = reserved + used + free, and nvidia-smi's three columns; version 1, all there is before
        driver 510, counts the reserved ones as used. So used + reserved there is used here.
        """
        with _failures(self.module):
            if self._memory_version is not None:
                try:
                    memory = self.module.nvmlDeviceGetMemoryInfo(handle, version=self._memory_version)
                    return int(memory.total), int(memory.used) + int(memory.reserved)
                except Exception as error:
                    if not self._is_older(error):
                        raise
                    self._memory_version = None
            memory = self.module.nvmlDeviceGetMemoryInfo(handle)
            return int(memory.total), int(memory.used)

    def processes(self, handle: Any) -> dict[int, int | None]:
        """Bytes by process, of those that compute and those that draw; None: not told (WDDM). Raises ReadingFailed.

        A process that does both is in both of NVML's lists, each time with all that it holds.
        """
        held: dict[int, int | None] = {}
        with _failures(self.module):
            for kind in ("Compute", "Graphics"):
                for process in self._list(kind, handle):
                    told = process.usedGpuMemory
                    before = held.get(int(process.pid))
                    held[int(process.pid)] = before if told is None else max(int(told), before or 0)
        return held

    def process_name(self, pid: int) -> str | None:
        """The last part of the program's path; NVML also knows it for processes outside of our container."""
        path = self.optional("nvmlSystemGetProcessName", pid)
        return str(path).rpartition("/")[2] or None if path else None

    def optional(self, name: str, *args: Any) -> Any:
        """What a function says that need not be there, or need not be supported by this card; None then."""
        try:
            return getattr(self.module, name)(*args)
        except Exception:  # what a card, a driver or a version does not tell is done without
            return None

    def _list(self, kind: str, handle: Any) -> list[Any]:
        if kind not in self._listings:
            names = [f"nvmlDeviceGet{kind}RunningProcesses{version}" for version in ("_v3", "_v2")]
            self._listings[kind] = next((get for name in names if (get := self._works(name, handle))), None)
        get = self._listings[kind]
        return list(get(handle)) if get is not None else []

    def _works(self, name: str, handle: Any) -> Callable[[Any], Any] | None:
        function: Callable[[Any], Any] | None = getattr(self.module, name, None)
        if function is None:
            return None
        try:
            function(handle)
        except Exception as error:
            untold = self.module.NVMLError_NotSupported | self.module.NVMLError_NoPermission
            if self._is_older(error) or isinstance(error, untold):
                return None
            raise
        return function

    def _is_older(self, error: Exception) -> bool:
        module = self.module
        if isinstance(error, module.NVMLError_FunctionNotFound | module.NVMLLibraryMismatchError):
            self.missing = "the installed driver's NVML is older than the pynvml module and lacks some of its functions"
            return True
        return isinstance(error, module.NVMLError_ArgumentVersionMismatch)


@contextmanager
def _failures(module: Any) -> Iterator[None]:
    try:
        yield
    except module.NVMLError_LibraryNotFound as error:
        raise NoLibrary("NVML is not installed (libnvidia-ml.so.1, part of NVIDIA's driver)") from error
    except module.NVMLError_DriverNotLoaded as error:
        raise NoDriver("NVML: NVIDIA's kernel driver is not loaded") from error
    except module.NVMLError_LibRmVersionMismatch as error:
        raise OtherVersion("NVML: the library and the loaded driver differ in version; restart the machine") from error
    except (module.NVMLError_FunctionNotFound, module.NVMLLibraryMismatchError) as error:
        raise OtherVersion("NVML: the driver's library is too old for the pynvml module") from error
    except module.NVMLError as error:
        raise ReadingFailed(f"NVML: {' '.join(str(error).split())}") from error
