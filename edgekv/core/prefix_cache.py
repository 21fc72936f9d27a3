r"""Which published block holds which tokens: a tree of content-addressed blocks.

Runs in: engine thread; owns: the published nodes and the order in which they are evicted.

    root(salt) --[t0..t15]--> node --[t16..t31]--> node --[t32..t40]--> tail (partly filled: only ever copied from)
                                 \--[t16'..t31']-> node

A node's key is a strong hash of (parent key, token ids); the root's key is a hash of the salt, so that two salts never
meet. A hit is believed only after comparing the parent node and the token ids themselves: a hash collision costs a
miss, never a wrong block. Nodes whose block nobody holds are evicted by (priority, recency, tail before head).
"""

import heapq
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import count

KEY_BYTES = 32

# How many siblings with the same first token are compared, for partial reuse and for tails that it made worthless:
# bounds the work when thousands of prompts share one system prompt.
MAX_SIBLINGS_COMPARED = 64

# How many evicted keys are remembered, only to be able to say that a miss was an eviction.
MAX_GHOSTS = 4096

Hasher = Callable[[bytes, Sequence[int]], bytes]


def block_key(parent_key: bytes, token_ids: Sequence[int]) -> bytes:
    """The content address of a block: BLAKE2b-256 over the parent's key and the token ids (32-bit each)."""
    return blake2b(parent_key + array("i", token_ids).tobytes(), digest_size=KEY_BYTES).digest()


def root_key(salt: bytes) -> bytes:
    """The key above a chain's first block; differs for each salt."""
    return blake2b(salt, digest_size=KEY_BYTES, person=b"edgekv-prefix").digest()


