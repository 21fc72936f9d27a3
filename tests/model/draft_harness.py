"""`EngineHarness` with a draft model: real weights, a pool and leases of its own, freed blocks poisoned too."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from edgekv.core.block_pool import BlockPool, BlockState
from edgekv.core.draft_plan import DRAFT_KV_LEASE, WEIGHTS_LEASE, WORKSPACE_LEASE, DraftPlan
from edgekv.core.kv_cache import KVCache
from edgekv.core.kv_format import KVPlan
from edgekv.core.model_shape import WeightBytes
from edgekv.core.prefix_cache import PrefixCache
from edgekv.core.speculation import Controller
from edgekv.engine.at_once import AtOnce
from edgekv.engine.draft import DraftModel
from edgekv.engine.draft_memory import DraftMemory, LoadedDraft
from edgekv.engine.kv_pool import BlockMemory, KVPool
from edgekv.engine.native_pool import NativeKVPool
from edgekv.engine.native_runner import NativeRunner
from edgekv.engine.runner import Runner
from edgekv.engine.sampler import Sampler
from edgekv.engine.shared_memory import SharedMemory
from edgekv.model.causal_lm import CausalLM
from edgekv.model.native_lm import NativeLM
from tests.model.engine_harness import CPU, EngineHarness

WEIGHT_BYTES, WORKSPACE_BYTES = 5000, 300


class Always(Controller):
    """Asks for `k` tokens for everybody."""

    def __init__(self, k: int) -> None:
        super().__init__(k)

    @property
    def is_on(self) -> bool:
        return True

    def is_in_debt(self, decodes: int) -> bool:
        return False

    def choose(
        self, most: Mapping[int, int], unread: Mapping[int, int] | None = None, said: Mapping[int, int] | None = None
    ) -> dict[int, int]:
        return {number: min(left, self.most) for number, left in most.items()}


@dataclass(frozen=True)
class Pool:
    """Of the draft: so many blocks, in segments of so many."""

    blocks: int = 64
    segment_blocks: int = 8
    prefix: bool = True
    max_step_tokens: int = 512


class DraftedHarness(EngineHarness):
    """An engine whose draft model is `draft`."""

    def __init__(
        self, model: CausalLM | NativeLM, draft: CausalLM | NativeLM, k: int, pool: Pool, **options: Any
    ) -> None:
        blocks = BlockPool(block_size=16, segment_blocks=pool.segment_blocks)
        self.guesser = DraftModel(
            KVCache(blocks, PrefixCache(16) if pool.prefix else None),
            vocab_size=draft.spec.vocab_size,
            target_vocab=model.spec.vocab_size,
            context_tokens=draft.spec.max_position_embeddings,
            max_step_tokens=pool.max_step_tokens,
        )
        super().__init__(model, proposer=self.guesser, controller=Always(k), **options)
        self._draft, self._segment_blocks = draft, pool.segment_blocks
        self.loads = 0
        loaded = self._load()
        kv = KVPlan(1, 16, loaded.memory.block_bytes, pool.segment_blocks, pool.blocks)
        plan = DraftPlan(WeightBytes(WEIGHT_BYTES, 0, {}), kv, "float32", "float32", WORKSPACE_BYTES)
        self.ledger.set_budget(1 << 40)
        weights = self.ledger.reserve(WEIGHTS_LEASE, WEIGHT_BYTES)
        workspace = self.ledger.reserve(WORKSPACE_LEASE, WORKSPACE_BYTES)
        leases = [self.ledger.reserve(DRAFT_KV_LEASE, size * kv.block_bytes) for size in kv.segments]
        self.draft_memory = DraftMemory(self.guesser, plan, self.ledger, self._load)
        self.draft_memory.adopt(loaded, weights, workspace, leases)
        self.shared = SharedMemory(self.segments, self.draft_memory, self.segments.num_bytes)
        self.core.pool = self.shared
        self._poisoned_drafts: set[int] = set()

    def _load(self) -> LoadedDraft:
        self.loads += 1
        spec, sampler = self._draft.spec, Sampler(self._draft.spec.vocab_size, CPU)
        memory: BlockMemory[Any]
        if isinstance(self._draft, NativeLM):
            memory = native = NativeKVPool(
                spec, kv_format="float32", block_size=16, segment_blocks=self._segment_blocks
            )
            pipeline = AtOnce(NativeRunner(self._draft, native), sampler)
        else:
            memory = plain = KVPool(
                spec, dtype=torch.float32, device=CPU, block_size=16, segment_blocks=self._segment_blocks
            )
            pipeline = AtOnce(Runner(self._draft, plain), sampler)
        self.pool_of_draft = memory
        self._poisoned_drafts = set()
        return LoadedDraft(pipeline, memory)

    def step(self) -> None:
        super().step()
        self._check()

    def resize(self, *, shrink_bytes: int = 0, grow_bytes: int = 0) -> None:
        super().resize(shrink_bytes=shrink_bytes, grow_bytes=grow_bytes)
        self._check()

    def _check(self) -> None:
        self.shared.check_integrity()
        if self.guesser.pipeline is None:
            return
        pool, memory = self.guesser.cache.pool, self.pool_of_draft
        shift = memory.segment_shift
        every = {index << shift | slot for index, size in memory.segments.items() for slot in range(size)}
        free = {block for block in every if pool.state(block) is BlockState.FREE}
        self._poisoned_drafts &= every
        memory.poison(free - self._poisoned_drafts)
        self._poisoned_drafts = free
