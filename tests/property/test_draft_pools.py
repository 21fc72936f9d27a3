"""Two pools on one ledger: each keeps to its own, and nothing that becomes of a draft changes what is said."""

from collections.abc import Callable
from collections.abc import Sequence as Listing
from typing import Any

import pytest
from hypothesis import settings
from hypothesis.errors import Flaky
from hypothesis.stateful import run_state_machine_as_test

from edgekv.core.block_pool import OutOfBlocks
from edgekv.core.kv_cache import KVCache
from edgekv.core.prefix_cache import Match
from edgekv.core.roster import Vacated
from edgekv.core.sequence import Sequence
from edgekv.core.step import BlockCopy
from edgekv.engine import draft, draft_memory, draft_views
from edgekv.engine.draft import DraftModel
from edgekv.engine.draft_memory import DraftMemory, LoadedDraft
from edgekv.engine.draft_views import DraftViews, View
from edgekv.engine.segments import BlockHolder, Segments
from edgekv.engine.settings import KV_LEASE
from edgekv.engine.shared_memory import SharedMemory
from tests.property.draft_machine import DraftMachine
from tests.property.hunt import hunt
from tests.property.test_elastic import HUNT, LONG

LONG_HUNT = settings(HUNT, max_examples=400)


@pytest.fixture(autouse=True)
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no device whose memory it would return, and it takes most of the time."""
    monkeypatch.setattr(draft_memory, "give_back_cached", lambda: None)


def test_no_interleaving_of_requests_orders_and_faults_mixes_the_pools_or_changes_what_is_said() -> None:
    class CountedMachine(DraftMachine):
        pass

    run_state_machine_as_test(CountedMachine, settings=LONG)
    assert CountedMachine.operations >= 2000
    for name in ("accepted", "rejected", "read_tokens", "yields", "returns", "dropped"):
        assert getattr(CountedMachine, name) >= 10, f"hardly any were {name}"
    assert CountedMachine.rests >= 3
    assert CountedMachine.copies >= 3


class PublishingModel(DraftModel):
    """Planted: what is guessed is published, before anybody has said it."""

    def _guess(self, views: list[View]) -> dict[int, tuple[int, ...]]:
        found = super()._guess(views)
        for view in self.views._views.values():
            own, computed = view.own, view.own.num_computed
            own.tokens += view.guess[:-1]
            own.num_computed = max(computed, view.known + len(view.guess[:-1]))
            self.cache.publish(own)
            del own.tokens[len(own.tokens) - len(view.guess[:-1]) :]
            own.num_computed = computed
        return found


class BorrowingMemory(DraftMemory):
    """Planted: its keys and values are on the target's lease."""

    def _use(self, loaded: LoadedDraft) -> Segments:
        segments = super()._use(loaded)
        segments._lease_name = KV_LEASE
        return segments


class GreedyMemory(DraftMemory):
    """Planted: it grows beyond what was planned, into what the target's pool may still have."""

    def _use(self, loaded: LoadedDraft) -> Segments:
        self._most_bytes = self._plan.num_bytes + self._plan.kv.block_bytes
        return super()._use(loaded)


class LeakyMemory(DraftMemory):
    """Planted: weights go, and the lease of the workspace stays."""

    def _unload(self) -> int:
        kept = self._leases.pop()
        return super()._unload() + kept.num_bytes


class ImpoliteMemory(SharedMemory):
    """Planted: the target's pool gives first."""

    def shrink(self, scheduler: BlockHolder, num_bytes: int, *, keep_promises: bool, slow_first: bool = False) -> int:
        given = self.target.shrink(scheduler, num_bytes, keep_promises=keep_promises, slow_first=slow_first)
        return given + (self.draft.shrink(num_bytes - given) if given < num_bytes else 0)


@pytest.mark.parametrize(
    "planted",
    [
        {"model_class": PublishingModel},
        {"memory_class": BorrowingMemory},
        {"memory_class": GreedyMemory},
        {"memory_class": LeakyMemory},
        {"shared_class": ImpoliteMemory},
    ],
    ids=lambda planted: next(iter(planted.values())).__name__,
)
def test_a_planted_carelessness_is_caught(planted: dict[str, object]) -> None:
    with pytest.raises(AssertionError):
        hunt(type("PlantedMachine", (DraftMachine,), planted), LONG_HUNT)


def believe(view: View, cache: KVCache) -> None:
    """Planted: nothing is rolled back, whatever was said instead of what was guessed."""
    if view.known:
        view.own.num_computed = view.known + max(0, len(view.guess) - 1)
        view.known, view.guess = 0, ()
        cache.publish(view.own)


def keep_tables(self: DraftViews, num_blocks: int, *, keep_promises: bool, first: Listing[int] = ()) -> Vacated:
    """Planted: views keep the blocks that they had in segments which have gone."""
    tables = {number: view.own.block_table for number, view in self._views.items()}
    vacated = vacate(self, num_blocks, keep_promises=keep_promises, first=first)
    for number, view in self._views.items():
        view.own.block_table = tables[number]
    return vacated


vacate = DraftViews.vacate


def copy_nothing(self: DraftViews) -> tuple[BlockCopy, ...]:
    """Planted: a partly filled block is shared, and never copied."""
    self._copies.clear()
    return ()


def fit_without_a_place_for_the_copy(self: DraftViews, own: Sequence, num_tokens: int) -> Match | None:
    """Planted: the block that is copied from is not counted."""
    match = self.cache.match(own)
    reserve = self.cache.blocks_for(num_tokens) - self.cache.blocks_for(len(own.tokens))
    return match if self.cache.can_admit(own, match, reserve) else None


def drop_without_giving_back(self: DraftViews, sequence_id: int) -> None:
    """Planted: a view goes, and its blocks stay."""
    self._views.pop(sequence_id, None)


@pytest.mark.parametrize(
    ("where", "name", "planted"),
    [
        (draft_views, "_settle", believe),
        (DraftViews, "vacate", keep_tables),
        (DraftViews, "take_copies", copy_nothing),
        (DraftViews, "_fitting", fit_without_a_place_for_the_copy),
        (DraftViews, "_drop", drop_without_giving_back),
        (draft, "_wait_for", lambda steps: None),
        (DraftViews, "distrust", lambda self, view: None),
    ],
)
def test_a_planted_fault_of_views_is_caught(
    where: object, name: str, planted: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, name, planted)
    # Flaky: what a fault leaves behind makes the same example end otherwise when it is run again.
    with pytest.raises((AssertionError, OutOfBlocks, ValueError, Flaky)):
        hunt(type("PlantedMachine", (DraftMachine,), {}), LONG_HUNT)
