"""What a draft model has computed of the sequences that it guesses for: views of them, and the blocks of these.

Runs in: engine thread; owns: the draft's view of each sequence, with the blocks of its keys and values.

A view shares its sequence's list of tokens, and says how many of them are computed. What was guessed lies behind these
until the sequence has said more; as far as that is what was guessed, it is computed then, and no sooner:

    tokens      t0 ................ t9 | g10 g11 g12      g: guessed, of which all but the last are computed
    said next                          | t10 t11          t10 is g10, t11 is not g11: computed up to t10

A view is dropped where others need its blocks; then its sequence is read again when that is worth it.
"""

from collections.abc import Collection, Iterable
from collections.abc import Sequence as Listing
from dataclasses import dataclass, field, replace

from edgekv.core.kv_cache import KVCache
from edgekv.core.prefix_cache import Match
from edgekv.core.roster import Vacated
from edgekv.core.sequence import Sequence, Stage
from edgekv.core.step import BlockCopy


@dataclass(slots=True, eq=False)
class View:
    """The draft's `own` sequence of the same tokens.

    `most` tokens are guessed for it now, for which it has blocks. When the sequence had `known` tokens these were all
    computed, and `guess` was made behind them; `chance` is how likely the draft holds all of it.
    """

    target: Sequence
    own: Sequence
    most: int = 0
    known: int = 0
    guess: tuple[int, ...] = ()
    chance: float = 1.0

    @property
    def lag(self) -> int:
        """Tokens of the sequence that are not computed, at least 1: of the last one the logits are wanted."""
        return len(self.target.tokens) - self.own.num_computed


@dataclass(slots=True, eq=False)
class _Known:
    """What is known of a sequence, with a view or without.

    `cached`: tokens of it that were cached when that was last looked at; None where it has to be looked at. No view is
    tried for it before it has `not_before` tokens, nor ever where it is `hopeless`; the first `checked` of its tokens
    are the draft's, too.
    """

    target: Sequence
    keys: list[bytes] = field(default_factory=list)
    cached: int | None = None
    not_before: int = 0
    checked: int = 0
    hopeless: bool = False


