"""The state machine of `speculating_machine` with a draft model that has a pool and leases of its own."""

import random
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from edgekv.core.block_pool import BlockPool
from edgekv.core.draft_plan import DRAFT_KV_LEASE, WEIGHTS_LEASE, WORKSPACE_LEASE, DraftPlan
from edgekv.core.kv_cache import KVCache
from edgekv.core.kv_format import KVPlan
from edgekv.core.model_shape import WeightBytes
from edgekv.core.prefix_cache import PrefixCache
from edgekv.core.prefix_tree import Node
from edgekv.core.scheduler import Limits
from edgekv.core.sequence import SequenceSpec
from edgekv.core.speculation import Controller
from edgekv.core.step import Resize
from edgekv.engine.core import EngineCore
from edgekv.engine.draft import MOST_REST_S, REST_S, DraftModel
from edgekv.engine.draft_memory import DraftMemory, LoadedDraft
from edgekv.engine.kv_pool import PoolShape
from edgekv.engine.settings import KV_LEASE
from edgekv.engine.shared_memory import SharedMemory
from edgekv.errors import ModelError
from tests.property.elastic_machine import BLOCK_SIZE, SEGMENT_BLOCKS, SEGMENT_BYTES, WEIGHT_BYTES, ScarceMemory
from tests.property.pipelined_machine import requests
from tests.property.simulated_draft import DraftDevice
from tests.property.speculating_machine import SpeculatingMachine

TARGET_VOCAB = 4
# Every rule ends with some steps, so that what comes next finds guesses and views.
some = st.sampled_from([2, 1, 0, 4])
pieces = st.sampled_from([0, 1, 1, 2, 3, 6, 12, 40])  # a few: segments of the draft; many: nearly everything
seldom = st.sampled_from([False] * 7 + [True])
DRAFT_SEGMENT_BLOCKS, DRAFT_BLOCK_BYTES = 2, BLOCK_SIZE * 2 * 2
DRAFT_WEIGHT_BYTES, DRAFT_WORKSPACE_BYTES = 48, 16
DRAFT_FIXED_BYTES = DRAFT_WEIGHT_BYTES + DRAFT_WORKSPACE_BYTES


@dataclass(frozen=True)
class DraftShape:
    blocks: int
    right: float
    prefix: bool
    overlaps: bool
    vocab_size: int
    context_tokens: int
    max_step_tokens: int
    moods: int


ordinary = st.builds(
    DraftShape,
    blocks=st.sampled_from([40, 13, 24]),
    right=st.sampled_from([0.8, 0.9, 0.6]),
    prefix=st.just(True),
    overlaps=st.booleans(),
    vocab_size=st.just(5),
    context_tokens=st.just(1000),
    max_step_tokens=st.just(40),
    moods=st.integers(0, 9),
)
odd = st.builds(
    DraftShape,
    blocks=st.sampled_from([1, 7, 13, 40]),
    right=st.sampled_from([0.0, 1.0, 0.7]),
    prefix=st.booleans(),
    overlaps=st.booleans(),
    vocab_size=st.sampled_from([2, 4, 5]),
    context_tokens=st.sampled_from([16, 1000]),
    max_step_tokens=st.sampled_from([1, 3, 8, 40]),
    moods=st.integers(0, 9),
)


