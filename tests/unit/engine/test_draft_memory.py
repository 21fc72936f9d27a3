"""What a draft model has of the device goes first and comes back, each byte on a lease of its own."""

import gc
import logging
import weakref
from itertools import pairwise

import pytest
import torch

from edgekv.engine import draft_memory
from edgekv.engine.draft_memory import MOST_SKIPPED
from edgekv.engine.memory_errors import give_back_cached
from edgekv.errors import ModelError
from tests.unit.engine.draft_parts import DRAFT_ALL, DRAFT_FIXED, DRAFT_KV, DRAFT_SEGMENT, MIB, Parts

EVERYTHING = (96, 50, 6, 20)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """To look for what nobody holds any more takes long beside torch, and most tests hold nothing."""
    monkeypatch.setattr(draft_memory, "give_back_cached", lambda: None)


def test_keys_and_values_go_by_segments_and_then_the_rest_in_one_piece() -> None:
    parts = Parts()
    assert parts.leases() == EVERYTHING
    assert parts.draft.shrink(1) == 4 * MIB  # the small segment is as empty as the others, and the last
    assert parts.leases() == (96, 50, 6, 16)
    assert parts.draft.shrink(5 * MIB) == DRAFT_SEGMENT
    assert parts.model.away is None
    assert parts.draft.shrink(DRAFT_SEGMENT) == DRAFT_SEGMENT
    assert parts.leases() == (96, 50, 6, 0)
    assert parts.model.away == "the draft model's KV cache was given back"
    assert parts.draft.shrink(1) == DRAFT_FIXED
    assert parts.leases() == (96, 0, 0, 0)
    assert parts.model.away == "the draft model's memory was given back"
    assert parts.draft.shrink(1) == parts.draft.shrink(0) == 0
    assert (parts.draft.given_back_bytes, parts.draft.taken_bytes) == (DRAFT_ALL, 0)


def test_one_order_for_more_than_the_keys_and_values_takes_all() -> None:
    parts = Parts()
    assert parts.draft.shrink(DRAFT_KV + 1) == DRAFT_ALL
    assert parts.leases() == (96, 0, 0, 0)


def test_it_comes_back_with_a_first_segment_and_then_grows_to_what_was_planned() -> None:
    parts = Parts()
    parts.draft.shrink(DRAFT_ALL)
    assert parts.draft.next_bytes == DRAFT_FIXED + DRAFT_SEGMENT
    assert parts.draft.grow(DRAFT_FIXED + DRAFT_SEGMENT - 1).num_bytes == 0
    assert parts.loads == 0, "weights that have no room for keys and values are of no use"
    assert parts.draft.grow(DRAFT_FIXED + DRAFT_SEGMENT).num_bytes == DRAFT_FIXED + DRAFT_SEGMENT
    assert parts.leases() == (96, 50, 6, 8)
    assert parts.model.away is None
    assert parts.draft.next_bytes == DRAFT_SEGMENT
    assert parts.draft.grow(500 * MIB).num_bytes == DRAFT_SEGMENT + 4 * MIB
    assert parts.leases() == EVERYTHING
    assert parts.draft.next_bytes == 0
    assert parts.draft.grow(500 * MIB).num_bytes == 0
    assert parts.loads == 1
    assert parts.draft.given_back_bytes == parts.draft.taken_bytes == DRAFT_ALL


def test_the_last_segment_may_be_a_small_one() -> None:
    parts = Parts()
    parts.draft.shrink(1)
    assert parts.draft.next_bytes == 4 * MIB
    assert parts.draft.grow(4 * MIB).num_bytes == 4 * MIB
    assert parts.leases() == EVERYTHING


