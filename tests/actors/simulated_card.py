"""A card without a driver: other programs, ours, and a way to read it that hangs, vanishes and comes back."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
import trio

from edgekv.actors.service import ModelCard
from edgekv.core.block_pool import BlockPool
from edgekv.core.kv_cache import KVCache
from edgekv.core.ledger import Ledger
from edgekv.core.prefix_cache import PrefixCache
from edgekv.core.reading import Reading
from edgekv.core.scheduler import Limits, Scheduler
from edgekv.core.step import BlockCopy, Sampled, StepPlan
from edgekv.engine.core import EngineCore
from edgekv.engine.driver import Core, Progress
from edgekv.engine.kv_pool import KVPool
from edgekv.engine.sample_row import SampleRow
from edgekv.engine.segments import Segments
from edgekv.engine.settings import KV_LEASE
from edgekv.smi.reader import ReadingFailed, Source
from tests.actors.fakes import make_card

T = TypeVar("T")

MIB, GIB = 1 << 20, 1 << 30
BLOCK_BYTES, BLOCK_SIZE, SEGMENT_BLOCKS = 4 * MIB, 16, 16
SEGMENT_BYTES = BLOCK_BYTES * SEGMENT_BLOCKS
VOCABULARY = 1000


@dataclass
class SimulatedCard:
    """What is on the card. Where it is overfull, what is ours is driven out, as amdgpu does it.

    `hangs_until` is on trio's clock; `stray_bytes` are ours and out of the card whatever room there is, until they are
    given back: of what is, `stray_share` were out of the card.
    """

    total_bytes: int = 16 * GIB
    others_bytes: int = 2 * GIB
    fixed_bytes: int = 2 * GIB
    kv_bytes: int = 0
    stray_bytes: int = 0
    stray_share: float = 1.0
    hangs_until: float = 0.0
    is_gone: bool = False
    num_opens: int = 0
    num_reads: int = 0
    num_open: int = 0
    hung: set[str] = field(default_factory=set)

    @property
    def own_bytes(self) -> int:
        return self.fixed_bytes + self.kv_bytes

    @property
    def spilled_bytes(self) -> int:
        return self.stray_bytes + max(0, self.own_bytes + self.others_bytes - self.total_bytes)

    def source(self, name: str = "simulated") -> Source:
        """A way to read it."""

        def open_reader() -> "CardReader":
            self.check()
            self.num_opens += 1
            self.num_open += 1
            return CardReader(self, name)

        return Source(name, open_reader)

    def check(self) -> None:
        if self.is_gone:
            raise ReadingFailed("the driver has gone")


@dataclass
class CardReader:
    """An open one."""

    card: SimulatedCard
    name: str

    def read(self, at: float) -> Reading:
        card = self.card
        card.check()
        card.num_reads += 1
        spilled = card.spilled_bytes
        return Reading(
            total_bytes=card.total_bytes,
            used_bytes=min(card.total_bytes, card.own_bytes + card.others_bytes),
            own_bytes=card.own_bytes - spilled,
            source=self.name,
            at=at,
            spilled_own_bytes=spilled,
        )

    def close(self) -> None:
        self.card.num_open -= 1


@dataclass
class Line:
    """`OffLoop` on a mock clock: a call hangs while its card does, and whoever comes later waits with it."""

    card: SimulatedCard

    async def __call__(self, call: Callable[[], T]) -> T:
        await trio.sleep_until(max(self.card.hangs_until, trio.current_time()))
        return call()


class CardMemory:
    """The memory of a KV pool, as far as its size goes."""

    def __init__(self, card: SimulatedCard) -> None:
        self.card = card
        self.block_bytes = BLOCK_BYTES
        self.segment_blocks = SEGMENT_BLOCKS
        self.allocated: dict[int, Any] = {}
        self.device = torch.device("cpu")
        self._segments: dict[int, int] = {}

    @property
    def segments(self) -> Mapping[int, int]:
        return dict(sorted(self._segments.items()))

    @property
    def num_bytes(self) -> int:
        return sum(self._segments.values()) * BLOCK_BYTES

    def add_segment(self, num_blocks: int) -> int:
        index = next(i for i in range(len(self._segments) + 1) if i not in self._segments)
        self._segments[index] = num_blocks
        self.card.kv_bytes += num_blocks * BLOCK_BYTES
        return index

    def remove_segment(self, index: int) -> None:
        num_bytes = self._segments.pop(index) * BLOCK_BYTES
        self.card.kv_bytes -= num_bytes
        self.card.stray_bytes = max(0, self.card.stray_bytes - int(self.card.stray_share * num_bytes))

    def copy(self, copies: Iterable[BlockCopy]) -> None:
        pass


@dataclass
class SimulatedEngine:
    """The real engine over a card's memory, with a model that takes no time and says anything.

    `on_step` is called with each plan before it is run.
    """

    card: SimulatedCard
    pool_segments: int = 64
    ceiling_segments: int = 128
    limits: Limits = Limits()  # noqa: RUF009 - frozen
    on_step: Callable[[StepPlan], None] = lambda plan: None
    core: EngineCore = field(init=False)
    segments: Segments = field(init=False)
    ledger: Ledger = field(init=False)

    def make(self, progress: Progress) -> tuple[Core, ModelCard]:
        """A `make_core`; a new life begins with a pool as large as the first."""
        card = self.card
        card.kv_bytes = 0
        self.ledger = Ledger(card.fixed_bytes + self.pool_segments * SEGMENT_BYTES)
        self.ledger.reserve("weights", card.fixed_bytes)
        blocks = BlockPool(block_size=BLOCK_SIZE, segment_blocks=SEGMENT_BLOCKS)
        memory = cast(KVPool, CardMemory(card))
        ceiling_blocks = self.ceiling_segments * SEGMENT_BLOCKS
        self.segments = Segments(blocks, memory, self.ledger, ceiling_blocks=ceiling_blocks)
        for _ in range(self.pool_segments):
            self.segments.add(SEGMENT_BLOCKS, self.ledger.reserve(KV_LEASE, SEGMENT_BYTES))
        scheduler = Scheduler(KVCache(blocks, PrefixCache(BLOCK_SIZE)), self.limits)
        self.core = EngineCore(scheduler, cast(Any, self), cast(Any, self), VOCABULARY, self.segments)
        return self.core, make_card(pool_tokens=blocks.total_blocks * BLOCK_SIZE)

    # ---- the model

    def forward(self, plan: StepPlan) -> torch.Tensor:
        self.on_step(plan)
        return torch.empty(0)

    def sample(self, logits: torch.Tensor, rows: list[SampleRow]) -> list[Sampled]:
        return [Sampled((len(row.tokens) * 31 + row.tokens[0]) % VOCABULARY) for row in rows]
