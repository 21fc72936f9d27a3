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
    """Leases against a budget in bytes, and earmarks that say what part of a lease holds what.

    Invariant: the sum of the leases never exceeds the budget, and what is earmarked within the leases of one name never
    exceeds these. `wanted_bytes` is the budget last asked for, where that is below the leases; the budget follows down
    to it as leases are released.
    """

    budget_bytes: int
    wanted_bytes: int | None = None
    _leases: list[Lease] = field(default_factory=list)
    _earmarks: dict[str, tuple[str, int]] = field(default_factory=dict)
    version: int = 0
    """Another one whenever anything has changed."""

    @property
    def leased_bytes(self) -> int:
        """The sum of all leases."""
        return sum(lease.num_bytes for lease in self._leases)

    @property
    def free_bytes(self) -> int:
        """What can still be reserved."""
        return self.budget_bytes - self.leased_bytes

    @property
    def owed_bytes(self) -> int:
        """What has to be released before the budget is what was asked for."""
        return 0 if self.wanted_bytes is None else self.budget_bytes - self.wanted_bytes

    @property
    def earmarks(self) -> dict[str, tuple[str, int]]:
        """By name: the lease it is within, and bytes."""
        return dict(self._earmarks)

    def leases(self, name: str) -> list[Lease]:
        """The leases of one name, oldest first."""
        return [lease for lease in self._leases if lease.name == name]

    def set_budget(self, num_bytes: int) -> int:
        """Change the budget, never to less than is leased; returns what is owed."""
        self.version += 1
        leased = self.leased_bytes
        self.budget_bytes = max(num_bytes, leased)
        self.wanted_bytes = num_bytes if num_bytes < leased else None
        return self.owed_bytes

    def reserve(self, name: str, num_bytes: int) -> Lease:
        """Take a lease. Raises OverBudget with the numbers where the budget does not hold it."""
        if num_bytes < 0:
            raise ValueError(f"{name}: a lease of {num_bytes} bytes")
        if num_bytes > self.free_bytes:
            raise OverBudget(name, num_bytes, self.free_bytes, self.budget_bytes)
        lease = Lease(name, num_bytes)
        self._leases.append(lease)
        self.version += 1
        return lease

    def release(self, lease: Lease) -> None:
        """Give a lease back. Raises ValueError if it is not on this ledger."""
        self._leases.remove(lease)
        self.version += 1
        if self.wanted_bytes is not None:
            self.set_budget(self.wanted_bytes)

    def earmark(self, name: str, within: str, num_bytes: int) -> None:
        """Say that `num_bytes` of the leases called `within` hold `name`, in place of what was said before; 0: no more.

        Raises ValueError, changing nothing, for more than those leases have beside other earmarks.
        """
        others = sum(size for other, (lease, size) in self._earmarks.items() if lease == within and other != name)
        leased = sum(lease.num_bytes for lease in self.leases(within))
        if not 0 <= num_bytes <= leased - others:
            raise ValueError(f"{name}: {num_bytes} bytes of {within}, which has {leased - others} to be earmarked")
        self._earmarks.pop(name, None)
        self.version += 1
        if num_bytes:
            self._earmarks[name] = (within, num_bytes)

    def statement(self) -> dict[str, int]:
        """Bytes by name, in the order of the first lease of each name."""
        totals: dict[str, int] = {}
        for lease in self._leases:
            totals[lease.name] = totals.get(lease.name, 0) + lease.num_bytes
        return totals

    def check_integrity(self) -> None:
        """Raise AssertionError where the invariant does not hold."""
        statement = self.statement()
        leased = self.leased_bytes
        assert leased <= self.budget_bytes, f"{leased} bytes leased of a budget of {self.budget_bytes}"
        assert all(lease.num_bytes >= 0 for lease in self._leases), "a lease of less than nothing"
        if self.wanted_bytes is not None:
            assert self.budget_bytes == leased > self.wanted_bytes, "the budget is neither what was asked nor leased"
        earmarked: dict[str, int] = {}
        for within, num_bytes in self._earmarks.values():
            earmarked[within] = earmarked.get(within, 0) + num_bytes
        for within, num_bytes in earmarked.items():
            assert num_bytes <= statement.get(within, 0), f"{num_bytes} bytes of {within} are earmarked, and not leased"