def test_it_yields_and_returns_once_each_time() -> None:
    parts = Parts()
    seen = []
    for change in (parts.draft.shrink, parts.draft.grow):
        for mib in (1, 8, 20, 200, 1):
            change(mib * MIB)
            seen.append((parts.model.yields, parts.model.returns))
    assert seen == [(0, 0), (0, 0), (1, 0), (1, 0), (1, 0), (1, 0), (1, 0), (1, 0), (1, 1), (1, 1)]
    parts.draft.shrink(DRAFT_ALL)
    parts.draft.grow(DRAFT_ALL)
    assert (parts.model.yields, parts.model.returns) == (2, 2)


def test_keys_and_values_alone_that_come_back_are_a_return_too() -> None:
    parts = Parts()
    parts.draft.shrink(DRAFT_KV)
    parts.draft.grow(DRAFT_SEGMENT)
    assert (parts.model.yields, parts.model.returns, parts.loads) == (1, 1, 0)


def test_nothing_of_what_was_given_back_is_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_memory, "give_back_cached", give_back_cached)
    parts = Parts()
    # Such a ring is what a model's own objects are: nobody holds it, and it holds itself.
    ring: list[object] = [parts.memory]
    ring.append(ring)
    parts.memory.ring = ring  # type: ignore[attr-defined]
    gone = [weakref.ref(parts.memory), weakref.ref(parts.model.pipeline)]
    del parts.memory, ring
    gc.collect()
    assert all(each() is not None for each in gone)
    gc.disable()  # what is freed is freed by the unloading itself
    try:
        parts.draft.shrink(DRAFT_ALL)
        assert all(each() is None for each in gone)
    finally:
        gc.enable()


def test_files_that_are_gone_are_looked_for_once_and_the_engine_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    parts = Parts()
    parts.draft.shrink(DRAFT_ALL)
    parts.fault = ModelError("/models/draft/model.safetensors: no such file")
    with caplog.at_level(logging.WARNING):
        growth = parts.draft.grow(DRAFT_ALL)
    assert growth.num_bytes == 0
    assert growth.shortfall is not None
    assert "no such file" in growth.shortfall
    assert "no such file" in caplog.text
    assert parts.leases() == (96, 0, 0, 0)
    assert parts.draft.ceiling_bytes == parts.draft.next_bytes == 0
    assert parts.draft.grow(DRAFT_ALL).num_bytes == 0
    assert parts.loads == 1


@pytest.mark.parametrize("fault", [OSError("gone"), ValueError("another shape")])
def test_so_are_files_that_are_others_by_now(fault: Exception) -> None:
    parts = Parts()
    parts.draft.shrink(DRAFT_ALL)
    parts.fault = fault
    assert parts.draft.grow(DRAFT_ALL).shortfall == str(fault)
    assert parts.leases() == (96, 0, 0, 0)


@pytest.mark.parametrize("fault", [MemoryError("full"), torch.OutOfMemoryError("CUDA out of memory")])
def test_a_device_that_has_not_the_memory_is_tried_again_and_less_and_less_often(fault: Exception) -> None:
    parts = Parts()
    parts.draft.shrink(DRAFT_ALL)
    parts.fault = fault
    tried_at = []
    for order in range(300):
        before = parts.loads
        growth = parts.draft.grow(DRAFT_ALL)
        assert growth.num_bytes == 0
        assert growth.shortfall is not None
        assert str(fault) in growth.shortfall
        if parts.loads > before:
            tried_at.append(order)
            assert parts.leases() == (96, 0, 0, 0)
    waits = [b - a for a, b in pairwise(tried_at)]
    assert waits[:6] == [2, 4, 8, 16, 32, 64]
    assert set(waits[6:]) == {MOST_SKIPPED + 1}
    assert parts.draft.next_bytes == DRAFT_FIXED + DRAFT_SEGMENT, "it still waits for its room"
    parts.fault = None
    while parts.draft.grow(DRAFT_ALL).num_bytes == 0:
        assert parts.loads < 100
    assert parts.leases() == EVERYTHING
    assert parts.draft.shortfall is None
    parts.draft.shrink(DRAFT_ALL)
    parts.fault, before = fault, parts.loads
    for _ in range(3):
        parts.draft.grow(DRAFT_ALL)
    assert parts.loads == before + 2, "and it begins anew"


