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
