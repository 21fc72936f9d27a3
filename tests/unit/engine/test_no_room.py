"""What does not fit is told with the numbers, and the change that is named does make it fit."""

import re
from dataclasses import replace
from typing import Any

import pytest

from edgekv.config.units import GIB, MIB, parse_size
from edgekv.demo import draft_path, target_path
from edgekv.engine.draft_settings import DraftSettings
from edgekv.engine.no_room import KVBudgetTooLarge, NoRoomForKV
from edgekv.engine.settings import EngineSettings, lease, plan_engine
from edgekv.model.hf_config import read_spec
from edgekv.smi.device import Place

CPU = Place("cpu", "cpu", "CPU", 6 * GIB, total_bytes=8 * GIB)
CARD = Place("card", "cuda:0", "a card", 7 * GIB, total_bytes=8 * GIB)


def refused(place: Place, kv_budget: int | float | None, kind: type[Exception] = KVBudgetTooLarge) -> str:
    with pytest.raises(kind) as caught:
        leased(place, kv_budget)
    return str(caught.value)


def leased(place: Place, kv_budget: int | float | None, **changes: Any) -> None:
    settings = EngineSettings(draft_path(), place, kv_budget=kv_budget, native=False, **changes)
    lease(plan_engine(settings, read_spec(draft_path()))[1])


def test_where_the_bytes_go_that_a_budget_does_not_get() -> None:
    told = refused(CPU, 7 * GIB)
    assert told.startswith("kv.budget: a KV pool of 7.00 GiB does not fit, 5.2")
    assert "Of 8.00 GiB of main memory, others hold 2.00 GiB, 512.00 MiB stay free for others, the model takes" in told
    assert re.search(r"\(runtime 192\.00 MiB, weights \S+ MiB, workspace \S+ MiB\)", told)
    assert "leased" not in told
    assert "Of 8.00 GiB of the card's memory, others hold 1.00 GiB, 512.00 MiB" in refused(CARD, 7 * GIB)


