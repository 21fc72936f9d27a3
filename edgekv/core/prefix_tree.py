r"""The tree of published blocks: what follows what, under which salt.

Runs in: engine thread; owns: the published nodes.

    open root --[t0..t15]--> P0 --[t16..t31]--> P1                     the operator's own text, for every salt
    root(salt) - - - (P0) - - - - - - - - - - - (P1) --[t32..t47]--> node      of this salt, and for no other

Each salt has a tree of its own, and no node of one is ever reached from another's root. The one exception is the tree
under OPEN_SALT, which holds what the operator pinned and nothing else: its blocks are shared by all. What a sequence
publishes behind such a block goes below a stand-in, (P0) above: a node of the sequence's own tree that has no block
and means the open one. So what must stay hidden is kept apart by where it hangs, not by a test at each look-up.

Above a stand-in are only stand-ins, so that whoever holds the blocks of a chain holds all that its last node hangs on.
Where a salt had blocks of its own before a text was opened, it goes on with those.
"""

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

KEY_BYTES = 32

# A salt that no request can have: a request's is empty or a digest of 32 bytes.
OPEN_SALT = b"edgekv: open to every salt"

Hasher = Callable[[bytes, Sequence[int]], bytes]


def block_key(parent_key: bytes, token_ids: Sequence[int]) -> bytes:
    """The content address of a block: BLAKE2b-256 over the parent's key and the token ids (32-bit each)."""
    return blake2b(parent_key + array("i", token_ids).tobytes(), digest_size=KEY_BYTES).digest()


def root_key(salt: bytes) -> bytes:
    """The key above a chain's first block; differs for each salt."""
    return blake2b(salt, digest_size=KEY_BYTES, person=b"edgekv-prefix").digest()


OPEN_ROOT_KEY = root_key(OPEN_SALT)


@dataclass(slots=True, eq=False)
class Node:
    """One published block. `live` turns false when it is withdrawn; a dead node is never matched or a parent.

    A higher `priority` is evicted later. `stamp` names the node's valid entry in the eviction order, 0 while held.
    `pins`: by how many names it is held. `is_open`: it hangs below the open root. A root and a stand-in have no
    `block`; `original` is what a stand-in means, and has it among its `stand_ins`, by key. `children` are in the order
    of their publishing, by their first token (a mapping, because thousands may begin alike and go one by one).
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
    pins: int = 0
    is_open: bool = False
    original: "Node | None" = None
    children: dict[int, dict["Node", None]] = field(default_factory=dict)
    stand_ins: dict[bytes, "Node"] = field(default_factory=dict)

    def below(self) -> Iterator["Node"]:
        """All that hangs directly below."""
        return (child for siblings in self.children.values() for child in siblings)

    def path(self) -> list["Node"]:
        """From a chain's first block to this one, without the root."""
        path, node = [], self
        while node.parent is not None:
            path.append(node)
            node = node.parent
        return path[::-1]


