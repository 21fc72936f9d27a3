"""The ways in which a device's memory can be read, the best first. Runs in: anywhere; owns: nothing."""

from functools import partial
from pathlib import Path

from edgekv.smi.amd import open_amdsmi, open_sysfs
from edgekv.smi.host import PROC, SYSFS
from edgekv.smi.main_memory import HostReader
from edgekv.smi.nvidia import open_nvml
from edgekv.smi.reader import Source, Watched


def sources_for(watched: Watched, *, sysfs: Path = SYSFS, proc: Path = PROC) -> tuple[Source, ...]:
    """The sources of `watched`. Nothing is opened, and no vendor's library imported, before a source is."""
    match watched.vendor:
        case "nvidia":
            return (Source("nvml", partial(open_nvml, watched.pci_id, proc)),)
        case "amd":
            return (
                Source("amdsmi", partial(open_amdsmi, watched.pci_id, sysfs, proc)),
                Source("sysfs", partial(open_sysfs, watched.pci_id, sysfs, proc)),
            )
        case "cpu":
            return (Source("host", partial(HostReader, sysfs, proc)),)
