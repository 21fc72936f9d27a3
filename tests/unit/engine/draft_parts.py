"""A target's pool and a draft model's memory on one ledger, as numbers: nothing is allocated and nothing computed."""

from collections.abc import Iterable
from typing import Any, cast

from edgekv.core.block_pool import BlockPool
from edgekv.core.draft_plan import DRAFT_KV_LEASE, WEIGHTS_LEASE, WORKSPACE_LEASE, DraftPlan
from edgekv.core.kv_cache import KVCache
from edgekv.core.kv_format import KVPlan
from edgekv.core.ledger import Ledger
from edgekv.core.model_shape import WeightBytes
from edgekv.core.prefix_cache import PrefixCache
from edgekv.core.scheduler import Limits, Scheduler
from edgekv.core.step import BlockCopy, StepPlan
from edgekv.engine.draft import DraftModel
from edgekv.engine.draft_memory import DraftMemory, LoadedDraft
from edgekv.engine.protocols import Pending
from edgekv.engine.sample_row import SampleRow
from edgekv.engine.segments import Segments
from edgekv.engine.shared_memory import SharedMemory

MIB = 1 << 20
TARGET_WEIGHTS = 100 * MIB
TARGET_SEGMENT = 32 * MIB  # of 4 blocks
DRAFT_BLOCK = 4 * MIB
DRAFT_SEGMENT = 2 * DRAFT_BLOCK
DRAFT_WEIGHTS, DRAFT_WORKSPACE = 50 * MIB, 6 * MIB
DRAFT_FIXED = DRAFT_WEIGHTS + DRAFT_WORKSPACE
DRAFT_BLOCKS = 5  # two segments and a half
DRAFT_KV = DRAFT_BLOCKS * DRAFT_BLOCK
DRAFT_ALL = DRAFT_FIXED + DRAFT_KV
PLANNED_SEGMENTS, CEILING_SEGMENTS = 3, 5


class PaperMemory:
    """What `Segments` must know of a `BlockMemory`."""

    device, allocated = None, cast(dict[int, Any], {})

    def __init__(self, block_bytes: int, segment_blocks: int) -> None:
        self.block_bytes, self.segment_blocks = block_bytes, segment_blocks
        self.segments: dict[int, int] = {}
        self.most_segments = 100

    @property
    def num_bytes(self) -> int:
        return sum(self.segments.values()) * self.block_bytes

    def add_segment(self, num_blocks: int) -> int:
        if len(self.segments) >= self.most_segments:
            raise MemoryError("the card is full")
        index = next(i for i in range(len(self.segments) + 1) if i not in self.segments)
        self.segments[index] = num_blocks
        return index

    def remove_segment(self, index: int) -> None:
        del self.segments[index]

    def copy(self, copies: Iterable[BlockCopy]) -> None:
        """There is nothing to copy."""


class NoPipeline:
    """Is never given a step."""

    def begin(self, plan: StepPlan, rows: list[SampleRow], after: Pending | None) -> Pending:
        raise AssertionError("a step")


class Parts:
    """Both as planned: the draft with 56 MiB of weights and workspace and 20 of keys and values, the target with 96."""

    def __init__(self, *, prefix: bool = True, budget_bytes: int = 1000 * MIB) -> None:
        self.ledger = Ledger(budget_bytes)
        self.ledger.reserve("weights", TARGET_WEIGHTS)
        self.target_memory = PaperMemory(TARGET_SEGMENT // 4, 4)
        blocks = BlockPool(block_size=16, segment_blocks=4)
        self.target = Segments(blocks, cast(Any, self.target_memory), self.ledger, ceiling_blocks=CEILING_SEGMENTS * 4)
        for _ in range(PLANNED_SEGMENTS):
            self.target.add(4, self.ledger.reserve("kv.target", TARGET_SEGMENT))
        self.scheduler = Scheduler(KVCache(blocks, None), Limits())
        kv = KVPlan(
            bytes_per_token=DRAFT_BLOCK // 16,
            block_size=16,
            block_bytes=DRAFT_BLOCK,
            segment_blocks=2,
            num_blocks=DRAFT_BLOCKS,
        )
        weights = WeightBytes(DRAFT_WEIGHTS, DRAFT_WEIGHTS, {})
        self.plan = DraftPlan(weights, kv, "float16", "float16", DRAFT_WORKSPACE)
        draft_blocks = BlockPool(block_size=16, segment_blocks=2)
        self.model = DraftModel(
            KVCache(draft_blocks, PrefixCache(16) if prefix else None),
            vocab_size=10,
            target_vocab=10,
            context_tokens=1000,
            max_step_tokens=64,
        )
        self.loads = 0
        self.fault: Exception | None = None
        self.draft = DraftMemory(self.model, self.plan, self.ledger, self.load)
        leases = [self.ledger.reserve(WEIGHTS_LEASE, DRAFT_WEIGHTS)]
        leases.append(self.ledger.reserve(WORKSPACE_LEASE, DRAFT_WORKSPACE))
        pool = [self.ledger.reserve(DRAFT_KV_LEASE, size * DRAFT_BLOCK) for size in kv.segments]
        self.draft.adopt(self.load(), *leases, pool)
        self.loads = 0
        self.shared = SharedMemory(self.target, self.draft, PLANNED_SEGMENTS * TARGET_SEGMENT)

    def load(self) -> LoadedDraft:
        self.loads += 1
        if self.fault is not None:
            raise self.fault
        self.memory = PaperMemory(DRAFT_BLOCK, 2)
        return LoadedDraft(NoPipeline(), cast(Any, self.memory))

    def leases(self) -> tuple[int, int, int, int]:
        """MiB of the target's pool, and of the draft's weights, workspace and pool."""
        self.shared.check_integrity()
        named = self.ledger.statement()
        assert named.pop("weights") == TARGET_WEIGHTS
        found = [named.pop(name, 0) for name in ("kv.target", WEIGHTS_LEASE, WORKSPACE_LEASE, DRAFT_KV_LEASE)]
        assert not named
        assert sum(found) == self.shared.num_bytes
        return cast(tuple[int, int, int, int], tuple(num_bytes // MIB for num_bytes in found))

    def shrink(self, mib: int) -> int:
        """Below every promise; MiB given back."""
        return self.shared.shrink(self.scheduler, mib * MIB, keep_promises=False) // MIB

    def grow(self, mib: int) -> int:
        """MiB taken."""
        return self.shared.grow(mib * MIB).num_bytes // MIB
