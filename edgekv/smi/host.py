"""What main memory and the processor have to offer. Runs in: anywhere; owns: nothing."""

import platform
from dataclasses import dataclass
from pathlib import Path

import psutil


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


def read_memory() -> HostMemory:
    """The memory now; within a memory-limited control group, that limit is the memory."""
    memory = psutil.virtual_memory()
    limit, used = _group_limit()
    if limit is None or limit >= memory.total:
        return HostMemory(memory.total, memory.available)
    return HostMemory(limit, max(0, min(memory.available, limit - used)))


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


def _group_limit(root: Path = Path("/sys/fs/cgroup")) -> tuple[int | None, int]:
    """Limit and use in bytes of the control group (version 2); page cache that can be dropped is not use."""
    try:
        limit = (root / "memory.max").read_text().strip()
        if limit == "max":
            return None, 0
        used = int((root / "memory.current").read_text())
        stat = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
        return int(limit), max(0, used - int(stat.get("inactive_file", 0)))
    except (OSError, ValueError):
        return None, 0
