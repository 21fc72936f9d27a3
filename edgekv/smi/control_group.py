"""What the control groups (version 2) around this process leave it of main memory. Runs in: anywhere; owns: nothing."""

from dataclasses import dataclass
from pathlib import Path

from edgekv.smi.small_files import parse_number, parse_table, read_bytes, read_number


@dataclass(frozen=True, slots=True)
class GroupMemory:
    """The tightest limit on the way up, and how much may still be taken before any group is at its own."""

    limit_bytes: int
    free_bytes: int


def read_group(sysfs: Path, proc: Path, total_bytes: int) -> GroupMemory | None:
    """The limits now; None where no group's limit is below `total_bytes`, the machine's memory."""
    limits, frees = [], []
    for folder in _way_up(sysfs / "fs/cgroup", proc):
        limit = _limit(folder)
        if limit is None or limit >= total_bytes:
            continue
        limits.append(limit)
        frees.append(max(0, limit - _used(folder)))
    return GroupMemory(min(limits), min(frees)) if limits else None


def _way_up(root: Path, proc: Path) -> list[Path]:
    """The process's own group and those around it. In a container the root itself is one, and all that can be seen."""
    for line in (read_bytes(proc / "self/cgroup") or b"").splitlines():
        if line.startswith(b"0::/"):
            parts = [part for part in line[4:].decode("utf-8", "replace").split("/") if part]
            if ".." not in parts:  # a group outside of the container's own namespace has no folder here
                return [root.joinpath(*parts[:count]) for count in range(len(parts), -1, -1)]
    return [root]


def _limit(folder: Path) -> int | None:
    # memory.high is no hard limit: past it, the kernel slows the group down until it has given memory back.
    limits = (read_number(folder / "memory.max"), read_number(folder / "memory.high"))  # "max" is no number
    return min((limit for limit in limits if limit is not None), default=None)


def _used(folder: Path) -> int:
    """What is used beyond page cache that can be dropped."""
    current = read_number(folder / "memory.current") or 0
    table = parse_table(read_bytes(folder / "memory.stat") or b"")
    return max(0, current - (parse_number(table.get(b"inactive_file", b"0")) or 0))
