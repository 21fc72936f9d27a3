"""What the prefix cache costs, and what it says of a miss; that its answers are right is for tests/property."""

from collections.abc import Sequence

import pytest

from edgekv.core.prefix_cache import MAX_SIBLINGS_COMPARED, Match, PrefixCache
from edgekv.core.prefix_tree import OPEN_ROOT_KEY, OPEN_SALT, Node

HOUSE = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)


def put(cache: PrefixCache, tokens: tuple[int, ...], *, salt: bytes = b"", first_block: int = 0) -> list[Node]:
    """Publish the full blocks of a text."""
    chain: list[Node] = []
    for index in range(len(tokens) // 4):
        content = tokens[index * 4 : index * 4 + 4]
        node = cache.publish(first_block + index, chain[-1] if chain else None, content, salt=salt, tick=0)
        assert node is not None
        chain.append(node)
    return chain


def look_up(cache: PrefixCache, tokens: tuple[int, ...], salt: bytes = b"") -> Match:
    keys: list[bytes] = []
    cache.extend_keys(keys, tokens, salt)
    return cache.match(tokens, keys, salt)


def test_only_the_latest_siblings_are_searched_for_tails_to_drop() -> None:
    cache = PrefixCache(block_size=4)
    for number in range(MAX_SIBLINGS_COMPARED + 1):
        cache.publish_tail(number, None, (1, number), salt=b"", tick=0)
    oldest, latest = (1, 0, 5, 5), (1, MAX_SIBLINGS_COMPARED, 5, 5)
    assert cache.shadowed_tails(None, oldest, b"") == []
    assert [node.block for node in cache.shadowed_tails(None, latest, b"")] == [MAX_SIBLINGS_COMPARED]


def test_a_miss_says_where_the_prompt_left_the_longest_match() -> None:
    cache = PrefixCache(block_size=4)
    put(cache, HOUSE)
    match = look_up(cache, (*HOUSE[:10], 99, 99, 99))
    assert match.miss == "diverged: at token 10 of block 2 from the longest match"
    assert (len(match.nodes), match.partial_tokens) == (2, 2)
    assert look_up(cache, (*HOUSE, 99)).miss is None, "nothing but the last token was missed"


def test_a_miss_says_that_nothing_was_there() -> None:
    cache = PrefixCache(block_size=4)
    assert look_up(cache, HOUSE).miss == "cold: nothing cached"
    put(cache, HOUSE)
    assert look_up(cache, (*HOUSE, 13, 14)).miss == "cold: nothing was cached after block 3"


def test_a_miss_says_how_long_ago_a_block_was_evicted_if_anybody_told_the_time() -> None:
    cache = PrefixCache(block_size=4)
    put(cache, HOUSE[:4])
    _, second = put(cache, (99, *HOUSE[:7]), first_block=10)
    cache.withdraw(second)
    assert look_up(cache, (99, *HOUSE)).miss == "evicted: block 1 was cached once"
    put(cache, (99, *HOUSE[:7]), first_block=20)[0]
    cache.now_s = 100.0
    again = cache.node_of(21)
    assert again is not None
    cache.withdraw(again)
    cache.now_s = 112.4
    assert look_up(cache, (99, *HOUSE)).miss == "evicted: block 1, 12 s ago"


def test_under_another_salt_the_asker_hears_of_a_cold_cache_and_only_the_operator_why() -> None:
    cache = PrefixCache(block_size=4)
    put(cache, HOUSE)
    match = look_up(cache, HOUSE, b"tenant")
    assert (match.nodes, match.miss, match.salt_differs) == ((), "cold: nothing cached under this salt", True)
    assert not look_up(cache, (7, 7, 7, 7, 7), b"tenant").salt_differs, "that text is nowhere"
    [first, *_] = look_up(cache, HOUSE).nodes
    cache.withdraw(first)
    assert not look_up(cache, HOUSE, b"tenant").salt_differs, "it is gone"


@pytest.mark.parametrize("salt", [b"", b"tenant"])
def test_a_prompt_may_begin_with_open_blocks_whatever_its_salt(salt: bytes) -> None:
    cache = PrefixCache(block_size=4)
    opened = put(cache, HOUSE, salt=OPEN_SALT)
    assert look_up(cache, (*HOUSE, 99), salt).nodes == tuple(opened)
    assert look_up(cache, (*HOUSE[:8], 99), salt).nodes == tuple(opened[:2])


def test_what_follows_open_blocks_is_seen_under_its_own_salt_alone() -> None:
    cache = PrefixCache(block_size=4)
    opened = put(cache, HOUSE, salt=OPEN_SALT)
    mine = cache.publish(50, opened[-1], (0, 0, 0, 0), salt=b"tenant", tick=1)
    assert look_up(cache, (*HOUSE, 0, 0, 0, 0, 0), b"tenant").nodes == (*opened, mine)
    for salt in (b"", b"other", OPEN_SALT):
        match = look_up(cache, (*HOUSE, 0, 0, 0, 0, 0), salt)
        assert match.nodes == tuple(opened)
        assert match.miss == "cold: nothing was cached after block 3"
    cache.check_integrity()


def test_who_has_a_salt_shares_whole_open_blocks_only_and_learns_no_more() -> None:
    """Token by token, anybody could spell out the pinned text with a few guesses a token."""
    cache = PrefixCache(block_size=4)
    put(cache, HOUSE, salt=OPEN_SALT)
    guess = (*HOUSE[:6], 99, 99, 99)
    other_guess = (*HOUSE[:4], 99, 99, 99, 99, 99)
    seen, other_seen = look_up(cache, guess, b"tenant"), look_up(cache, other_guess, b"tenant")
    assert seen == other_seen
    assert seen.miss == "diverged: in block 1 from the longest match, a pinned prompt"
    without_salt = look_up(cache, guess)
    assert without_salt.partial_tokens == 2
    assert without_salt.miss == "diverged: at token 6 of block 1 from the longest match, a pinned prompt"
    cache.publish_tail(70, look_up(cache, (*HOUSE, 99), OPEN_SALT).nodes[-1], (13, 14), salt=OPEN_SALT, tick=0)
    assert look_up(cache, (*HOUSE, 13, 99), b"tenant").miss == "cold: nothing was cached after block 3"
    assert look_up(cache, (*HOUSE, 13, 99)).partial_tokens == 1


def test_open_blocks_that_go_take_along_what_hung_behind_them_under_any_salt() -> None:
    cache = PrefixCache(block_size=4)
    opened = put(cache, HOUSE, salt=OPEN_SALT)
    for block, salt in ((50, b"tenant"), (51, b"other")):
        cache.publish(block, opened[-1], (0, 0, 0, 0), salt=salt, tick=1)
    assert sorted(cache.withdraw(opened[1])) == [1, 2, 50, 51]
    cache.check_integrity()
    assert len(cache) == 1
    for salt in (b"tenant", b"who never asked before"):
        assert look_up(cache, (*HOUSE, 0, 0, 0, 0, 0), salt).miss == "evicted: block 1 was cached once"


def test_a_long_open_text_behind_which_nothing_is_left_leaves_nothing_behind_either() -> None:
    cache = PrefixCache(block_size=4)
    opened = put(cache, tuple(range(8000)), salt=OPEN_SALT)
    mine = cache.publish(9000, opened[-1], (0, 0, 0, 0), salt=b"tenant", tick=1)
    assert mine is not None
    assert cache.withdraw(mine) == [9000]
    cache.check_integrity()
    assert not any(node.stand_ins for node in opened)


def test_a_salt_that_had_the_blocks_before_the_text_was_opened_goes_on_with_its_own() -> None:
    """Whoever shares a block holds all those above it; from its own blocks there is no way to open ones."""
    cache = PrefixCache(block_size=4)
    own = put(cache, (*HOUSE[:8], 0, 0, 0, 0), salt=b"tenant", first_block=40)
    opened = put(cache, HOUSE, salt=OPEN_SALT)
    assert look_up(cache, (*HOUSE[:8], 0, 0, 0, 0, 0), b"tenant").nodes == tuple(own)
    assert look_up(cache, (*HOUSE, 0), b"tenant").nodes == tuple(own[:2])
    assert put(cache, HOUSE[:8], salt=b"tenant", first_block=60) == own[:2], "published again, they are the same"
    cache.withdraw(own[0])
    assert look_up(cache, (*HOUSE, 0), b"tenant").nodes == tuple(opened)
    assert put(cache, HOUSE, salt=b"tenant", first_block=60) == opened
    cache.publish(70, opened[-1], (0, 0, 0, 0), salt=b"tenant", tick=0)
    assert put(cache, HOUSE, salt=b"tenant", first_block=60) == opened, "not what stands in for them"
    cache.check_integrity()


def test_where_keys_of_two_salts_collide_nothing_is_published_behind_an_open_block() -> None:
    def forgetful_key(parent_key: bytes, token_ids: Sequence[int]) -> bytes:
        """Remembers of all that came before only whether it was open."""
        is_open = parent_key == OPEN_ROOT_KEY or parent_key.startswith(b"open")
        return (b"open" if is_open else b"salted") + bytes(token_ids)

    cache = PrefixCache(block_size=4, hasher=forgetful_key)
    opened = put(cache, HOUSE, salt=OPEN_SALT)
    assert cache.publish(70, opened[-1], (0, 0, 0, 0), salt=b"tenant", tick=0) is not None
    assert cache.publish(71, opened[-1], (1, 0, 0, 0), salt=b"other", tick=0) is None
    assert not cache.publish_tail(71, opened[-1], (1,), salt=b"other", tick=0)
    assert look_up(cache, (*HOUSE, 0, 0, 0, 0, 0), b"other").nodes == tuple(opened)
    assert look_up(cache, (*HOUSE, 0, 0, 0, 0, 0), b"tenant").nodes[:3] == tuple(opened)
    cache.check_integrity()
