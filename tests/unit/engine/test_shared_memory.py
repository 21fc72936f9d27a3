"""Two pools under one guard: the draft's memory is the first to go, and the target's the first to come back."""

import pytest

from edgekv.core.pressure import PressurePolicy
from edgekv.core.reading import Reading
from edgekv.core.scheduler import Outcome
from edgekv.core.spill import Headroom
from edgekv.core.step import StepPlan
from edgekv.engine import draft_memory
from edgekv.engine.shortage import Shortage
from tests.unit.engine.draft_parts import (
    DRAFT_ALL,
    DRAFT_FIXED,
    DRAFT_SEGMENT,
    MIB,
    TARGET_SEGMENT,
    Parts,
)

GAME_BYTES = 268 * MIB  # of the 400 MiB of a `Guard`: beside the weights no pool fits any more


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_memory, "give_back_cached", lambda: None)


def test_the_draft_gives_its_keys_and_values_then_its_weights_and_only_then_the_targets_pool_gives() -> None:
    parts = Parts()
    given = [parts.shrink(mib) for mib in (8, 8, 8, 1, 1, 64, 64)]
    assert given == [12, 8, 56, 32, 32, 32, 0]


@pytest.mark.parametrize(
    ("asked", "left"),
    [
        (1, (96, 50, 6, 16)),
        (20, (96, 50, 6, 0)),
        (21, (96, 0, 0, 0)),
        (76, (96, 0, 0, 0)),
        (77, (64, 0, 0, 0)),
        (140, (32, 0, 0, 0)),
        (172, (0, 0, 0, 0)),
        (999, (0, 0, 0, 0)),
    ],
)
def test_one_order_takes_as_much_of_each_as_it_needs(asked: int, left: tuple[int, ...]) -> None:
    parts = Parts()
    assert parts.shrink(asked) == 172 - sum(left)
    assert parts.leases() == left
    facts = parts.shared.memory(parts.scheduler, num_resizes=0, held=False).facts
    assert facts.kv_bytes == sum(left) * MIB
    assert facts.given_back_bytes == (172 - sum(left)) * MIB
    assert facts.ceiling_bytes == 5 * TARGET_SEGMENT + DRAFT_ALL


