"""The machine and what else it was doing, in the words of a result's first lines. Runs in: anywhere; owns: nothing."""

import os
import platform
from pathlib import Path

from bench.gpu.rig import Rig


def describe(rig: Rig) -> list[str]:
    """The card, its driver, torch, and the host."""
    host = f"{platform.system()} {platform.machine()}, {_processor()}, Python {platform.python_version()}"
    return [*rig.about(), host]


def describe_load(rig: Rig) -> str:
    """Now."""
    host = f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    return ", ".join(filter(None, (rig.load(), host)))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "processor not known"
    names = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    return ", ".join(sorted(names)) or platform.processor() or "processor not known"
