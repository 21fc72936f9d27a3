"""What a source of readings is. Runs in: anywhere (calls may block: off the trio thread); owns: nothing."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from edgekv.core.reading import Reading
from edgekv.errors import EdgeKVError


@dataclass(frozen=True, slots=True)
class Watched:
    """Which device the memory guard is to read: a vendor's card by its PCI address (`0000:03:00.0`), or main memory."""

    vendor: Literal["cpu", "nvidia", "amd"]
    pci_id: str | None = None


class ReadingFailed(EdgeKVError):
    """A source gave no reading; the message says why in one line. Another `open` may help, if not at once."""


class Reader(Protocol):
    """An open source; one thread at a time calls it, and any call may block for as long as the driver likes."""

    def read(self, at: float) -> Reading:
        """The device's memory now; `at` is the moment on the caller's clock. Raises ReadingFailed."""
        ...

    def close(self) -> None:
        """Let go of the driver. Never raises."""
        ...


@dataclass(frozen=True, slots=True)
class Source:
    """A way to read one device. `open` blocks and raises ReadingFailed where this way is not there."""

    name: str
    open: Callable[[], Reader]
