"""The sum of the leases never exceeds the budget."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekv.core.ledger import Ledger
from edgekv.errors import OverBudget


def test_a_lease_over_budget_is_refused_with_the_numbers() -> None:
    ledger = Ledger(budget_bytes=1000)
    ledger.reserve("weights", 700)
    with pytest.raises(OverBudget, match=r"kv\.target: 400 bytes asked, 300 free of a budget of 1,000"):
        ledger.reserve("kv.target", 400)
    assert ledger.leased_bytes == 700


@given(st.lists(st.integers(0, 60), max_size=20), st.data())
def test_leases_stay_within_the_budget_and_come_back_whole(sizes: list[int], data: st.DataObject) -> None:
    ledger = Ledger(budget_bytes=100)
    held = []
    for size in sizes:
        try:
            held.append(ledger.reserve("kv", size))
        except OverBudget:
            assert size > ledger.free_bytes
        if held and data.draw(st.booleans()):
            ledger.release(held.pop())
        assert ledger.leased_bytes == sum(lease.num_bytes for lease in held) <= 100


def test_the_statement_adds_up_leases_of_one_name() -> None:
    ledger = Ledger(budget_bytes=100)
    ledger.reserve("kv.target", 10)
    ledger.reserve("weights", 20)
    ledger.reserve("kv.target", 30)
    assert ledger.statement() == {"kv.target": 40, "weights": 20}
    with pytest.raises(ValueError, match="a lease of -1 bytes"):
        ledger.reserve("kv.target", -1)


def test_a_budget_below_the_leases_waits_for_them() -> None:
    ledger = Ledger(budget_bytes=100)
    first, second = ledger.reserve("weights", 30), ledger.reserve("kv.target", 50)
    assert ledger.set_budget(20) == 60
    assert (ledger.budget_bytes, ledger.free_bytes) == (80, 0)
    with pytest.raises(OverBudget):
        ledger.reserve("kv.target", 1)
    ledger.release(second)
    assert (ledger.budget_bytes, ledger.owed_bytes) == (30, 10)
    ledger.check_integrity()
    ledger.release(first)
    assert (ledger.budget_bytes, ledger.owed_bytes) == (20, 0)
    assert ledger.set_budget(50) == 0
    ledger.reserve("weights", 50)


def test_an_earmark_says_what_a_lease_holds_and_never_more_than_it_has() -> None:
    ledger = Ledger(budget_bytes=100)
    lease = ledger.reserve("kv.target", 40)
    ledger.earmark("prefix.pinned", "kv.target", 30)
    with pytest.raises(ValueError, match=r"sessions: 11 bytes of kv\.target, which has 10 to be earmarked"):
        ledger.earmark("sessions", "kv.target", 11)
    ledger.earmark("prefix.pinned", "kv.target", 40)
    with pytest.raises(ValueError, match=r"prefix\.pinned: 41 bytes"):
        ledger.earmark("prefix.pinned", "kv.target", 41)
    assert ledger.earmarks == {"prefix.pinned": ("kv.target", 40)}
    ledger.check_integrity()
    ledger.release(lease)
    with pytest.raises(AssertionError, match=r"40 bytes of kv\.target are earmarked, and not leased"):
        ledger.check_integrity()
    ledger.earmark("prefix.pinned", "kv.target", 0)
    assert ledger.earmarks == {}
    ledger.check_integrity()


@given(st.lists(st.tuples(st.sampled_from(["reserve", "release", "budget"]), st.integers(0, 120)), max_size=40))
def test_no_order_of_changes_brings_the_leases_over_the_budget(changes: list[tuple[str, int]]) -> None:
    ledger, held = Ledger(budget_bytes=100), []
    for what, size in changes:
        if what == "reserve" and size <= ledger.free_bytes:
            held.append(ledger.reserve("kv", size))
        elif what == "release" and held:
            ledger.release(held.pop(size % len(held)))
        elif what == "budget":
            before = ledger.budget_bytes
            owed = ledger.set_budget(size)
            assert ledger.budget_bytes - owed == size
            assert ledger.budget_bytes <= max(size, before)
        ledger.check_integrity()