class DraftViews:
    """Views of sequences by their ids, in a cache of their own.

    Invariant: nothing guessed is published, and every table's blocks are computed as far as its view says.

    Args:
        cache: the draft's block tables, of whose pool nothing has to stay.
        vocab_size: tokens that the draft knows; None where it knows all of the target's.
        context_tokens: positions that it knows.
    """

    floor_blocks = 0
    """See `segments.BlockHolder`."""

    def __init__(self, cache: KVCache, *, vocab_size: int | None, context_tokens: int) -> None:
        self.cache = cache
        self._vocab_size, self._context_tokens = vocab_size, context_tokens
        self._views: dict[int, View] = {}  # the least recently used first
        self._known: dict[int, _Known] = {}
        self._copies: list[BlockCopy] = []
        self._arrivals = 0

    def serves(self, sequence: Sequence) -> bool:
        """Whether the draft can follow a sequence: all its tokens are the draft's, and so is its length."""
        known = self._get(sequence)
        if not known.hopeless:
            fresh = () if self._vocab_size is None else sequence.tokens[known.checked :]
            known.checked = len(sequence.tokens)
            too_long = len(sequence.tokens) >= self._context_tokens
            known.hopeless = too_long or (self._vocab_size is not None and max(fresh, default=0) >= self._vocab_size)
            if known.hopeless:
                self._drop(sequence.id)
        return not known.hopeless

    def unread(self, sequence: Sequence) -> int:
        """Tokens of a sequence that are to be computed."""
        known = self._get(sequence)
        view = self._views.get(sequence.id)
        if view is not None:
            if len(sequence.tokens) > view.known:
                _settle(view, self.cache)
            return view.lag
        if known.cached is None:
            known.cached = self.cache.match(self._own(known)).cached_tokens(self.cache.block_size)
        return len(sequence.tokens) - known.cached

    def open(self, sequence: Sequence, most: int, busy: Collection[int]) -> View | None:
        """The view of a sequence with blocks for all its tokens and a guess of up to `most`; None where it has no room.

        For its sake views that are not `busy` are dropped, if that is of any use.
        """
        known = self._get(sequence)
        if not self.serves(sequence) or len(sequence.tokens) < known.not_before:
            return None
        most = min(most, self._context_tokens - len(sequence.tokens))
        view = self._views.pop(sequence.id, None)
        if view is not None:
            self._views[sequence.id] = view
            _settle(view, self.cache)
            has_room = self._make_room(view.own, len(sequence.tokens) + most, busy)
        else:
            view = self._take_in(known, len(sequence.tokens) + most, busy)
            has_room = view is not None
        if view is None or not has_room:
            # To find that out takes long where a context is.
            known.not_before = len(sequence.tokens) + self.cache.block_size
            return None
        self.cache.grow(view.own, len(sequence.tokens) + most)
        view.most = most
        return view

    def take_copies(self) -> tuple[BlockCopy, ...]:
        """What the next step has to copy before anything else, for the views that were opened since the last."""
        copies, self._copies = tuple(self._copies), []
        return copies

    def copied(self) -> None:
        """That step is done."""
        self.cache.unpin()

    def has_read(self, own: Sequence, num_tokens: int) -> None:
        """So many of its tokens are computed."""
        own.num_computed = num_tokens
        self.cache.publish(own)

    def distrust(self, view: View) -> None:
        """What the view has computed may be worth nothing: nobody shares it, and there will be no other."""
        self._get(view.target).hopeless = True
        self.cache.distrust(view.own)
        self._drop(view.target.id)

    def forget(self, sequence_id: int) -> None:
        """The sequence has ended; what was computed of it stays cached."""
        self._drop(sequence_id)
        self._known.pop(sequence_id, None)

    def clear(self) -> None:
        """Forget everything that was computed."""
        self.cache.unpin()
        self._copies.clear()
        for view in self._views.values():
            self.cache.release(view.own)
        self._views.clear()
        self.cache.flush()
        for known in self._known.values():
            known.cached, known.not_before = None, 0

    def vacate(self, num_blocks: int, *, keep_promises: bool, first: Listing[int] = ()) -> Vacated:
        """Empty the segments that cost least, of `num_blocks` or a little more; between steps only.

        Views are dropped while what is left cannot take their blocks, the least recently used first. Nothing was ever
        promised.
        """
        pool, chosen, removed = self.cache.pool, list[int](), 0
        sizes = pool.segments
        for index in sorted(pool.emptiest_segments(), key=lambda index: index not in first):
            if removed < num_blocks:
                chosen.append(index)
                removed += sizes[index]
        while pool.active_blocks > pool.total_blocks - removed:
            self._drop(next(iter(self._views)))
        copies = self.cache.vacate(chosen, [view.own for view in self._views.values()])
        for known in self._known.values():
            known.cached, known.not_before = None, 0
        return Vacated(tuple(chosen), tuple(copies))

    def check_integrity(self) -> None:
        """Raise AssertionError where a table, a count or a published block is wrong; between steps."""
        self.cache.check_integrity([view.own for view in self._views.values()])
        assert not self._copies, "a copy was never made"
        for number, view in self._views.items():
            assert self._known[number].target is view.target, f"the view of sequence {number} is another's"
            assert view.own.tokens is view.target.tokens, f"the view of sequence {number} has other tokens"
            assert view.lag >= 1, f"the view of sequence {number} has nothing left to compute"

    def _get(self, sequence: Sequence) -> _Known:
        known = self._known.get(sequence.id)
        if known is None or known.target is not sequence:
            self.forget(sequence.id)  # another one that had the same id
            known = self._known[sequence.id] = _Known(sequence)
        return known

    def _own(self, known: _Known) -> Sequence:
        self._arrivals += 1
        target = known.target
        return Sequence(target.spec, self._arrivals, target.tokens, Stage.RUNNING, block_keys=known.keys)

    def _take_in(self, known: _Known, num_tokens: int, busy: Collection[int]) -> View | None:
        own = self._own(known)
        while (match := self._fitting(own, num_tokens)) is None:
            match = self.cache.match(own)
            shared = {node.block for node in match.nodes if node.block is not None}
            missing = self.cache.blocks_for(num_tokens) - len(match.nodes)
            if missing > self._within_reach(shared, busy) or not self._drop_one(busy):
                return None
        self._copies += self.cache.admit(own, match)
        view = self._views[own.id] = View(known.target, own)
        return view

    def _fitting(self, own: Sequence, num_tokens: int) -> Match | None:
        """The cached prefix with which there are blocks for so many tokens now."""
        match = self.cache.match(own)
        reserve = self.cache.blocks_for(num_tokens) - self.cache.blocks_for(len(own.tokens))
        # A block that is copied from takes a place of its own until that is done.
        if match.partial is not None and not self.cache.can_admit(own, match, reserve + 1):
            match = replace(match, partial=None, partial_tokens=0)
        return match if self.cache.can_admit(own, match, reserve) else None

    def _make_room(self, own: Sequence, num_tokens: int, busy: Collection[int]) -> bool:
        missing = self.cache.missing_blocks(own, num_tokens)
        if missing <= self.cache.obtainable_blocks:
            return True
        if missing > self._within_reach(own.block_table, busy):
            return False
        while missing > self.cache.obtainable_blocks:
            if not self._drop_one(busy):
                return False
        return True

    def _within_reach(self, held: Iterable[int], busy: Collection[int]) -> int:
        """Blocks that can be had beside those `held`, if all views go that are not busy."""
        tables = (view.own.block_table for number, view in self._views.items() if number in busy)
        return self.cache.pool.total_blocks - len(set(held).union(*tables))

    def _drop_one(self, busy: Collection[int]) -> bool:
        """Let go of the view that was not used for longest, of those that nothing is asked for now."""
        idle = next((number for number in self._views if number not in busy), None)
        if idle is not None:
            self._drop(idle)
        return idle is not None

    def _drop(self, sequence_id: int) -> None:
        view = self._views.pop(sequence_id, None)
        if view is not None:
            _settle(view, self.cache)
            self.cache.release(view.own)
            self._known[sequence_id].cached = None


def _settle(view: View, cache: KVCache) -> None:
    """What the sequence has said since the guess was made: as far as that was right, it is computed."""
    if view.known == 0:
        return
    said = view.target.tokens[view.known : view.known + max(0, len(view.guess) - 1)]
    right = next((at for at, (a, b) in enumerate(zip(said, view.guess, strict=False)) if a != b), len(said))
    # Where nothing was said since, or less than was guessed, the logits of its last token are wanted once more.
    view.own.num_computed = min(view.known + right, len(view.target.tokens) - 1)
    view.known, view.guess = 0, ()
    cache.publish(view.own)