class Moody(Controller):
    """Asks for any number of tokens for any of the sequences."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        self._chance = chance

    @property
    def is_on(self) -> bool:
        return True

    def choose(
        self, most: Mapping[int, int], unread: Mapping[int, int] | None = None, said: Mapping[int, int] | None = None
    ) -> dict[int, int]:
        return {number: min(left, self._chance.choice([0, 0, 1, 2, 4, 8])) for number, left in most.items()}

    def is_in_debt(self, decodes: int) -> bool:
        """Never: what steps take here is not the same from one run to the next."""
        return False


class DraftMachine(SpeculatingMachine):
    """Requests, orders and faults, while a draft model guesses, runs short, and gives its memory back first."""

    model_class: type[DraftModel] = DraftModel
    memory_class: type[DraftMemory] = DraftMemory
    shared_class: type[SharedMemory] = SharedMemory
    read_tokens = copies = yields = returns = dropped = rests = reloads_failed = 0

    @initialize(
        segments=st.integers(2, 6),
        more=st.integers(0, 6),
        limits=st.builds(Limits, st.integers(1, 6), st.integers(1, 40), st.integers(1, 24)),
        prefix=st.booleans(),
        shape=ordinary | ordinary | ordinary | odd,
        first=st.lists(requests, min_size=2, max_size=5),
    )
    def build(  # type: ignore[override]
        self,
        segments: int,
        more: int,
        limits: Limits,
        prefix: bool,
        shape: DraftShape,
        first: list[SequenceSpec],
    ) -> None:
        """Two pools: the draft's has other blocks and other segments than the target's."""
        super().build(segments, more, limits, prefix, 0.0, [])
        self.shape, self.now_s, self.are_files_gone = shape, 0.0, False
        kv = KVPlan(
            bytes_per_token=DRAFT_BLOCK_BYTES // BLOCK_SIZE,
            block_size=BLOCK_SIZE,
            block_bytes=DRAFT_BLOCK_BYTES,
            segment_blocks=DRAFT_SEGMENT_BLOCKS,
            num_blocks=shape.blocks,
        )
        weights = WeightBytes(DRAFT_WEIGHT_BYTES, DRAFT_WEIGHT_BYTES, {})
        self.plan = DraftPlan(weights, kv, "float16", "float16", DRAFT_WORKSPACE_BYTES)
        blocks = BlockPool(block_size=BLOCK_SIZE, segment_blocks=DRAFT_SEGMENT_BLOCKS)
        cache = KVCache(blocks, PrefixCache(BLOCK_SIZE) if shape.prefix else None)
        self.draft = self.model_class(
            cache,
            vocab_size=shape.vocab_size,
            target_vocab=TARGET_VOCAB,
            context_tokens=shape.context_tokens,
            max_step_tokens=shape.max_step_tokens,
            overlaps=shape.overlaps,
            clock=lambda: self.now_s,
        )
        self.draft_device = DraftDevice(
            cache,
            right=shape.right,
            overlaps=shape.overlaps,
            vocab_size=shape.vocab_size,
            # One token of each that runs; this is what buffers are planned for.
            most_tokens=max(shape.max_step_tokens, limits.max_sequences),
        )
        forget = self.draft.forget
        vars(self.draft).update(
            observe=self.observe, forget=lambda number: (self.forgotten.add(number), forget(number))
        )
        self.draft_memory = self.memory_class(self.draft, self.plan, self.ledger, self._load)
        leases = [self.ledger.reserve(WEIGHTS_LEASE, DRAFT_WEIGHT_BYTES)]
        leases.append(self.ledger.reserve(WORKSPACE_LEASE, DRAFT_WORKSPACE_BYTES))
        pool = [self.ledger.reserve(DRAFT_KV_LEASE, size * DRAFT_BLOCK_BYTES) for size in kv.segments]
        self.draft_memory.adopt(self._load(), *leases, pool)
        self.shared = self.shared_class(self.segments, self.draft_memory, segments * SEGMENT_BYTES)
        self.core = EngineCore(
            self.scheduler,
            self,
            self,
            vocab_size=TARGET_VOCAB,
            pool=self.shared,
            proposer=self.draft,
            controller=Moody(random.Random(shape.moods)),
        )
        for spec in first:
            self._submit(spec)

    def _load(self) -> LoadedDraft:
        if self.are_files_gone:
            raise ModelError("model.safetensors: no such file")
        if self.device.most_segments == 0:
            raise torch.OutOfMemoryError("the card is full")
        shape, cpu = PoolShape(1, 1, 1), torch.device("cpu")
        pool = ScarceMemory(
            shape,
            dtype=torch.float16,
            device=cpu,
            block_size=BLOCK_SIZE,
            segment_blocks=DRAFT_SEGMENT_BLOCKS,
            commit=False,
        )
        pool.most_segments = self.device.most_segments
        pool.forget = self.draft_device.memory.forget_segment
        vars(pool).update(copy=lambda copies: self.draft_device.memory.copy_all(list(copies)))
        self.draft_pool = pool
        return LoadedDraft(self.draft_device, pool)

    # ---- what happens

    @rule(specs=st.lists(requests, min_size=1, max_size=4), then=some)
    def submit(self, specs: list[SequenceSpec], then: int) -> None:  # type: ignore[override]
        for spec in specs:
            self._submit(spec)
        self.step(then)

    @rule(pieces=pieces, odd=st.integers(0, SEGMENT_BYTES), hold=seldom, then=some)
    def shrink(self, pieces: int, odd: int, hold: bool, then: int) -> None:  # type: ignore[override]
        before, target_before = self.shared.num_bytes, self.segments.num_bytes
        asked = pieces * 2 * DRAFT_BLOCK_BYTES + odd
        self.order(shrink_bytes=asked, hold=hold)
        assert before - self.shared.num_bytes >= min(asked, before), "nothing is pinned, so all can be had"
        assert self.segments.num_bytes == target_before or self.draft_memory.num_bytes == 0, "the draft's goes first"
        self.step(then)

    @rule(pieces=pieces, budget=st.integers(4, 12) | st.none(), hold=seldom, then=some)
    def grow(self, pieces: int, budget: int | None, hold: bool, then: int) -> None:  # type: ignore[override]
        before, asked = self.shared.num_bytes, pieces * 2 * DRAFT_BLOCK_BYTES
        budget_bytes = WEIGHT_BYTES + (100 if budget is None else budget) * SEGMENT_BYTES
        had_none = self.draft.pipeline is None
        self.order(budget_bytes=budget_bytes, grow_bytes=asked, hold=hold)
        grown = self.shared.num_bytes - before
        assert 0 <= grown <= asked
        assert grown == 0 or self.ledger.leased_bytes <= budget_bytes
        has_none = self.draft.pipeline is None and self.draft_memory.shortfall is not None
        type(self).reloads_failed += had_none and has_none
        self.step(then)

    @precondition(lambda self: self.draft.views._views)
    @rule(share=st.sampled_from([2, 4, 1]), then=some)
    def shrink_to_little_more_than_views_have(self, share: int, then: int) -> None:
        """So that they are moved, or some of them dropped."""
        pool = self.draft.cache.pool
        spare_blocks = pool.total_blocks - pool.active_blocks
        self.order(shrink_bytes=(spare_blocks + pool.active_blocks // share - 1) * DRAFT_BLOCK_BYTES)
        self.step(then)

    @rule(then=some)
    def grow_by_what_comes_next(self, then: int) -> None:
        """As the memory guard does where requests run."""
        facts = self.shared.memory(self.scheduler, num_resizes=0, held=False).facts
        waits = self.draft_memory._orders_to_skip > 0  # a step found too little memory, or weights did
        grows = facts.kv_bytes < facts.ceiling_bytes and self.device.most_segments == 100 and not self.are_files_gone
        self.order(budget_bytes=WEIGHT_BYTES + 100 * SEGMENT_BYTES, grow_bytes=facts.segment_bytes)
        tried = waits or self.draft_memory.shortfall is not None
        # The last of all may be less than a segment of the target's, and is waited for until there is room for one.
        assert not grows or tried or self.shared.num_bytes > facts.kv_bytes
        self.step(then)

    @rule(segments=st.sampled_from([0, 1, 8, 100, 100, 100, 100]), then=some)
    def others_fill_the_device(self, segments: int, then: int) -> None:  # type: ignore[override]
        self.device.most_segments = self.draft_pool.most_segments = segments
        self.step(then)

    @rule(steps=st.integers(0, 12), late=st.booleans(), rows=st.integers(0, 12), then=some)
    def the_draft_fails(self, steps: int, late: bool, rows: int, then: int) -> None:
        """It runs short of memory, or comes to nothing for a sequence, whichever is first."""
        self.draft_device.fails_in, self.draft_device.fails_late = steps, late
        self.draft_device.spoils_in = rows
        self.step(then)

    @rule(hold=seldom, budget=st.integers(0, 12), then=some)
    def change_nothing_but_the_budget(self, hold: bool, budget: int, then: int) -> None:  # type: ignore[override]
        self.order(budget_bytes=budget * SEGMENT_BYTES, hold=hold)
        self.step(then)

    @rule(dice=st.integers(0, 39), which=st.integers(0, 30))
    def something_rare(self, dice: int, which: int) -> None:
        if dice == 0:
            self.are_files_gone = True
        elif dice < 5:
            self.spoilt.setdefault(which, max(3, len(self.outputs.get(which, []))))
        elif dice < 10 and self.core.busy:
            self.fails = True
            self._step()
            self.fails = False
        else:
            self.step(6)

    # Rules above and below take their places: they are here for what they do to a draft, and not too often.
    spoil = step_without_memory = None  # type: ignore[assignment]

    def step(self, times: int) -> None:  # type: ignore[override]
        for _ in range(times):
            if self.core.busy:
                self._step()

    @rule(times=st.integers(1, 12))
    def go_on(self, times: int) -> None:
        self.step(times)

    def _step(self) -> None:
        self.now_s += REST_S / 4
        views = len(self.draft.views._views)
        short = self.draft_device.fails_in
        super()._step()
        type(self).dropped += len(self.draft.views._views) < views
        type(self).rests += short is not None and self.draft_device.fails_in is None
        assert not self.draft_device.unread, "a step that nobody has waited for"

    # ---- what holds

    @invariant()
    def invariants_hold(self) -> None:
        type(self).operations += 1
        if not hasattr(self, "shared"):
            return
        self.scheduler.check_integrity()
        self.shared.check_integrity()
        for sequence in self.scheduler.running:
            self.memory.check(sequence, sequence.num_computed)
        assert all(times == 1 for times in self.ended.values()), "a sequence ended twice"
        self._leases_hold()
        device = self.draft_device
        device.memory.forget_free_blocks()
        views = self.draft.views._views
        for view in views.values():
            device.memory.check(view.own, view.own.num_computed)
            assert view.known <= len(view.target.tokens)
        assert not views or self.draft.has_memory
        prefix = self.draft.cache.prefix
        for block in () if prefix is None else prefix.published_blocks():
            node = prefix.node_of(block)
            assert node is not None
            _check_published(node, device)

    def _leases_hold(self) -> None:
        stats = self.core.stats().memory
        assert stats is not None
        leases, target, draft = stats.leases, self.cache.pool, self.draft.cache.pool
        blocks_bytes = target.total_blocks * SEGMENT_BYTES // SEGMENT_BLOCKS
        assert leases.get(KV_LEASE, 0) == blocks_bytes == self.device.num_bytes <= self.segments.ceiling_bytes
        kv_bytes = leases.get(DRAFT_KV_LEASE, 0)
        assert kv_bytes == draft.total_blocks * DRAFT_BLOCK_BYTES
        assert kv_bytes == (self.draft_pool.num_bytes if self.draft.pipeline is not None else 0)
        assert draft.total_blocks <= self.plan.kv.num_blocks, "the draft has more than was planned for it"
        fixed = leases.get(WEIGHTS_LEASE, 0), leases.get(WORKSPACE_LEASE, 0)
        assert fixed == ((DRAFT_WEIGHT_BYTES, DRAFT_WORKSPACE_BYTES) if self.draft.pipeline is not None else (0, 0))
        assert sum(leases.values()) == WEIGHT_BYTES + self.shared.num_bytes <= stats.budget_bytes
        assert stats.facts.kv_bytes == self.shared.num_bytes <= stats.facts.ceiling_bytes
        given = stats.facts.taken_bytes - stats.facts.given_back_bytes
        assert given == self.shared.num_bytes - self.first_bytes, "what comes and goes is miscounted"

    @property
    def first_bytes(self) -> int:
        return self.least_tokens // BLOCK_SIZE // SEGMENT_BLOCKS * SEGMENT_BYTES + self.plan.num_bytes

    def teardown(self) -> None:
        """Memory comes back, and with it everybody's turn."""
        if not hasattr(self, "shared"):
            return
        self.device.most_segments = self.draft_pool.most_segments = 100
        orders = 0
        while orders == 0 or self.shared.num_bytes < self.segments.ceiling_bytes + self.draft_memory.ceiling_bytes:
            orders += 1
            assert orders < 100, "memory does not come back"
            self.order(budget_bytes=WEIGHT_BYTES + 100 * SEGMENT_BYTES, grow_bytes=100 * SEGMENT_BYTES)
        assert self.segments.num_bytes == self.segments.ceiling_bytes
        assert self.draft_memory.num_bytes == self.draft_memory.ceiling_bytes
        self.now_s += MOST_REST_S
        steps = 0
        while self.core.busy:
            self._step()
            steps += 1
            assert steps < 3000, "no progress"
        self.invariants_hold()
        assert set(self.ended) == set(self.wanted), "a sequence was lost"
        assert not self.draft.views._views, "a view outlives its sequence"
        assert not self.draft.views._known, "a sequence that has ended is still known"
        for cache in (self.cache, self.draft.cache):
            cache.flush()
            assert cache.pool.free_blocks == cache.pool.total_blocks, "a block leaked"
        self.core.resize(Resize(0, shrink_bytes=100 * SEGMENT_BYTES))
        assert self.ledger.statement() == {"weights": WEIGHT_BYTES}, "a lease leaked"
        type(self).read_tokens += self.draft_device.read_tokens
        type(self).copies += self.draft_device.copies
        type(self).yields += self.draft.yields
        type(self).returns += self.draft.returns


def _check_published(node: Node, device: DraftDevice) -> None:
    """The block holds the context that it is published for, and nothing behind it was written since."""
    context = tuple(token for above in node.path() for token in above.tokens)
    first = len(context) - len(node.tokens)
    for slot in range(len(node.tokens)):
        held = device.memory.slots.get((node.block, slot))  # type: ignore[arg-type]
        assert held is not None, f"block {node.block} is published and empty"
        assert held[1] == context[: first + slot + 1], f"block {node.block} is published for another context"
