"""The ledger of one device: every byte that edgekv puts there is a named lease on it.

Runs in: anywhere, by one owner; owns: the leases.
"""

from dataclasses import dataclass, field

from edgekv.errors import OverBudget


@dataclass(slots=True, eq=False)
class Lease:
    """The right to `num_bytes` of the device under `name`, until it is released."""

    name: str
    num_bytes: int


@dataclass(slots=True)
class Ledger:
    """Leases against a budget in bytes. Invariant: the sum of the leases never exceeds the budget."""

    budget_bytes: int
    _leases: list[Lease] = field(default_factory=list)

    @property
    def leased_bytes(self) -> int:
        """The sum of all leases."""
        return sum(lease.num_bytes for lease in self._leases)

    @property
    def free_bytes(self) -> int:
        """What can still be reserved."""
        return self.budget_bytes - self.leased_bytes

    def leases(self, name: str) -> list[Lease]:
        """The leases of one name, oldest first."""
        return [lease for lease in self._leases if lease.name == name]

    def reserve(self, name: str, num_bytes: int) -> Lease:
        """Take a lease. Raises OverBudget with the numbers where the budget does not hold it."""
        if num_bytes < 0:
            raise ValueError(f"{name}: a lease of {num_bytes} bytes")
        if num_bytes > self.free_bytes:
            raise OverBudget(name, num_bytes, self.free_bytes, self.budget_bytes)
        lease = Lease(name, num_bytes)
        self._leases.append(lease)
        return lease

    def release(self, lease: Lease) -> None:
        """Give a lease back. Raises ValueError if it is not on this ledger."""
        self._leases.remove(lease)

    def statement(self) -> dict[str, int]:
        """Bytes by name, in the order of the first lease of each name."""
        totals: dict[str, int] = {}
        for lease in self._leases:
            totals[lease.name] = totals.get(lease.name, 0) + lease.num_bytes
        return totals
