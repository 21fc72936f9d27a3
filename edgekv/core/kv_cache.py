"""Block tables: gives blocks to sequences, shares cached ones, evicts, publishes, takes back.

Runs in: engine thread; owns: the block pool and the prefix cache, and keeps the two in step.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from edgekv.core.block_pool import BlockPool, BlockState, OutOfBlocks
from edgekv.core.prefix_cache import Match, Node, PrefixCache
from edgekv.core.sequence import Sequence
from edgekv.core.step import BlockCopy


@dataclass(slots=True)
class _Chain:
    """The published nodes of a sequence's leading blocks; `closed` once a hash collision ended its publishing."""

    nodes: list[Node]
    closed: bool = False


class KVCache:
    """The block tables of all running sequences.

    Invariant: a block's reference count is the number of tables that hold it plus the pins of this step's copies.

    Args:
        pool: the blocks.
        prefix: the published ones, or None to reuse nothing.
    """

    def __init__(self, pool: BlockPool, prefix: PrefixCache | None) -> None:
        self.pool = pool
        self.prefix = prefix
        self._chains: dict[int, _Chain] = {}
        self._pins: list[int] = []
        self._tick = 0

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self.pool.block_size

    @property
    def obtainable_blocks(self) -> int:
        """Blocks that an allocation can have: free ones, and cached ones through eviction."""
        return self.pool.free_blocks + self.pool.cached_blocks

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

    def can_grow(self, sequence: Sequence) -> bool:
        """Whether blocks for all of the sequence's tokens can be had."""
        missing = self.blocks_for(len(sequence.tokens)) - len(sequence.block_table)
        return missing <= self.obtainable_blocks

    def grow(self, sequence: Sequence) -> None:
        """Extend the block table to cover all of the sequence's tokens. Raises OutOfBlocks, changing nothing."""
        missing = self.blocks_for(len(sequence.tokens)) - len(sequence.block_table)
        if missing > 0:
            sequence.block_table += self._take(missing)

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
                self._reclaim(self.prefix.withdraw(node))

    def unpin(self) -> None:
        """The step's copies are done: let go of their sources."""
        for block in self._pins:
            self._let_go(block)
        self._pins.clear()

    def vacate(self, segment: int, running: Iterable[Sequence]) -> list[BlockCopy]:
        """Empty a segment, so that it can be removed: evict what is cached in it, move what is held elsewhere.

        Between steps only. The block tables of `running` name the new blocks at once; the copies must be made before
        they are used. Raises OutOfBlocks, having moved nothing, where the other segments cannot take the held blocks.
        """
        assert not self._pins, "a segment is vacated between steps"
        for block in self.pool.held_blocks(segment):
            if self.pool.state(block) is BlockState.CACHED:
                self._withdraw(block)
        held = self.pool.held_blocks(segment)
        while self.pool.free_blocks_beside(segment) < len(held) and self.pool.cached_blocks:
            self._evict_one()
        moves = dict(zip(held, self.pool.allocate(len(held), beside=segment), strict=True))
        for block, to in moves.items():
            self.pool.hand_over(block, to)
            if self.prefix is not None and self.prefix.node_of(block) is not None:
                self.prefix.relocate(block, to)
        for sequence in running:
            sequence.block_table = [moves.get(block, block) for block in sequence.block_table]
        return [BlockCopy(block, to, self.block_size) for block, to in moves.items()]

    def flush(self) -> int:
        """Evict every cached block that nobody holds; returns how many."""
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
        holders = tables + Counter(self._pins)
        assert len(holders) == self.pool.active_blocks, "a referenced block is in no table"
        for block, refs in holders.items():
            assert self.pool.refs(block) == refs, f"block {block}: {self.pool.refs(block)} refs, {refs} holders"
            published = self.prefix is not None and self.prefix.node_of(block) is not None
            # Pins only read: what they hold may be withdrawn meanwhile, its content stays.
            assert tables[block] <= 1 or published, f"block {block} is shared but not published"
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
                self._reclaim(self.prefix.withdraw(tail))

    def _revived(self, nodes: Iterable[Node]) -> int:
        """How many of the nodes' blocks are counted as obtainable now and will not be once they are held."""
        return sum(n.block is not None and self.pool.state(n.block) is BlockState.CACHED for n in nodes)

    def _hold(self, node: Node) -> int:
        assert node.block is not None
        assert self.prefix is not None
        self.pool.retain(node.block)
        self.prefix.withhold(node.block)
        node.last_used = self._tick
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

    def _withdraw(self, block: int) -> None:
        assert self.prefix is not None
        node = self.prefix.node_of(block)
        assert node is not None
        self._reclaim(self.prefix.withdraw(node))

    def _evict_one(self) -> None:
        assert self.prefix is not None
        self._reclaim(self.prefix.evict())

    def _reclaim(self, blocks: list[int]) -> None:
        """Free the withdrawn blocks that nobody holds; held ones become free when their holders let go."""
        for block in blocks:
            if self.pool.state(block) is BlockState.CACHED:
                self.pool.reclaim(block)
