"""The one way a PCI address is written here: `0000:03:00.0`. Runs in: anywhere; owns: nothing."""

import re

_ADDRESS = re.compile(r"(?:([0-9a-fA-F]{1,8}):)?([0-9a-fA-F]{1,2}):([0-9a-fA-F]{1,2})\.([0-7])")


def pci_address(domain: int, bus: int, device: int, function: int = 0) -> str:
    """The address with these numbers."""
    return f"{domain:04x}:{bus:02x}:{device:02x}.{function:x}"


def parse_pci_address(text: str) -> str | None:
    """NVML writes eight digits of domain, others leave it out, some use capitals; None for what is no address."""
    match = _ADDRESS.fullmatch(text.strip())
    if match is None:
        return None
    domain, bus, device, function = (int(part or "0", 16) for part in match.groups())
    return pci_address(domain, bus, device, function) if device < 32 else None
