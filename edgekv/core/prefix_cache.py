r"""Which published block holds which tokens: what may be shared, what is evicted first, and why something was missed.

Runs in: engine thread; owns: the tree of published blocks and the order in which they are evicted.

    root(salt) --[t0..t15]--> node --[t16..t31]--> node --[t32..t40]--> tail (partly filled: only ever copied from)
                                 \--[t16'..t31']-> node

A node's key is a strong hash of (parent key, token ids); the root's key is a hash of the salt, so that two salts never
meet (but in what the operator pinned: see `prefix_tree`). A hit is believed only after comparing the parent node and
the token ids themselves: a hash collision costs a miss, never a wrong block. Nodes whose block nobody holds are evicted
by (priority, recency, tail before head).
"""

import heapq
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, islice

from edgekv.core.prefix_tree import OPEN_SALT, Hasher, Node, PrefixTree, block_key, root_key

# How many siblings with the same first token are compared, for partial reuse and for tails that it made worthless:
# bounds the work when thousands of prompts share one system prompt.
MAX_SIBLINGS_COMPARED = 64

# How many evicted keys are remembered, only to be able to say that a miss was an eviction.
MAX_GHOSTS = 4096


@dataclass(frozen=True, slots=True)
class Match:
    """The longest cached prefix: whole blocks to share, then `partial_tokens` to copy out of `partial`'s block.

    `miss` says why it is not longer, as `kind: detail`; None where all but the last token was cached. It tells whoever
    asked nothing of what other salts have cached. `salt_differs` does, and is for the operator's eyes only: nothing
    was found, and the first block is cached under another salt.
    """

    nodes: tuple[Node, ...] = ()
    partial: Node | None = None
    partial_tokens: int = 0
    miss: str | None = None
    salt_differs: bool = False

    def cached_tokens(self, block_size: int) -> int:
        """Tokens that need not be computed."""
        return len(self.nodes) * block_size + self.partial_tokens


@dataclass(frozen=True, slots=True)
class _Walk:
    """How far token ids are known: `own` and `common` are the last nodes in the salt's own and in the open tree.

    None where that tree was left before; `nodes` are those whose blocks can be shared.
    """

    nodes: list[Node]
    own: Node | None
    common: Node | None


