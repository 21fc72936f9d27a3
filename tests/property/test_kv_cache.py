"""Block tables and prefix cache keep every invariant through long random lives, and planted bugs do not survive."""

from collections.abc import Sequence as Listing

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from edgekv.core.block_pool import BlockPool
from edgekv.core.prefix_cache import PrefixCache
from edgekv.core.prefix_tree import Node, block_key
from tests.property.kv_cache_machine import KVCacheMachine

LONG = settings(
    max_examples=400, stateful_step_count=60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
HUNT = settings(LONG, max_examples=400, phases=[Phase.generate], database=None, derandomize=True)


def four_bit_key(parent_key: bytes, token_ids: Listing[int]) -> bytes:
    """A hash so weak that most of its keys collide."""
    return bytes([block_key(parent_key, token_ids)[0] & 15])


class CollidingMachine(KVCacheMachine):
    hasher = staticmethod(four_bit_key)


def test_invariants_hold_through_ten_thousand_operations() -> None:
    class CountedMachine(KVCacheMachine):
        pass

    run_state_machine_as_test(CountedMachine, settings=LONG)
    assert CountedMachine.operations >= 10_000


def test_a_four_bit_hash_gives_misses_but_never_a_wrong_block() -> None:
    run_state_machine_as_test(CollidingMachine, settings=settings(LONG, max_examples=100))


class ForgetfulPool(BlockPool):
    """Planted: sharing an active block does not count the new holder."""

    def retain(self, block: int) -> None:
        if block not in self._refs:
            super().retain(block)


class TrustingCache(PrefixCache):
    """Planted: an equal key is believed without comparing the content."""

    def _holds(self, node: Node, parent: Node, tokens: Listing[int]) -> bool:
        return True


class StaleCache(PrefixCache):
    """Planted: an evicted block keeps its hash."""

    def withdraw(self, node: Node) -> list[int]:
        blocks = super().withdraw(node)
        if node.key:
            self._by_key[node.key] = node
        return blocks


class RootedCache(PrefixCache):
    """Planted: content that was moved is still said to be in its old block."""

    def relocate(self, block: int, to: int) -> None:
        self._by_block[to] = self._by_block.pop(block)


@pytest.mark.parametrize(
    "planted",
    [
        {"pool_class": ForgetfulPool},
        {"prefix_class": TrustingCache, "hasher": staticmethod(four_bit_key)},
        {"prefix_class": StaleCache},
        {"prefix_class": RootedCache},
    ],
    ids=["refcount", "collision", "stale hash", "moved block"],
)
def test_a_planted_bug_is_caught(planted: dict[str, object]) -> None:
    machine = type("PlantedMachine", (KVCacheMachine,), planted)
    with pytest.raises((AssertionError, ValueError, KeyError)):
        run_state_machine_as_test(machine, settings=HUNT)
