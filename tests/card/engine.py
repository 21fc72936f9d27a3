"""The engine of a card over a real model folder, on fibers of the host, with freed blocks poisoned between steps."""

from collections.abc import Callable
from pathlib import Path

import torch

from edgekv.core.block_pool import BlockPool, BlockState
from edgekv.core.dtype_choice import DtypeName
from edgekv.core.kv_cache import KVCache
from edgekv.core.kv_format import KVFormatName
from edgekv.core.ledger import Ledger
from edgekv.core.prefix_cache import PrefixCache
from edgekv.core.sampling import SamplingParams
from edgekv.core.scheduler import Limits, Scheduler
from edgekv.core.sequence import FinishReason, SequenceSpec
from edgekv.core.step import Resize, Sampled
from edgekv.engine.card_buffers import StepBuffers
from edgekv.engine.card_model import CardModel
from edgekv.engine.card_pool import CardKVPool
from edgekv.engine.card_runner import CardRunner
from edgekv.engine.core import EngineCore
from edgekv.engine.proposer import Proposer
from edgekv.engine.sampler import Sampler
from edgekv.engine.segments import Segments
from edgekv.model.card_matrices import load_on_card
from edgekv.model.card_memory import MOST_SEGMENTS, CardLimits
from edgekv.model.hf_config import read_spec
from edgekv.model.matrix_layout import WeightForm, WeightsName
from tests.card.host_card import HostCard


def card_model(
    folder: Path, card: HostCard, *, dtype: DtypeName = "float32", weights: WeightsName = "auto"
) -> CardModel:
    form = WeightForm(dtype if weights == "auto" else None, weights)
    lowered = load_on_card(folder, read_spec(folder), form=form, dtype=dtype, allocate=card.allocate)
    return CardModel(lowered, dtype, card.allocate)


class CardHarness:
    """A pool of `blocks` in segments of at most `segment_blocks`, and whatever was submitted to it."""

    def __init__(
        self,
        model: CardModel,
        card: HostCard,
        *,
        blocks: int = 64,
        segment_blocks: int = 16,
        block_size: int = 16,
        limits: Limits | None = None,
        kv_format: KVFormatName = "float32",
        context_blocks: int = 16,
        graphs: bool = True,
        prefix: bool = True,
        proposer: Proposer | None = None,
        in_flight: int = 2,
    ) -> None:
        limits = limits or Limits(max_sequences=4, max_step_tokens=48, mixed_step_tokens=24)
        self.card = card
        own = CardLimits(limits.max_step_tokens, limits.max_sequences, context_blocks, limits.max_proposed or 0)
        self.buffers = StepBuffers(card, model.spec, own, model.facts, model.dtype)
        self.memory = CardKVPool(
            model.spec, kv_format=kv_format, device=card.device, block_size=block_size, segment_blocks=segment_blocks,
            table=self.buffers.view("segment_table", MOST_SEGMENTS, dtype=torch.int64),
        )  # fmt: skip
        self.runner = CardRunner(card, model, self.memory, self.buffers, in_flight=in_flight)
        numbers = BlockPool(block_size=block_size, segment_blocks=segment_blocks)
        self.ledger = Ledger(blocks * self.memory.block_bytes)
        self.segments = Segments(numbers, self.memory, self.ledger)
        for first in range(0, blocks, segment_blocks):
            size = min(segment_blocks, blocks - first)
            self.segments.add(size, self.ledger.reserve("kv.target", size * self.memory.block_bytes))
        if graphs:
            self.runner.capture(1 << 40)
        self.cache = KVCache(numbers, PrefixCache(block_size) if prefix else None)
        self.scheduler = Scheduler(self.cache, limits)
        vocab = model.spec.vocab_size
        self.core = EngineCore(
            self.scheduler, self.runner, Sampler(vocab, card.device), vocab, self.segments, pipeline=self.runner,
            proposer=proposer,
        )  # fmt: skip
        self.sampled: dict[int, list[Sampled]] = {}
        self.ended: dict[int, FinishReason] = {}
        self._poisoned: set[int] = set()
        self.ids = 0

    @property
    def outputs(self) -> dict[int, list[int]]:
        return {number: [each.token_id for each in own] for number, own in self.sampled.items()}

    def submit(self, prompt: list[int], max_tokens: int = 16, **sampling: object) -> int:
        self.ids += 1
        params = SamplingParams(max_tokens, **({"temperature": 0.0} | sampling))  # type: ignore[arg-type]
        self.core.submit(SequenceSpec(self.ids, tuple(prompt), params))
        return self.ids

    def step(self) -> None:
        report = self.core.step()
        for token in report.tokens:
            self.sampled.setdefault(token.sequence_id, []).append(token.sampled)
        for finished in report.finished:
            self.ended[finished.sequence_id] = finished.reason
        self.scheduler.check_integrity()
        self._poison_free_blocks()

    def resize(self, *, shrink_bytes: int = 0, grow_bytes: int = 0) -> None:
        self.core.resize(Resize(1 << 40, shrink_bytes, grow_bytes))
        self.scheduler.check_integrity()
        self.segments.check_integrity()
        self._poisoned &= set(self.block_ids())
        self._poison_free_blocks()

    def run(self, between: Callable[[int], None] = lambda steps: None) -> dict[int, list[int]]:
        steps = 0
        while self.core.busy:
            self.step()
            steps += 1
            between(steps)
            assert steps < 2000, "the engine does not come to an end"
        return self.outputs

    def block_ids(self) -> list[int]:
        shift = self.cache.pool.segment_blocks.bit_length() - 1
        return [s << shift | slot for s, size in self.memory.segments.items() for slot in range(size)]

    def _poison_free_blocks(self) -> None:
        free = {block for block in self.block_ids() if self.cache.pool.state(block) is BlockState.FREE}
        self.memory.poison(free - self._poisoned)
        self._poisoned = free
