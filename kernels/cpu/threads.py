"""How many threads the kernels get when nobody says. Runs in: anywhere; owns: nothing."""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

SYSFS, PROC = Path("/sys"), Path("/proc")
VARIABLE = "OMP_NUM_THREADS"
MOST_THREADS = 1024  # that a pool takes
_FEW = 4


def default_threads(sysfs: Path = SYSFS, proc: Path = PROC) -> int:
    """What `asked_threads` says, else the physical cores that this process may use, one kept free of many.

    Two threads of one core would share its caches and arithmetic, and reading weights needs neither twice. What cannot
    be asked for counts as nothing, as it does for OpenMP.
    """
    with suppress(ValueError):
        if (asked := asked_threads()) is not None:
            return asked
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = min(physical_cores(cpus, sysfs), processor_quota(sysfs, proc) or len(cpus))
    return min(cores - 1, MOST_THREADS) if cores > _FEW else max(cores, 1)


def asked_threads() -> int | None:
    """The first number of OMP_NUM_THREADS; None where it is not set. Raises ValueError, which says what it may be."""
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        return None
    first = text.split(",")[0].strip()
    # Thousands of digits are more than int() takes.
    if not (first.isascii() and first.isdigit() and len(first) < 10 and 1 <= int(first) <= MOST_THREADS):
        shown = text if len(text) <= 40 else f"{text[:40]}…"
        raise ValueError(f"{VARIABLE}={shown} is ignored: it must be a whole number from 1 to {MOST_THREADS}")
    return int(first)


def physical_cores(cpus: Iterable[int], sysfs: Path = SYSFS) -> int:
    """Cores that these processors are threads of; each is its own where the kernel does not say."""
    cores = set()
    for cpu in cpus:
        topology = sysfs / "devices/system/cpu" / f"cpu{cpu}" / "topology"
        cores.add(_read(topology / "core_cpus_list") or _read(topology / "thread_siblings_list") or str(cpu))
    return len(cores)


def processor_quota(sysfs: Path = SYSFS, proc: Path = PROC) -> int | None:
    """Whole processors' worth of time that the tightest control group around this process allows; None: no limit.

    Control groups of either version; a group's limit binds all groups in it.
    """
    quotas = []
    for line in (_read(proc / "self/cgroup") or "").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            root, version = sysfs / "fs/cgroup", 2
        elif "cpu" in controllers.split(","):
            root, version = sysfs / "fs/cgroup" / "cpu", 1
        else:
            continue
        parts = [part for part in path.split("/") if part and part != ".."]
        for depth in range(len(parts) + 1):
            quotas.append(_quota(root.joinpath(*parts[:depth]), version))
    found = [quota for quota in quotas if quota is not None]
    return max(1, int(min(found))) if found else None


def _quota(group: Path, version: int) -> float | None:
    if version == 2:
        words = (_read(group / "cpu.max") or "").split()
    else:
        words = [_read(group / "cpu.cfs_quota_us") or "", _read(group / "cpu.cfs_period_us") or ""]
    if len(words) != 2 or not all(word.isdigit() for word in words) or int(words[1]) == 0:
        return None  # "max", -1, or no such file
    return int(words[0]) / int(words[1])


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii").strip() or None
    except (OSError, ValueError):
        return None