class PrefixTree:
    """The published blocks of all salts.

    Invariant: every live node but a root has a live parent; a key names at most one live node; a block belongs to at
    most one live node; the tokens of a live node never change; only roots and stand-ins have no block, and none of
    them is kept without children.

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
        self._first_blocks: Counter[tuple[int, ...]] = Counter()

    def __len__(self) -> int:
        return len(self._by_block)

    def node_of(self, block: int) -> Node | None:
        """The live node that publishes `block`."""
        return self._by_block.get(block)

    def published_blocks(self) -> list[int]:
        """The blocks of all live nodes."""
        return list(self._by_block)

    def relocate(self, block: int, to: int) -> None:
        """The content of `block` is in `to` from now on."""
        node = self._by_block.pop(block)
        node.block = to
        self._by_block[to] = node

    def withdraw(self, node: Node) -> list[int]:
        """Take `node` and all that hangs below it or its stand-ins out of the tree; returns their blocks."""
        return self.withdraw_all((node,))

    def withdraw_all(self, nodes: Iterable[Node]) -> list[int]:
        """`withdraw` for many at once: each node that hangs below several of them is visited once."""
        doomed = list(nodes)
        for node in doomed:
            node.live = False
        for dead in doomed:  # grows meanwhile
            for below in (*dead.children.values(), dead.stand_ins.values()):
                for other in below:
                    if other.live:
                        other.live = False
                        doomed.append(other)
        # Most of a whole cache hangs below nodes that go as well: with these goes what they say of it.
        inner: list[Node] = []
        for dead in doomed:
            if dead.block is None or dead.pins or dead.parent is None or dead.parent.live:
                self._take_out(dead)
                continue
            dead.children.clear()
            del self._by_block[dead.block]
            if self._by_key.get(dead.key) is dead:
                del self._by_key[dead.key]
            inner.append(dead)
        self._remember(inner)
        return [dead.block for dead in doomed if dead.block is not None]

    def check_integrity(self) -> None:
        """Raise AssertionError where the invariant does not hold."""
        for block, node in self._by_block.items():
            assert node.block == block, f"block {block} is filed under {node.block}"
            assert node.original is None, f"block {block} is a stand-in's"
        assert all(self._by_key.get(key) is node for key, node in self._stand_ins()), "a stand-in is not in the tree"
        for node in [*self._by_block.values(), *self._by_key.values()]:
            name = f"block {node.block}" if node.original is None else f"the stand-in of block {node.original.block}"
            assert node.live, f"{name} has a dead node"
            assert node.parent is not None, f"{name} has no parent"
            assert node.parent.live, f"{name} hangs in the air"
            assert node in node.parent.children[node.tokens[0]], f"{name} is not its parent's child"
            assert node.is_open == node.parent.is_open, f"{name} hangs in the wrong tree"
            if len(node.tokens) == self.block_size:
                assert self._by_key.get(node.key) is node, f"the key of {name} names another block"
                assert node.key == self._hash(node.parent.key, node.tokens), f"the key of {name} is stale"
            if node.original is not None:
                original = node.original
                assert node.block is None, f"{name} has a block"
                assert original.live, f"{name} outlived it"
                assert original.parent is node.parent.original or original.depth == 1, f"{name} hangs on a block"
                assert original.is_open, f"{name} means a block that is not open"
                assert original.stand_ins.get(node.key) is node, f"{name} is unknown to it"
                assert node.tokens == original.tokens, f"{name} has other tokens"
                assert node.children, f"{name} was kept for nothing"
        assert all(root.children for root in self._roots.values()), "an empty root was kept"
        assert all(root.is_open == (key == OPEN_ROOT_KEY) for key, root in self._roots.items()), "a root is in disguise"
        firsts = Counter(node.tokens for node in self._by_block.values() if self._is_first(node))
        assert +self._first_blocks == firsts, "the first blocks are miscounted"

    def _child(self, parent: Node, tokens: tuple[int, ...], key: bytes | None = None) -> Node | None:
        """The node of a full block that follows `parent`, with its key where that is known."""
        node = self._by_key.get(self._hash(parent.key, tokens) if key is None else key)
        return node if node is not None and self._holds(node, parent, tokens) else None

    def _holds(self, node: Node, parent: Node, tokens: Sequence[int]) -> bool:
        """Whether the node really is the block asked for, and not another whose key is the same."""
        return node.parent is parent and node.tokens == tuple(tokens)

    def _place(self, parent: Node | None, salt: bytes) -> Node | None:
        """The node of the salt's own tree below which goes what follows `parent`.

        None where the key of a stand-in that it takes is another's.
        """
        if parent is not None and (salt == OPEN_SALT or not parent.is_open):
            return parent
        key = root_key(salt)
        place = self._roots.setdefault(key, Node(key, None, (), None, 0, is_open=salt == OPEN_SALT))
        for original in () if parent is None else parent.path():
            key = self._hash(place.key, original.tokens)
            below = self._by_key.get(key)
            if below is None:
                below = Node(key, place, original.tokens, None, place.depth + 1, original=original)
                original.stand_ins[key] = below
                self._attach(below)
            elif below.original is not original or below.parent is not place:
                self._drop_empty(place)
                return None
            place = below
        return place

    def _find_place(self, parent: Node | None, salt: bytes) -> Node | None:
        """The place that there is already."""
        if parent is not None and (salt == OPEN_SALT or not parent.is_open):
            return parent
        place = self._roots.get(root_key(salt))
        for original in () if parent is None else parent.path():
            below = None if place is None else self._child(place, original.tokens)
            place = below if below is not None and below.original is original else None
        return place

    def _attach(self, node: Node) -> Node:
        assert node.parent is not None
        node.parent.children.setdefault(node.tokens[0], {})[node] = None
        if len(node.tokens) == self.block_size:
            self._by_key[node.key] = node
        if node.block is not None:
            assert node.block not in self._by_block, f"block {node.block} is published already"
            self._by_block[node.block] = node
        if self._is_first(node):
            self._first_blocks[node.tokens] += 1
        return node

    def _remember(self, dead: Sequence[Node]) -> None:
        """Nodes that have died, for whoever wants to know."""

    def _take_out(self, dead: Node) -> None:
        """A node dies; what hangs below it does too."""
        assert dead.parent is not None
        self._strike(dead)
        if dead.parent.live:
            self._drop_empty(dead.parent)

    def _strike(self, dead: Node) -> None:
        """Remove every mention of a node but those that its children make."""
        assert not dead.pins, f"block {dead.block} is pinned and was withdrawn"
        assert dead.parent is not None
        dead.live = False
        dead.children.clear()
        if dead.parent.live:
            siblings = dead.parent.children[dead.tokens[0]]
            del siblings[dead]
            if not siblings:
                del dead.parent.children[dead.tokens[0]]
        if dead.original is not None:
            del dead.original.stand_ins[dead.key]
        if dead.block is not None:
            del self._by_block[dead.block]
        if len(dead.tokens) == self.block_size and self._by_key.get(dead.key) is dead:
            del self._by_key[dead.key]
        if self._is_first(dead):
            self._first_blocks[dead.tokens] -= 1
            if not self._first_blocks[dead.tokens]:
                del self._first_blocks[dead.tokens]
        self._remember((dead,))

    def _drop_empty(self, node: Node) -> None:
        """A root or a stand-in is there for its children only: without any it goes, and those above it too."""
        while not node.children:
            if node.parent is None:
                self._roots.pop(node.key, None)
                return
            if node.original is None:
                return
            self._strike(node)
            node = node.parent

    def _is_first(self, node: Node) -> bool:
        return node.depth == 1 and node.block is not None and len(node.tokens) == self.block_size

    def _stand_ins(self) -> Iterator[tuple[bytes, Node]]:
        return (item for node in self._by_block.values() for item in node.stand_ins.items())
