"""Many published blocks are withdrawn at once, as when whole segments go."""

from edgekv.core.prefix_cache import PrefixCache
from edgekv.core.prefix_tree import Node

CHAIN = [(1, 2), (3, 4), (5, 6)]


def published(cache: PrefixCache, first_block: int = 0, salt: bytes = b"", length: int = 3) -> list[Node]:
    nodes: list[Node] = []
    for number, tokens in enumerate(CHAIN[:length]):
        parent = nodes[-1] if nodes else None
        node = cache.publish(first_block + number, parent, tokens, salt=salt, tick=0)
        assert node is not None
        nodes.append(node)
    return nodes


def miss(cache: PrefixCache) -> str | None:
    tokens, keys = [1, 2, 3, 4, 5, 6, 7], list[bytes]()
    cache.extend_keys(keys, tokens, b"")
    return cache.match(tokens, keys, b"").miss


def test_what_hangs_below_goes_too_and_once() -> None:
    cache = PrefixCache(2)
    one, other = published(cache), published(cache, 10, b"tenant")
    assert sorted(cache.withdraw_all([one[1], other[0], one[2]])) == [1, 2, 10, 11, 12]
    assert cache.published_blocks() == [0]
    cache.check_integrity()


def test_a_block_that_went_with_the_one_above_is_missed_as_evicted() -> None:
    cache = PrefixCache(2)
    cache.withdraw_all([published(cache)[0]])
    published(cache, 20, length=1)
    reason = miss(cache)
    assert reason is not None
    assert reason.startswith("evicted: block 1")


def test_of_thousands_that_begin_alike_each_goes_alone() -> None:
    cache = PrefixCache(2)
    nodes = [cache.publish(block, None, (1, block), salt=b"", tick=0) for block in range(5000)]
    for node in nodes[::2]:
        assert node is not None
        cache.withdraw_all([node])
    assert cache.published_blocks() == list(range(1, 5000, 2))
    cache.check_integrity()
