"""What the device said about its memory at one moment. Runs in: anywhere; owns: nothing (frozen data)."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Holder:
    """Another program and the device memory it holds; `num_bytes` is None where the driver does not tell."""

    pid: int
    name: str
    num_bytes: int | None


@dataclass(frozen=True, slots=True)
class Reading:
    """One sample of a device's memory.

    `used_bytes` is everybody's, with what the driver keeps for itself; `own_bytes` is this process's share, None where
    the driver does not tell (WDDM). `spilled_own_bytes` is what this process wants on the device and has not there:
    on a card that of `amd-evicted-vram` or the like, in unified memory (CPU, APU) its swapped-out bytes. `evicted_ms`
    (time the driver kept our queues stopped) and `major_faults` only ever grow. `at` is in seconds of the clock of
    whoever asked for it. `stale`: the device did not answer, and this is the last that it said.
    """

    total_bytes: int
    used_bytes: int
    own_bytes: int | None
    source: str
    at: float
    spilled_own_bytes: int = 0
    gtt_used_bytes: int | None = None
    evicted_ms: int | None = None
    major_faults: int | None = None
    unified: bool = False
    stale: bool = False
    holders: tuple[Holder, ...] = ()

    @property
    def free_bytes(self) -> int:
        """What no program holds."""
        return max(0, self.total_bytes - self.used_bytes)

    def others_bytes(self, leased_bytes: int = 0) -> int:
        """What other programs hold; where our own share is not told, it is taken to be `leased_bytes`."""
        own = leased_bytes if self.own_bytes is None else self.own_bytes
        return max(0, self.used_bytes - own)
