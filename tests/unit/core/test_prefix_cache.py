"""What the prefix cache costs where thousands of prompts begin alike; its answers are tested in tests/property."""

from edgekv.core.prefix_cache import MAX_SIBLINGS_COMPARED, PrefixCache


def test_only_the_latest_siblings_are_searched_for_tails_to_drop() -> None:
    cache = PrefixCache(block_size=4)
    for number in range(MAX_SIBLINGS_COMPARED + 1):
        cache.publish_tail(number, None, (1, number), salt=b"", tick=0)
    oldest, latest = (1, 0, 5, 5), (1, MAX_SIBLINGS_COMPARED, 5, 5)
    assert cache.shadowed_tails(None, oldest, b"") == []
    assert [node.block for node in cache.shadowed_tails(None, latest, b"")] == [MAX_SIBLINGS_COMPARED]
