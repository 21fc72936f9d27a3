"""A card, other programs and a pool that obeys at once, in plain arithmetic: what the pressure policy is tried on."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise

from edgekv.core.pressure import Decision, PoolFacts, PressurePolicy
from edgekv.core.reading import Reading
from edgekv.core.spill import Headroom

MIB = 1 << 20
GIB = 1 << 30
SEGMENT = 64 * MIB


@dataclass
class SimulatedCard:
    """Time goes on in ticks of 50 ms. An order is carried out after `step_s`; `lag_s` later the memory is there, and
    `report_s` later the engine's word of it.

    Others want what `wanted` says. Where `evicts` (amdgpu), they get it, and what is ours is driven out of the card for
    it; else (CUDA on Linux) they get what there is and try again.
    """

    wanted: Callable[[float], int]
    total_bytes: int = 16 * GIB
    weights_bytes: int = 2 * GIB
    ceiling_bytes: int = 12 * GIB
    most_bytes: int | None = None
    floor_bytes: int = 0
    evicts: bool = True
    lag_s: float = 0.0
    step_s: float = 0.05
    report_s: float = 0.0
    busy: bool = True
    tells_own: bool = True
    unified: bool = False
    heals: bool = True
    tick_s: float = 0.05
    starved: Callable[[int], bool] = field(default=lambda kv_bytes: False)
    policy: PressurePolicy = field(init=False)

    def __post_init__(self) -> None:
        self.headroom = Headroom.of(self.total_bytes)
        self.policy = PressurePolicy(self.headroom, self.most_bytes)
        self.now = 0.0
        self.others_bytes = self.wanted(0.0)
        room = self.total_bytes - self.headroom.num_bytes - self.others_bytes - self.weights_bytes
        self.kv_bytes = max(0, min(self.ceiling_bytes, room)) // SEGMENT * SEGMENT
        self.given_back = self.taken = self.num_resizes = 0
        self.history: list[tuple[float, int, int]] = []  # (at, free, others)
        self.decisions: list[tuple[float, Decision]] = []
        self.moves: list[tuple[float, int]] = []  # (at, bytes taken or, negative, given back)
        self.spilled_bytes = self.evicted_ms = 0
        self.silent = self.refuses_growth = False
        self._held = self.kv_bytes  # what the driver still has as ours: given back memory goes after `lag_s`
        self._leaving: list[tuple[float, int]] = []
        self._order: tuple[float, Decision] | None = None
        self.ordered_at = 0.0
        self._next_poll = 0.0
        self._last: Reading | None = None
        self._reports: list[tuple[float, PoolFacts]] = []
        self._facts = self._report()

    @property
    def own_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes

    @property
    def free_bytes(self) -> int:
        """The truth, negative where the card is overfull."""
        return self.total_bytes - self.weights_bytes - self._held - self.others_bytes

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.tick()

    def tick(self) -> None:
        while self._leaving and self._leaving[0][0] <= self.now:
            self._held -= self._leaving.pop(0)[1]
        wanted = self.wanted(self.now)
        room = self.total_bytes - self.weights_bytes - self._held
        self.others_bytes = wanted if self.evicts else max(min(wanted, self.others_bytes), min(wanted, room))
        if self._order is not None and self.now >= self._order[0]:
            self._obey(self._order[1])
            self._order = None
        if self.now >= self._next_poll:
            self._poll()
        self.history.append((self.now, self.free_bytes, self.others_bytes))
        self.now = round(self.now + self.tick_s, 6)

    def _poll(self) -> None:
        own = self.weights_bytes + self._held
        evicted = max(0, -self.free_bytes) if self.evicts else 0
        if self.silent and self._last is not None:
            reading = replace(self._last, stale=True)
        else:
            reading = self._last = Reading(
                total_bytes=self.total_bytes,
                used_bytes=min(self.total_bytes, own - self.spilled_bytes + self.others_bytes),
                own_bytes=own - evicted - self.spilled_bytes if self.tells_own else None,
                source="simulated",
                at=self.now,
                spilled_own_bytes=self.spilled_bytes + evicted,
                evicted_ms=self.evicted_ms,
                unified=self.unified,
            )
        while self._reports and self._reports[0][0] <= self.now:
            self._facts = self._reports.pop(0)[1]
        decision = self.policy.observe(
            reading, self._facts, busy=self.busy, now=self.now, starved=self.starved(self.kv_bytes)
        )
        self.decisions.append((self.now, decision))
        if decision.shrink_bytes or decision.grow_bytes:
            assert self._order is None, "a second order while one is under way"
            self._order = (round(self.now + self.step_s, 6), decision)
            self.ordered_at = self.now
        self._next_poll = self.now + decision.next_poll_s

    def tell(self) -> None:
        """The policy hears of the pool as it is."""
        self._facts = self._report()

    def _report(self) -> PoolFacts:
        return PoolFacts(
            kv_bytes=self.kv_bytes,
            leased_bytes=self.own_bytes,
            segment_bytes=SEGMENT,
            ceiling_bytes=self.ceiling_bytes,
            floor_bytes=self.floor_bytes,
            given_back_bytes=self.given_back,
            taken_bytes=self.taken,
            num_resizes=self.num_resizes,
        )

    def _obey(self, decision: Decision) -> None:
        """Whole segments, as the engine does: at least what is to be given back, at most what may be taken."""
        if decision.shrink_bytes:
            wanted = -(-decision.shrink_bytes // SEGMENT) * SEGMENT
            moved = -min(wanted, self.kv_bytes - self.floor_bytes)
        else:
            moved = 0 if self.refuses_growth else decision.grow_bytes
            if self.kv_bytes + moved < self.ceiling_bytes:
                moved = moved // SEGMENT * SEGMENT
        self.kv_bytes += moved
        if moved > 0:
            self._held += moved
        else:
            self._leaving.append((self.now + self.lag_s, -moved))
        self.given_back += max(0, -moved)
        self.taken += max(0, moved)
        if self.heals:
            self.spilled_bytes = max(0, self.spilled_bytes - max(0, -moved))
        self.num_resizes += 1
        self._reports.append((self.now + self.report_s, self._report()))
        if moved:
            self.moves.append((self.now, moved))

    def reversals(self) -> int:
        """How often memory that had been taken was given back again."""
        signs = [moved > 0 for _, moved in self.moves]
        return sum(before and not after for before, after in pairwise(signs))
