"""Block tables: gives blocks to sequences, shares cached ones, evicts, publishes, takes back.

Runs in: engine thread; owns: the block pool and the prefix cache, and keeps the two in step.
"""

from collections import Counter
from collections.abc import Collection, Iterable
from collections.abc import Sequence as Listing
from dataclasses import dataclass

from edgekv.core.block_pool import BlockPool, BlockState, OutOfBlocks
from edgekv.core.prefix_cache import Match, PrefixCache
from edgekv.core.prefix_tree import Node
from edgekv.core.sequence import Sequence
from edgekv.core.step import BlockCopy


@dataclass(slots=True)
class _Chain:
    """The published nodes of a sequence's leading blocks; `closed` once a hash collision ended its publishing."""

    nodes: list[Node]
    closed: bool = False


class KVCache:
    """The block tables of all running sequences.

    Invariant: a block's reference count is the number of tables that hold it, plus the pins of this step's copies, plus
    the names that it is pinned by. What is pinned by a name is a whole chain from its first block on, so none of its
    nodes has one above that could be withdrawn and take it along.

    Args:
        pool: the blocks.
        prefix: the published ones, or None to reuse nothing.
    """

    def __init__(self, pool: BlockPool, prefix: PrefixCache | None) -> None:
        self.pool = pool
        self.prefix = prefix
        self._chains: dict[int, _Chain] = {}
        self._pins: list[int] = []
        self._pinned: dict[str, tuple[Node, ...]] = {}
        self._num_pinned = 0
        self._tick = 0

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self.pool.block_size

    @property
    def obtainable_blocks(self) -> int:
        """Blocks that an allocation can have: free ones, and cached ones through eviction."""
        return self.pool.free_blocks + self.pool.cached_blocks

    @property
    def pinned_blocks(self) -> int:
        """Blocks that a name pins, each counted once: no shrinking gets below them."""
        return self._num_pinned

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens`."""
        return -(-num_tokens // self.block_size)

    def match(self, sequence: Sequence) -> Match:
        """What of the sequence's tokens is cached."""
        if self.prefix is None:
            return Match()
        self.prefix.extend_keys(sequence.block_keys, sequence.tokens, sequence.spec.salt)
        return self.prefix.match(sequence.tokens, sequence.block_keys, sequence.spec.salt)

    def can_admit(self, sequence: Sequence, match: Match, reserve_blocks: int) -> bool:
        """Whether blocks for all of the sequence's tokens can be had, with `reserve_blocks` to spare."""
        new_blocks = self.blocks_for(len(sequence.tokens)) - len(match.nodes)
        return new_blocks + reserve_blocks <= self.obtainable_blocks - self._revived(match.nodes)

    def admit(self, sequence: Sequence, match: Match) -> list[BlockCopy]:
        """Give the sequence its blocks: shared ones for `match`, new ones for the rest.

        Returns the copy that starts a partly matched block. Raises OutOfBlocks, changing nothing, when
        `can_admit` would say no.
        """
        new_blocks = self.blocks_for(len(sequence.tokens)) - len(match.nodes)
        available = self.obtainable_blocks - self._revived(match.nodes)
        if new_blocks > available:
            raise OutOfBlocks(new_blocks, available)
        self._tick += 1
        shared = [self._hold(node) for node in match.nodes]
        # The block that is copied from must outlive this step's evictions. That needs one block more than the
        # sequence itself; where there is none, the partial match is given up.
        partial = match.partial
        if partial is not None and new_blocks > self.obtainable_blocks - self._revived((partial,)):
            partial = None
        if partial is not None:
            self._pins.append(self._hold(partial))
        fresh = self._take(new_blocks)
        sequence.block_table = shared + fresh
        sequence.num_computed = len(shared) * self.block_size
        self._chains[sequence.id] = _Chain(list(match.nodes))
        if partial is None or partial.block is None:
            return []
        sequence.num_computed += match.partial_tokens
        return [BlockCopy(partial.block, fresh[0], match.partial_tokens)]

    def missing_blocks(self, sequence: Sequence, num_tokens: int) -> int:
        """Blocks that the sequence's table lacks to cover `num_tokens`."""
        return max(0, self.blocks_for(num_tokens) - len(sequence.block_table))

    def can_grow(self, sequence: Sequence) -> bool:
        """Whether blocks for all of the sequence's tokens can be had."""
        return self.missing_blocks(sequence, len(sequence.tokens)) <= self.obtainable_blocks

    def grow(self, sequence: Sequence, num_tokens: int | None = None) -> None:
        """Extend the block table to cover `num_tokens`, or all that the sequence has.

        Raises OutOfBlocks, changing nothing.
        """
        missing = self.missing_blocks(sequence, len(sequence.tokens) if num_tokens is None else num_tokens)
        if missing > 0:
            sequence.block_table += self._take(missing)

    def trim(self, sequence: Sequence) -> None:
        """Take back the blocks behind all of the sequence's tokens, which were for proposals that are none of them."""
        for block in sequence.block_table[self.blocks_for(len(sequence.tokens)) :]:
            self._let_go(block)
        del sequence.block_table[self.blocks_for(len(sequence.tokens)) :]

    def publish(self, sequence: Sequence) -> None:
        """Publish the sequence's full computed blocks, so that others may share them."""
        chain = self._chains[sequence.id]
        if self.prefix is None or chain.closed:
            return
        if chain.nodes and not chain.nodes[-1].live:
            # A shared ancestor was evicted from under the chain: file this sequence's own blocks from the top.
            chain.nodes.clear()
        size, salt = self.block_size, sequence.spec.salt
        for index in range(len(chain.nodes), sequence.num_computed // size):
            tokens = sequence.tokens[index * size : (index + 1) * size]
            parent = chain.nodes[-1] if chain.nodes else None
            self._drop_tails(parent, tokens, salt)
            node = self.prefix.publish(sequence.block_table[index], parent, tokens, salt=salt, tick=self._tick)
            if node is None:
                chain.closed = True
                return
            chain.nodes.append(node)

    def release(self, sequence: Sequence) -> None:
        """Take back all of the sequence's blocks; published ones stay cached, its partly filled tail too."""
        self._tick += 1
        chain = self._chains.pop(sequence.id)
        if self.prefix is not None:
            self._publish_tail(sequence, chain)
            self.prefix.touch([node for node in chain.nodes if node.live], self._tick)
        for block in sequence.block_table:
            self._let_go(block)
        sequence.block_table = []
        sequence.num_computed = 0

    def distrust(self, sequence: Sequence) -> None:
        """Stop publishing this sequence and withdraw what only it holds: its content may be wrong."""
        self._chains[sequence.id].closed = True
        if self.prefix is None:
            return
        for block in sequence.block_table:
            node = self.prefix.node_of(block)
            if node is not None and self.pool.refs(block) == 1:
                self.pool.reclaim(self.prefix.withdraw(node))

    def unpin(self) -> None:
        """The step's copies are done: let go of their sources."""
        for block in self._pins:
            self._let_go(block)
        self._pins.clear()

    def tell_time(self, now_s: float) -> None:
        """The present on any clock, for reasons that say how long ago something was."""
        if self.prefix is not None:
            self.prefix.now_s = now_s

    def chain(self, tokens: Listing[int], salt: bytes) -> tuple[Node, ...]:
        """The published nodes of the leading full blocks of `tokens`."""
        return () if self.prefix is None else self.prefix.chain(tokens, salt)

    def pin_prefix(self, name: str, chain: Listing[Node], *, priority: int = 0) -> None:
        """Hold a published chain by a name: until `unpin_prefix` none of its blocks is evicted or withdrawn.

        Its nodes have that `priority` from now on and afterwards too, or the highest of several names'. Raises
        ValueError for a name in use, an empty or broken chain, or a block that is not full.
        """
        if name in self._pinned:
            raise ValueError(f"{name!r} pins a prefix already")
        if not chain or chain[0].depth != 1:
            raise ValueError(f"{name!r}: a chain begins with a first block")
        for above, node in zip((None, *chain), chain, strict=False):
            if not node.live or node.block is None or len(node.tokens) != self.block_size:
                raise ValueError(f"{name!r}: node {node.depth} of the chain has no full published block")
            if above is not None and node.parent is not above and not (node.parent and node.parent.original is above):
                raise ValueError(f"{name!r}: node {node.depth} of the chain does not follow the one before it")
        for node in chain:
            self._retain(node)
            self._num_pinned += node.pins == 0
            node.priority = max(node.priority, priority) if node.pins else priority
            node.pins += 1
        self._pinned[name] = tuple(chain)

    def unpin_prefix(self, name: str) -> None:
        """Let go of what a name pinned; what nobody else holds is cached. Raises KeyError for an unknown name."""
        for node in self._pinned.pop(name):
            node.pins -= 1
            self._num_pinned -= node.pins == 0
            assert node.block is not None
            self._let_go(node.block)

    def vacate(self, segments: Collection[int], running: Iterable[Sequence]) -> list[BlockCopy]:
        """Empty segments, so that they can be removed: evict what is cached in them, move what is held elsewhere.

        Between steps only, and all that go in one call, so that nothing moves into one that goes next. The block tables
        of `running` name the new blocks at once; the copies must be made before they are used. Raises OutOfBlocks,
        having moved nothing, where the other segments cannot take the held blocks.
        """
        assert not self._pins, "a segment is vacated between steps"
        if self.prefix is not None:
            cached = (block for segment in segments for block in self.pool.cached_blocks_in(segment))
            nodes = [node for block in cached if (node := self.prefix.node_of(block)) is not None]
            self.pool.reclaim(self.prefix.withdraw_all(nodes))
        held = [block for segment in segments for block in self.pool.active_blocks_in(segment)]
        while self.pool.free_blocks_beside(segments) < len(held) and self.pool.cached_blocks:
            self._evict_one()
        moves = dict(zip(held, self.pool.allocate(len(held), beside=segments), strict=True))
        for block, to in moves.items():
            self.pool.hand_over(block, to)
            if self.prefix is not None and self.prefix.node_of(block) is not None:
                self.prefix.relocate(block, to)
        for sequence in running:
            if not moves.keys().isdisjoint(sequence.block_table):
                sequence.block_table = [moves.get(block, block) for block in sequence.block_table]
        return [BlockCopy(block, to, self.block_size) for block, to in moves.items()]

    def flush(self) -> int:
        """Evict every cached block that nobody holds, which leaves those that are pinned; returns how many."""
        before = self.pool.free_blocks
        while self.pool.cached_blocks:
            self._evict_one()
        return self.pool.free_blocks - before

    def check_integrity(self, running: Iterable[Sequence]) -> None:
        """Raise AssertionError where a table, a count or a published block is wrong."""
        self.pool.check_integrity()
        tables: Counter[int] = Counter()
        for sequence in running:
            table = sequence.block_table
            assert len(set(table)) == len(table), f"sequence {sequence.id} holds a block twice"
            assert len(table) * self.block_size >= sequence.num_computed, f"sequence {sequence.id} has too few blocks"
            tables.update(table)
        names: Counter[int] = Counter()
        for name, chain in self._pinned.items():
            assert all(node.live for node in chain), f"what {name!r} pins was withdrawn"
            names.update(node.block for node in chain if node.block is not None)
        assert len(names) == self._num_pinned, f"{len(names)} blocks are pinned, {self._num_pinned} counted"
        holders = tables + Counter(self._pins) + names
        assert len(holders) == self.pool.active_blocks, "a referenced block is in no table"
        for block, refs in holders.items():
            assert self.pool.refs(block) == refs, f"block {block}: {self.pool.refs(block)} refs, {refs} holders"
            published = self.prefix is not None and self.prefix.node_of(block) is not None
            # Pins only read: what they hold may be withdrawn meanwhile, its content stays.
            assert tables[block] <= 1 or published, f"block {block} is shared but not published"
            if self.prefix is not None and (node := self.prefix.node_of(block)) is not None:
                assert node.pins == names[block], f"block {block} counts {node.pins} pins of {names[block]}"
        if self.prefix is not None:
            self.prefix.check_integrity()
            cached = sum(self.pool.state(block) is BlockState.CACHED for block in self.prefix.published_blocks())
            assert cached == self.pool.cached_blocks, "a cached block is not published"
            assert len(self.prefix) == cached + sum(b in holders for b in self.prefix.published_blocks()), (
                "a published block is free"
            )

    def _publish_tail(self, sequence: Sequence, chain: _Chain) -> None:
        assert self.prefix is not None
        full = sequence.num_computed // self.block_size
        tokens = sequence.tokens[full * self.block_size : sequence.num_computed]
        if not tokens or chain.closed or len(chain.nodes) != full or not all(node.live for node in chain.nodes[-1:]):
            return
        parent, salt = (chain.nodes[-1] if chain.nodes else None), sequence.spec.salt
        self._drop_tails(parent, tokens, salt)
        self.prefix.publish_tail(sequence.block_table[full], parent, tokens, salt=salt, tick=self._tick)

    def _drop_tails(self, parent: Node | None, tokens: list[int], salt: bytes) -> None:
        assert self.prefix is not None
        for tail in self.prefix.shadowed_tails(parent, tokens, salt):
            if tail.block is not None and self.pool.state(tail.block) is BlockState.CACHED:
                self.pool.reclaim(self.prefix.withdraw(tail))

    def _revived(self, nodes: Iterable[Node]) -> int:
        """How many of the nodes' blocks are counted as obtainable now and will not be once they are held."""
        return sum(n.block is not None and self.pool.state(n.block) is BlockState.CACHED for n in nodes)

    def _hold(self, node: Node) -> int:
        node.last_used = self._tick
        return self._retain(node)

    def _retain(self, node: Node) -> int:
        assert node.block is not None
        assert self.prefix is not None
        self.pool.retain(node.block)
        self.prefix.withhold(node.block)
        return node.block

    def _let_go(self, block: int) -> None:
        published = self.prefix is not None and self.prefix.node_of(block) is not None
        if self.pool.release(block, keep=published) and published:
            assert self.prefix is not None
            self.prefix.offer(block)

    def _take(self, num_blocks: int) -> list[int]:
        if num_blocks > self.obtainable_blocks:
            raise OutOfBlocks(num_blocks, self.obtainable_blocks)
        while self.pool.free_blocks < num_blocks:
            self._evict_one()
        return self.pool.allocate(num_blocks)

    def _evict_one(self) -> None:
        assert self.prefix is not None
        self.pool.reclaim(self.prefix.evict())
