"""What main memory and the processor have to offer. Runs in: anywhere; owns: nothing."""

import platform
from dataclasses import dataclass
from pathlib import Path

import psutil

from edgekv.smi.control_group import read_group
from edgekv.smi.small_files import parse_number, parse_table, read_bytes

SYSFS, PROC = Path("/sys"), Path("/proc")


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Main memory: all of it, and what could be had without swapping."""

    total_bytes: int
    available_bytes: int


@dataclass(frozen=True, slots=True)
class Processor:
    """The CPU. `cores` are those this process may use; `features` those of its instruction sets that matter here."""

    name: str
    cores: int
    features: tuple[str, ...]


_FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "asimd", "bf16", "i8mm", "sve")


def read_memory(sysfs: Path = SYSFS, proc: Path = PROC) -> HostMemory:
    """The memory now; within a memory-limited control group, that limit is the memory."""
    table = parse_table(read_bytes(proc / "meminfo") or b"")
    total, available = kib(table, b"MemTotal"), kib(table, b"MemAvailable")
    if total is None or available is None:  # not Linux, or one without /proc
        memory = psutil.virtual_memory()
        total, available = memory.total, memory.available
    group = read_group(sysfs, proc, total)
    if group is None:
        return HostMemory(total, min(available, total))
    return HostMemory(group.limit_bytes, min(available, group.free_bytes, group.limit_bytes))


def kib(table: dict[bytes, bytes], name: bytes) -> int | None:
    """Bytes of a line such as `MemTotal: 16318412 kB`."""
    number = parse_number(table.get(name, b"").removesuffix(b"kB"))
    return None if number is None else number << 10


def read_processor() -> Processor:
    """The processor; features are known on Linux only."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if colon:
            fields.setdefault(name.strip(), value.strip())
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    name = fields.get("model name") or platform.processor() or platform.machine()
    cores = len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else psutil.cpu_count() or 1
    return Processor(name, cores, tuple(feature for feature in _FEATURES if feature in flags))