class PrefixCache(PrefixTree):
    """The published blocks as a cache.

    `now_s` is a time on any clock, set now and then by who has one: then a miss can say how long ago a block was
    evicted.
    """

    def __init__(self, block_size: int, hasher: Hasher = block_key) -> None:
        super().__init__(block_size, hasher)
        self._order: list[tuple[int, int, int, int, Node]] = []
        self._stamps = count(1)
        self._ghosts: OrderedDict[bytes, float | None] = OrderedDict()  # a dict's oldest takes long to find
        self.now_s: float | None = None
        self.evictions = 0

    def extend_keys(self, keys: list[bytes], tokens: Sequence[int], salt: bytes) -> None:
        """Append to `keys` the keys of the full blocks of `tokens` that are not in it yet."""
        size = self.block_size
        for index in range(len(keys), len(tokens) // size):
            parent = keys[-1] if keys else root_key(salt)
            keys.append(self._hash(parent, tokens[index * size : (index + 1) * size]))

    def match(self, tokens: Sequence[int], keys: Sequence[bytes], salt: bytes) -> Match:
        """The longest cached prefix of `tokens` that leaves at least one token to compute.

        Args:
            tokens: the sequence's token ids.
            keys: from `extend_keys`.
            salt: the one the keys were made with.
        """
        size, limit = self.block_size, len(tokens) - 1
        walk = self._walk(tokens, keys, salt, limit // size)
        start = len(walk.nodes) * size
        wanted = tuple(tokens[start : min(start + size, limit)])
        partial, shared = self._closest_child(walk.own, wanted)
        if not salt:
            # Whoever has a salt shares whole open blocks only: token by token, `cached_tokens` would spell out the
            # operator's text to anyone who guesses. Those without one hide nothing from each other.
            other, other_shared = self._closest_child(walk.common, wanted)
            if other_shared > shared:
                partial, shared = other, other_shared
        if start + shared == limit:
            return Match(tuple(walk.nodes), partial, shared)
        miss = self._reason(walk, keys, tokens, shared, salt)
        differs = start + shared == 0 and tuple(tokens[:size]) in self._first_blocks
        return Match(tuple(walk.nodes), partial, shared, miss, differs)

    def chain(self, tokens: Sequence[int], salt: bytes) -> tuple[Node, ...]:
        """The nodes of the leading full blocks of `tokens`, as far as they are published."""
        keys: list[bytes] = []
        self.extend_keys(keys, tokens, salt)
        return tuple(self._walk(tokens, keys, salt, len(keys)).nodes)

    def publish(self, block: int, parent: Node | None, tokens: Sequence[int], *, salt: bytes, tick: int) -> Node | None:
        """Publish a full block that follows `parent` (None: the first block of a sequence with this salt).

        Returns the live node with this content: a new one, or the one that was there already with a block of its
        own. None where another content has the same key (a hash collision), and then nothing is published.
        """
        if len(tokens) != self.block_size:
            raise ValueError(f"{len(tokens)} tokens do not fill a block of {self.block_size}")
        content = tuple(tokens)
        present = self._present(parent, content, salt)
        if present is not None:
            return present
        place = self._place(parent, salt)
        if place is None:
            return None
        key = self._hash(place.key, content)
        if key in self._by_key:
            self._drop_empty(place)
            return None
        self._ghosts.pop(key, None)
        return self._attach(Node(key, place, content, block, place.depth + 1, last_used=tick, is_open=place.is_open))

    def publish_tail(self, block: int, parent: Node | None, tokens: Sequence[int], *, salt: bytes, tick: int) -> bool:
        """Publish a partly filled last block, to be copied from. False where a sibling already offers as much."""
        place = self._place(parent, salt)
        if place is None:
            return False
        content = tuple(tokens)
        for sibling in self._siblings(place, content):
            if sibling.tokens[: len(content)] == content:
                self._drop_empty(place)
                return False
        self._attach(Node(b"", place, content, block, place.depth + 1, last_used=tick, is_open=place.is_open))
        return True

    def touch(self, nodes: Sequence[Node], tick: int) -> None:
        """Mark a matched chain as used now."""
        for node in nodes:
            node.last_used = tick

    def offer(self, block: int) -> None:
        """The block's last holder let go of it: from now on it may be evicted."""
        node = self._by_block[block]
        node.stamp = next(self._stamps)
        heapq.heappush(self._order, (node.priority, node.last_used, -node.depth, node.stamp, node))
        if len(self._order) > 64 + 4 * len(self._by_block):
            self._order = [item for item in self._order if item[4].live and item[3] == item[4].stamp]
            heapq.heapify(self._order)

    def withhold(self, block: int) -> None:
        """The block is held again: it may not be evicted."""
        self._by_block[block].stamp = 0

    def evict(self) -> list[int]:
        """Withdraw the node that is cheapest to lose, with all that hangs below it.

        Returns the blocks withdrawn; those that nobody holds are to be reclaimed by the caller. Raises LookupError
        when there is nothing to evict.
        """
        while self._order:
            *_, stamp, node = heapq.heappop(self._order)
            if node.live and stamp == node.stamp:
                self.evictions += 1
                return self.withdraw(node)
        raise LookupError("no cached block to evict")

    def shadowed_tails(self, parent: Node | None, tokens: Sequence[int], salt: bytes) -> list[Node]:
        """Tails below `parent` that are a proper prefix of `tokens`: worthless once `tokens` are published.

        Like a match, it looks at the latest siblings only; an older tail is left to be evicted.
        """
        place = self._find_place(parent, salt)
        content = tuple(tokens)
        return [
            sibling
            for sibling in self._siblings(place, content)
            if len(sibling.tokens) < len(content) and content[: len(sibling.tokens)] == sibling.tokens
        ]

    def _walk(self, tokens: Sequence[int], keys: Sequence[bytes], salt: bytes, most_blocks: int) -> _Walk:
        size = self.block_size
        nodes: list[Node] = []
        own = self._roots.get(root_key(salt))
        common = None if salt == OPEN_SALT else self._roots.get(root_key(OPEN_SALT))
        for index in range(most_blocks):
            content = tuple(tokens[index * size : (index + 1) * size])
            next_own = None if own is None else self._child(own, content, keys[index])
            next_common = None if common is None else self._child(common, content)
            if next_own is None:
                found = next_common
            elif next_own.original is not None:
                found = next_own.original
            else:
                found, next_common = next_own, None
            if found is None:
                break
            nodes.append(found)
            own, common = next_own, next_common
        return _Walk(nodes, own, common)

    def _present(self, parent: Node | None, content: tuple[int, ...], salt: bytes) -> Node | None:
        """The node whose block is shared for `content` after `parent`: the salt's own before an open one."""
        place = self._find_place(parent, salt)
        own = None if place is None else self._child(place, content)
        if own is not None:
            return own.original or own
        top = self._roots.get(root_key(OPEN_SALT)) if parent is None else parent
        return self._child(top, content) if top is not None and top.is_open else None

    def _siblings(self, parent: Node | None, tokens: Sequence[int]) -> list[Node]:
        """The latest nodes below `parent` that begin as `tokens` do and have a block."""
        if parent is None or not tokens:
            return []
        latest = list(islice(reversed(parent.children.get(tokens[0], {})), MAX_SIBLINGS_COMPARED))
        return [node for node in reversed(latest) if node.original is None]

    def _closest_child(self, tip: Node | None, wanted: Sequence[int]) -> tuple[Node | None, int]:
        best, best_shared = None, 0
        for child in self._siblings(tip, wanted):
            shared = _common_prefix(child.tokens, wanted)
            if shared > best_shared:
                best, best_shared = child, shared
        return best, best_shared

    def _reason(self, walk: _Walk, keys: Sequence[bytes], tokens: Sequence[int], shared: int, salt: bytes) -> str:
        number = len(walk.nodes)
        if number < len(keys):
            size = self.block_size
            above = root_key(OPEN_SALT) if number == 0 else None if walk.common is None else walk.common.key
            lost = [keys[number]]
            if above is not None:
                lost.append(self._hash(above, tokens[number * size : (number + 1) * size]))
            for key in lost:
                if key in self._ghosts:
                    return f"evicted: block {number}{self._ago(self._ghosts[key])}"
        position = number * self.block_size + shared
        if walk.own is not None and any(child.original is None for child in walk.own.below()):
            return f"diverged: at token {position} of block {number} from the longest match"
        common = [] if walk.common is None else list(walk.common.below())
        if common and not salt:
            return f"diverged: at token {position} of block {number} from the longest match, a pinned prompt"
        if number and any(len(child.tokens) == self.block_size for child in common):
            return f"diverged: in block {number} from the longest match, a pinned prompt"
        if number == 0:
            return "cold: nothing cached under this salt" if salt else "cold: nothing cached"
        return f"cold: nothing was cached after block {number}"

    def _ago(self, evicted_s: float | None) -> str:
        if evicted_s is None or self.now_s is None:
            return " was cached once"
        return f", {max(0.0, self.now_s - evicted_s):.0f} s ago"

    def _remember(self, dead: Sequence[Node]) -> None:
        for node in dead[-MAX_GHOSTS:]:
            if len(node.tokens) == self.block_size and (node.original is None or not node.original.live):
                self._ghosts[node.key] = self.now_s
                if len(self._ghosts) > MAX_GHOSTS:
                    self._ghosts.popitem(last=False)


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))