@dataclass(slots=True, eq=False)
class Node:
    """One published block. `live` turns false when it is withdrawn; a dead node is never matched or a parent.

    A higher `priority` is evicted later. `stamp` names the node's valid entry in the eviction order, 0 while held.
    """

    key: bytes
    parent: "Node | None"
    tokens: tuple[int, ...]
    block: int | None
    depth: int
    last_used: int = 0
    priority: int = 0
    live: bool = True
    stamp: int = 0
    children: dict[int, list["Node"]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Match:
    """The longest cached prefix: whole blocks to share, then `partial_tokens` to copy out of `partial`'s block.

    `miss` says why it is not longer, as `kind: detail`; None where all but the last token was cached.
    """

    nodes: tuple[Node, ...] = ()
    partial: Node | None = None
    partial_tokens: int = 0
    miss: str | None = None

    def cached_tokens(self, block_size: int) -> int:
        """Tokens that need not be computed."""
        return len(self.nodes) * block_size + self.partial_tokens


class PrefixCache:
    """The tree of published blocks.

    Invariant: every live node but a root has a live parent; a key names at most one live node; a block belongs to at
    most one live node; the tokens of a live node never change.

    Args:
        block_size: tokens in a full block.
        hasher: replaces `block_key` (tests force collisions with it).
    """

    def __init__(self, block_size: int, hasher: Hasher = block_key) -> None:
        self.block_size = block_size
        self._hash = hasher
        self._roots: dict[bytes, Node] = {}
        self._by_key: dict[bytes, Node] = {}
        self._by_block: dict[int, Node] = {}
        self._order: list[tuple[int, int, int, int, Node]] = []
        self._stamps = count(1)
        self._ghosts: dict[bytes, None] = {}
        self.evictions = 0

    def __len__(self) -> int:
        return len(self._by_block)

    def node_of(self, block: int) -> Node | None:
        """The live node that publishes `block`."""
        return self._by_block.get(block)

    def published_blocks(self) -> list[int]:
        """The blocks of all live nodes."""
        return list(self._by_block)

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
        root = self._roots.get(root_key(salt))
        if root is None:
            return Match(miss="other salt: nothing cached under this one" if self._roots else "cold: nothing cached")
        nodes: list[Node] = []
        tip = root
        for index in range(limit // size):
            node = self._by_key.get(keys[index])
            if node is None or not self._holds(node, tip, tokens[index * size : (index + 1) * size]):
                break
            nodes.append(node)
            tip = node
        start = len(nodes) * size
        partial, shared = self._closest_child(tip, tokens[start : min(start + size, limit)])
        if start + shared == limit:
            return Match(tuple(nodes), partial, shared)
        return Match(tuple(nodes), partial, shared, self._reason(tip, keys, len(nodes), shared))

    def publish(self, block: int, parent: Node | None, tokens: Sequence[int], *, salt: bytes, tick: int) -> Node | None:
        """Publish a full block that follows `parent` (None: the first block of a sequence with this salt).

        Returns the live node with this content: a new one, or the one that was there already with a block of its
        own. None where another content has the same key (a hash collision), and then nothing is published.
        """
        if len(tokens) != self.block_size:
            raise ValueError(f"{len(tokens)} tokens do not fill a block of {self.block_size}")
        parent = self._parent_or_root(parent, salt)
        content = tuple(tokens)
        key = self._hash(parent.key, content)
        present = self._by_key.get(key)
        if present is not None:
            self._drop_empty_root(parent)
            return present if self._holds(present, parent, content) else None
        node = self._attach(Node(key, parent, content, block, parent.depth + 1, last_used=tick))
        self._by_key[key] = node
        self._ghosts.pop(key, None)
        return node

    def publish_tail(self, block: int, parent: Node | None, tokens: Sequence[int], *, salt: bytes, tick: int) -> bool:
        """Publish a partly filled last block, to be copied from. False where a sibling already offers as much."""
        parent = self._parent_or_root(parent, salt)
        content = tuple(tokens)
        for sibling in self._siblings(parent, content):
            if sibling.tokens[: len(content)] == content:
                self._drop_empty_root(parent)
                return False
        self._attach(Node(b"", parent, content, block, parent.depth + 1, last_used=tick))
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

    def relocate(self, block: int, to: int) -> None:
        """The content of `block` is in `to` from now on."""
        node = self._by_block.pop(block)
        node.block = to
        self._by_block[to] = node

    def withdraw(self, node: Node) -> list[int]:
        """Take `node` and its descendants out of the tree; returns their blocks."""
        self._detach(node)
        blocks: list[int] = []
        stack = [node]
        while stack:
            dead = stack.pop()
            dead.live = False
            assert dead.block is not None
            blocks.append(dead.block)
            del self._by_block[dead.block]
            if len(dead.tokens) == self.block_size and self._by_key.get(dead.key) is dead:
                del self._by_key[dead.key]
                self._remember(dead.key)
            for siblings in dead.children.values():
                stack.extend(siblings)
            dead.children.clear()
        return blocks

    def shadowed_tails(self, parent: Node | None, tokens: Sequence[int], salt: bytes) -> list[Node]:
        """Tails below `parent` that are a proper prefix of `tokens`: worthless once `tokens` are published.

        Like a match, it looks at the latest siblings only; an older tail is left to be evicted.
        """
        top = parent or self._roots.get(root_key(salt))
        if top is None:
            return []
        content = tuple(tokens)
        return [
            sibling
            for sibling in self._siblings(top, content)
            if len(sibling.tokens) < len(content) and content[: len(sibling.tokens)] == sibling.tokens
        ]

    def check_integrity(self) -> None:
        """Raise AssertionError where the invariant does not hold."""
        for block, node in self._by_block.items():
            assert node.live, f"block {block} has a dead node"
            assert node.block == block, f"block {block} is filed under {node.block}"
            assert node.parent is not None, f"block {block} has no parent"
            assert node.parent.live, f"block {block} hangs in the air"
            assert node in node.parent.children[node.tokens[0]], f"block {block} is not its parent's child"
            if len(node.tokens) == self.block_size:
                assert self._by_key.get(node.key) is node, f"the key of block {block} names another block"
                assert node.key == self._hash(node.parent.key, node.tokens), f"the key of block {block} is stale"
        assert all(node.live and node.block in self._by_block for node in self._by_key.values()), "a key is stale"
        assert all(root.children for root in self._roots.values()), "an empty root was kept"

    def _holds(self, node: Node, parent: Node, tokens: Sequence[int]) -> bool:
        """Whether the node really is the block asked for, and not another whose key is the same."""
        return node.parent is parent and node.tokens == tuple(tokens)

    def _attach(self, node: Node) -> Node:
        assert node.parent is not None
        assert node.block is not None
        assert node.block not in self._by_block, f"block {node.block} is published already"
        node.parent.children.setdefault(node.tokens[0], []).append(node)
        self._by_block[node.block] = node
        return node

    def _detach(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None
        siblings = parent.children[node.tokens[0]]
        siblings.remove(node)
        if not siblings:
            del parent.children[node.tokens[0]]
        self._drop_empty_root(parent)

    def _parent_or_root(self, parent: Node | None, salt: bytes) -> Node:
        if parent is not None:
            return parent
        key = root_key(salt)
        return self._roots.setdefault(key, Node(key, None, (), None, 0))

    def _drop_empty_root(self, node: Node) -> None:
        if node.parent is None and not node.children:
            self._roots.pop(node.key, None)

    def _siblings(self, parent: Node, tokens: Sequence[int]) -> list[Node]:
        return parent.children.get(tokens[0], [])[-MAX_SIBLINGS_COMPARED:] if tokens else []

    def _closest_child(self, tip: Node, wanted: Sequence[int]) -> tuple[Node | None, int]:
        best, best_shared = None, 0
        for child in self._siblings(tip, wanted):
            shared = _common_prefix(child.tokens, wanted)
            if shared > best_shared:
                best, best_shared = child, shared
        return best, best_shared

    def _reason(self, tip: Node, keys: Sequence[bytes], matched_blocks: int, shared: int) -> str:
        if matched_blocks < len(keys) and keys[matched_blocks] in self._ghosts:
            return f"evicted: block {matched_blocks} was cached once"
        if tip.children:
            return f"diverged: at token {shared} of block {matched_blocks} of the longest match"
        return f"cold: nothing was cached after block {matched_blocks}"

    def _remember(self, key: bytes) -> None:
        self._ghosts[key] = None
        if len(self._ghosts) > MAX_GHOSTS:
            del self._ghosts[next(iter(self._ghosts))]


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))
