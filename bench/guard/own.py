"""What a process has asked for, told by the kernel rather than by the process.

Runs in: anywhere (reads /proc); owns: the moment that it counts from.

On the processor a KV segment is one private mapping, as it is one allocation on a card, mapped when it is added and
gone when it is removed. Whether its pages have been touched does not matter: on a card they would be taken at once.
"""

from pathlib import Path

LEAST_BYTES = 12 << 20  # more than a thread's stack (8 MiB), less than a segment


class OwnMeter:
    """Counts from a moment at which what the process holds is known.

    Args:
        pid: the process.
        known_bytes: what it holds of the device now.
    """

    def __init__(self, pid: int, known_bytes: int, proc: Path = Path("/proc")) -> None:
        self._maps = proc / str(pid) / "maps"
        self._offset = known_bytes - self._mapped()

    def read(self) -> int:
        """What it holds now, in bytes. Raises OSError where the process has ended."""
        return max(0, self._mapped() + self._offset)

    def _mapped(self) -> int:
        return mapped_bytes(self._maps.read_text(encoding="ascii", errors="replace"))


def mapped_bytes(maps: str) -> int:
    """Bytes of the large private writable mappings without a file, neighbours together, in the text of a maps file."""
    total = 0
    for line in maps.splitlines():
        fields = line.split(maxsplit=5)
        if fields[1] != "rw-p" or len(fields) > 5:
            continue
        start, end = (int(address, 16) for address in fields[0].split("-"))
        if end - start >= LEAST_BYTES:
            total += end - start
    return total