def test_what_was_loaded_in_vain_goes_back_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Parts()
    parts.draft.shrink(DRAFT_ALL)
    loaded: list[weakref.ref[object]] = []
    alive: list[bool] = []

    class Weights:
        pass

    def load() -> None:
        weights = Weights()
        loaded.append(weakref.ref(weights))
        raise MemoryError(f"no room beside {weights}")

    monkeypatch.setattr(parts.draft, "_load", load)
    monkeypatch.setattr(draft_memory, "give_back_cached", lambda: alive.append(loaded[-1]() is not None))
    parts.draft.grow(DRAFT_ALL)
    assert alive == [False], "while an error is handled it holds all that its frames do"


def test_another_fault_of_the_device_is_the_engines() -> None:
    parts = Parts()
    parts.draft.shrink(DRAFT_ALL)
    parts.fault = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        parts.draft.grow(DRAFT_ALL)


@pytest.mark.parametrize("room_mib", [49, 50, 55])
def test_without_budget_nothing_is_loaded_and_no_lease_is_left(room_mib: int) -> None:
    parts = Parts()
    parts.draft.shrink(DRAFT_ALL)
    parts.ledger.set_budget(parts.ledger.leased_bytes + room_mib * MIB)
    growth = parts.draft.grow(DRAFT_ALL)
    assert growth.num_bytes == parts.loads == 0
    assert growth.shortfall is not None
    assert "draft" in growth.shortfall
    assert parts.leases() == (96, 0, 0, 0)
    parts.ledger.set_budget(1000 * MIB)
    assert parts.draft.grow(DRAFT_ALL).num_bytes == DRAFT_ALL, "that costs nothing, so it is tried every time"


def test_budget_for_the_weights_and_a_segment_only() -> None:
    parts = Parts()
    parts.draft.shrink(DRAFT_ALL)
    parts.ledger.set_budget(parts.ledger.leased_bytes + DRAFT_FIXED + DRAFT_SEGMENT)
    growth = parts.draft.grow(DRAFT_ALL)
    assert growth.num_bytes == DRAFT_FIXED + DRAFT_SEGMENT
    assert growth.shortfall is not None
    assert parts.leases() == (96, 50, 6, 8)


@pytest.mark.parametrize(
    ("lost_mib", "kept"), [(0, (50, 6, 20)), (1, (50, 6, 16)), (12, (50, 6, 8)), (20, (0, 0, 0)), (76, (0, 0, 0))]
)
def test_staying_small_it_has_what_it_has_and_no_weights_for_nothing(lost_mib: int, kept: tuple[int, ...]) -> None:
    parts = Parts()
    parts.draft.shrink(lost_mib * MIB)
    parts.draft.stay_small()
    assert parts.leases()[1:] == kept
    assert parts.draft.ceiling_bytes == sum(kept) * MIB
    assert parts.draft.grow(500 * MIB).num_bytes == parts.draft.next_bytes == 0
    parts.draft.shrink(500 * MIB)
    assert parts.draft.next_bytes == (DRAFT_FIXED + min(8, kept[2]) * MIB if kept[2] else 0)
    parts.draft.grow(500 * MIB)
    assert parts.leases()[1:] == kept


def test_what_it_keeps_may_be_the_small_segment_alone() -> None:
    parts = Parts()
    pool = parts.model.cache.pool
    [block] = pool.allocate(1)  # of the fullest segment
    parts.draft.shrink(16 * MIB)
    pool.release(block, keep=False)
    assert parts.leases() == (96, 50, 6, 4)
    parts.draft.stay_small()
    parts.draft.shrink(500 * MIB)
    assert parts.draft.next_bytes == DRAFT_FIXED + 4 * MIB
    parts.draft.grow(500 * MIB)
    assert parts.leases() == (96, 50, 6, 4)