def test_taken_again_is_the_targets_share_then_the_draft_and_then_what_the_target_may_have_beyond() -> None:
    parts = Parts()
    parts.shrink(999)
    seen = []
    for _ in range(9):
        facts = parts.shared.memory(parts.scheduler, num_resizes=0, held=False).facts
        taken = parts.grow(facts.segment_bytes // MIB)
        assert taken == min(facts.segment_bytes // MIB, (5 * TARGET_SEGMENT + DRAFT_ALL) // MIB - facts.kv_bytes // MIB)
        seen.append(parts.leases())
    assert seen == [
        (32, 0, 0, 0),
        (64, 0, 0, 0),
        (96, 0, 0, 0),
        (96, 50, 6, 8),
        (96, 50, 6, 16),
        (96, 50, 6, 20),
        (128, 50, 6, 20),
        (160, 50, 6, 20),
        (160, 50, 6, 20),
    ]
    facts = parts.shared.memory(parts.scheduler, num_resizes=0, held=False).facts
    assert facts.kv_bytes == facts.ceiling_bytes
    # The target had three of its five segments at first.
    assert facts.taken_bytes - facts.given_back_bytes == 2 * TARGET_SEGMENT


def test_one_order_gives_each_its_turn() -> None:
    parts = Parts()
    parts.shrink(999)
    assert parts.grow(96 + 64 + 8 + 4 + 33) == 96 + 64 + 8 + 4 + 32
    assert parts.leases() == (128, 50, 6, 20)


def test_what_the_draft_has_no_room_for_is_not_taken_by_the_target() -> None:
    parts = Parts()
    parts.shrink(999)
    assert parts.grow(96 + 63) == 96
    assert parts.leases() == (96, 0, 0, 0)


def test_a_pool_that_stays_small_does_not_stand_in_the_drafts_way() -> None:
    parts = Parts()
    parts.shrink(20 + 1)
    parts.target.shrink(parts.scheduler, 2 * TARGET_SEGMENT, keep_promises=False)
    parts.target.stay_small()
    facts = parts.shared.memory(parts.scheduler, num_resizes=0, held=False).facts
    assert facts.segment_bytes == DRAFT_FIXED + DRAFT_SEGMENT
    assert parts.grow(500) == DRAFT_ALL // MIB
    assert parts.leases() == (32, 50, 6, 20)


def test_both_stay_small() -> None:
    parts = Parts()
    parts.shrink(100)
    parts.shared.stay_small()
    assert parts.leases() == (64, 0, 0, 0)
    assert parts.grow(500) == 0
    facts = parts.shared.memory(parts.scheduler, num_resizes=0, held=False).facts
    assert facts.ceiling_bytes == facts.kv_bytes == 64 * MIB


def test_a_shortfall_is_the_latest_growths() -> None:
    parts = Parts()

    def shortfall() -> str | None:
        return parts.shared.memory(parts.scheduler, num_resizes=0, held=False).shortfall

    parts.shrink(76)
    parts.fault = MemoryError("the card is full")
    parts.grow(500)
    assert parts.leases() == (96, 0, 0, 0)
    assert "the card is full" in (shortfall() or "")
    parts.fault = None
    parts.shrink(32)
    parts.grow(32)
    assert shortfall() is None
    parts.target_memory.most_segments = 3
    for _ in range(2):
        parts.grow(500)
    assert "the card is full" in (shortfall() or "")
    assert parts.leases() == (96, 50, 6, 20)
    parts.shrink(12)
    assert parts.grow(8) == 8
    assert shortfall() is None


def test_a_target_that_the_device_has_no_room_for_is_not_passed_by_the_draft() -> None:
    parts = Parts()
    parts.shrink(999)
    parts.target_memory.most_segments = 1
    assert parts.grow(500) == 32
    assert parts.leases() == (32, 0, 0, 0)
    assert parts.loads == 0


class Guard:
    """The policy with a card of 400 MiB on which others come and go; every order is carried out at once."""

    def __init__(self, *, busy: bool) -> None:
        self.parts = Parts(budget_bytes=336 * MIB)
        self.policy = PressurePolicy(Headroom(64 * MIB, 32 * MIB))
        self.others_bytes = 0
        self.busy = busy
        self.now = self.num_resizes = 0.0
        self.orders: list[tuple[int, int]] = []  # (MiB asked, MiB moved), of shrinking negative

    def run(self, seconds: float) -> None:
        parts = self.parts
        for _ in range(round(10 * seconds)):
            self.now = round(self.now + 0.1, 6)
            own = parts.ledger.leased_bytes
            reading = Reading(400 * MIB, own + self.others_bytes, own, "simulated", self.now)
            facts = parts.shared.memory(parts.scheduler, num_resizes=int(self.num_resizes), held=False).facts
            decision = self.policy.observe(reading, facts, busy=self.busy, now=self.now)
            parts.shared.set_budget(decision.budget_bytes)
            before = parts.shared.num_bytes
            if decision.shrink_bytes:
                parts.shared.shrink(parts.scheduler, decision.shrink_bytes, keep_promises=False)
            if decision.grow_bytes:
                parts.shared.grow(decision.grow_bytes)
            if decision.shrink_bytes or decision.grow_bytes:
                self.num_resizes += 1
                asked = decision.grow_bytes - decision.shrink_bytes
                self.orders.append((asked // MIB, (parts.shared.num_bytes - before) // MIB))
            parts.leases()

    def play(self) -> None:
        """A game takes all that there is, and ends."""
        self.run(12)
        self.others_bytes = GAME_BYTES
        self.run(5)
        self.others_bytes = 0


@pytest.mark.parametrize("busy", [True, False])
def test_a_game_gets_all_of_it_and_after_the_game_it_comes_back_in_its_order(busy: bool) -> None:
    guard = Guard(busy=busy)
    parts = guard.parts
    guard.run(12)
    assert parts.leases() == (96 + 64, 50, 6, 20), "what was free from the start was taken"
    guard.orders.clear()
    guard.others_bytes = GAME_BYTES
    guard.run(5)
    assert parts.leases() == (0, 0, 0, 0)
    assert parts.model.yields == 1
    guard.orders.clear()
    guard.others_bytes = 0
    guard.run(60)
    assert parts.leases() == (160, 50, 6, 20)
    assert parts.model.returns == parts.loads == 1
    assert all(0 < moved <= asked for asked, moved in guard.orders), "no order is for less than can be carried out"
    grown = [moved for _, moved in guard.orders]
    assert sum(grown) == 236
    if busy:
        assert grown == [32, 32, 32, 64, 8, 4, 32, 32], "one at a time beside requests, the weights with a segment"
    else:
        assert len(grown) <= 5


def test_room_for_the_target_and_not_for_the_draft_is_left_alone() -> None:
    guard = Guard(busy=True)
    guard.run(12)
    guard.others_bytes = 100 * MIB
    guard.run(60)
    # Of 400 MiB others have 100 and 64 are left free; the draft's weights need 64 more than its 8 of leeway.
    assert guard.parts.leases()[0] >= 96
    assert guard.parts.leases()[1:] == (0, 0, 0)
    guard.orders.clear()
    guard.run(60)
    assert guard.orders == [], "nothing is taken and given back in turns"


def test_a_draft_that_cannot_be_loaded_any_more_leaves_its_room_to_the_target() -> None:
    guard = Guard(busy=True)
    parts = guard.parts
    guard.play()
    parts.fault = OSError("no such file")
    guard.run(90)
    assert parts.leases() == (160, 0, 0, 0)
    assert parts.loads == 1


def test_a_draft_that_the_device_has_no_memory_for_is_not_tried_at_every_reading() -> None:
    guard = Guard(busy=True)
    parts = guard.parts
    guard.play()
    parts.fault = MemoryError("the card is full")
    guard.run(600)
    assert parts.leases() == (96, 0, 0, 0)
    assert 2 <= parts.loads <= 8


def test_what_no_sequence_needs_is_the_drafts_keys_and_values_then_the_rest_of_it() -> None:
    parts = Parts()
    assert [parts.shared.spare() // MIB for _ in range(3)] == [20, 56, 0]
    assert parts.leases() == (96, 0, 0, 0)


def test_a_step_without_memory_costs_the_draft_its_own_before_any_sequence() -> None:
    parts = Parts()
    shortage = Shortage(parts.scheduler, parts.shared)
    left = []
    for _ in range(2):
        assert shortage.relieve(StepPlan((), ()), lambda: 0.0) == Outcome()
        left.append(parts.leases())
    assert left == [(96, 50, 6, 0), (96, 0, 0, 0)]