@pytest.mark.parametrize("place", [CPU, CARD, replace(CPU, most_bytes=GIB), replace(CARD, reserve_bytes=2 * GIB)])
@pytest.mark.parametrize("kv_budget", [9 * GIB, 0.999])
def test_the_budget_that_is_named_fits_and_hardly_more_does(place: Place, kv_budget: int | float) -> None:
    named = re.search(r"Set kv\.budget to (\S+) or less, or leave it out", refused(place, kv_budget))
    assert named is not None
    most = parse_size(named[1])
    leased(place, most)
    leased(place, None)
    refused(place, most * 102 // 100)


def test_a_draft_is_named_where_it_is_the_cause() -> None:
    place = Place("cpu", "cpu", "CPU", 800 * MIB, total_bytes=800 * MIB)
    drafts = DraftSettings(draft_path(), kv_budget=100 * MIB)
    settings = EngineSettings(target_path(), place, kv_budget=MIB, native=False, draft=drafts)
    spec = read_spec(target_path())
    small = replace(settings, draft=replace(drafts, kv_budget=MIB))
    alone = plan_engine(replace(settings, draft=None), spec)[1]
    room = alone.kv.pool_bytes + alone.free_bytes
    for changed, error, is_cause in (
        (settings, NoRoomForKV, True),
        (replace(small, kv_budget=room - MIB), KVBudgetTooLarge, True),
        (replace(small, kv_budget=GIB), KVBudgetTooLarge, False),
    ):
        with pytest.raises(error) as caught:
            lease(plan_engine(changed, spec)[1])
        assert ("eave the draft out (--draft off), which takes " in str(caught.value)) == is_cause, str(caught.value)
    lease(plan_engine(replace(settings, draft=None, kv_budget=room), spec)[1])


@pytest.mark.parametrize("kv_budget", [None, 4 * GIB])
@pytest.mark.parametrize("place", [CPU, CARD])
def test_the_drafts_budget_that_is_named_leaves_room_for_a_context(place: Place, kv_budget: int | None) -> None:
    drafts = DraftSettings(draft_path(), kv_budget=100 * GIB)
    settings = EngineSettings(target_path(), place, kv_budget=kv_budget, native=False, draft=drafts)
    spec = read_spec(target_path())
    with pytest.raises(NoRoomForKV) as caught:
        lease(plan_engine(settings, spec)[1])
    named = re.search(r"\. Lower draft\.kv\.budget to (\S+) or less; or leave the draft out ", str(caught.value))
    assert named is not None
    fitting = plan_engine(replace(settings, draft=replace(drafts, kv_budget=parse_size(named[1]))), spec)[1]
    lease(fitting)
    assert fitting.fits
    assert fitting.draft is not None
    assert fitting.draft.kv.pool_bytes > (GIB if kv_budget else 4 * GIB), "and not much less than it could have"


def test_the_drafts_budget_is_named_where_the_kv_budget_is_too_large() -> None:
    drafts = DraftSettings(draft_path(), kv_budget=3 * GIB)
    settings = EngineSettings(target_path(), CPU, kv_budget=4 * GIB, native=False, draft=drafts)
    spec = read_spec(target_path())
    with pytest.raises(KVBudgetTooLarge) as caught:
        lease(plan_engine(settings, spec)[1])
    named = re.search(r"; or lower draft\.kv\.budget to (\S+) or less; or leave the draft out ", str(caught.value))
    assert named is not None
    lease(plan_engine(replace(settings, draft=replace(drafts, kv_budget=parse_size(named[1]))), spec)[1])
    most = parse_size(named[1]) * 102 // 100
    with pytest.raises(KVBudgetTooLarge):
        lease(plan_engine(replace(settings, draft=replace(drafts, kv_budget=most)), spec)[1])
    small = replace(drafts, kv_budget=MIB)
    with pytest.raises(KVBudgetTooLarge) as caught:
        lease(plan_engine(replace(settings, kv_budget=5 * GIB + 256 * MIB, draft=small), spec)[1])
    assert "lower draft.kv.budget" not in str(caught.value), "that would not do"


def test_others_are_named_where_they_are_the_cause() -> None:
    told = refused(CPU, 7 * GIB)
    found = re.search(r"; or close other programs until (\S+) (.iB) more are free$", told)
    assert found is not None
    leased(replace(CPU, free_bytes=CPU.free_bytes + parse_size(found[1] + found[2]) + 16 * MIB), 7 * GIB)
    assert "close other programs" not in refused(CPU, 9 * GIB), "they do not hold as much"
    assert "close other programs" not in refused(replace(CPU, most_bytes=3 * GIB), 4 * GIB), "it is not they"
    assert "close other programs" not in refused(replace(CPU, most_bytes=5 * GIB + 256 * MIB), 7 * GIB), "nor alone"


def test_a_vram_budget_is_named_where_it_is_the_cause() -> None:
    told = refused(replace(CARD, most_bytes=3 * GIB), 4 * GIB)
    assert "512.00 MiB stay free for others, vram_budget leaves them another 3.50 GiB, the model takes" in told
    assert told.endswith("; or raise vram_budget, which is 3.00 GiB")
    assert "raise vram_budget" not in refused(replace(CARD, most_bytes=3 * GIB), 9 * GIB), "that would not do"


@pytest.mark.parametrize("kv_budget", [None, GIB])
def test_a_model_that_leaves_no_room_is_told_alike(kv_budget: int | None) -> None:
    told = refused(Place("cpu", "cpu", "CPU", 600 * MIB, total_bytes=8 * GIB), kv_budget, NoRoomForKV)
    assert re.match(
        r"The model leaves no room for its KV cache: \S+ MiB more would be needed, and one block of 16", told
    )
    assert "Of 8.00 GiB of main memory, others hold 7.41 GiB, 512.00 MiB stay free" in told
    assert re.search(r"\. Close other programs until \S+ MiB more are free; or see what would make it fit with: ", told)


def test_the_numbers_are_there_for_programs_too() -> None:
    with pytest.raises(KVBudgetTooLarge) as caught:
        leased(CPU, 7 * GIB)
    error = caught.value
    assert (error.name, error.asked_bytes) == ("kv.target", 7 * GIB)
    assert 5 * GIB < error.free_bytes < error.budget_bytes < 6 * GIB
