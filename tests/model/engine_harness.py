"""A real engine over a real model folder, turned by hand, with freed blocks poisoned and every invariant checked."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgekv.core.block_pool import BlockPool, BlockState
from edgekv.core.kv_cache import KVCache
from edgekv.core.kv_format import KVFormatName
from edgekv.core.ledger import Ledger
from edgekv.core.prefix_cache import PrefixCache
from edgekv.core.sampling import SamplingParams
from edgekv.core.scheduler import Limits, Scheduler
from edgekv.core.sequence import FinishReason, SequenceSpec
from edgekv.core.speculation import Controller
from edgekv.core.step import Resize, StepPlan, TokenOut
from edgekv.engine.core import EngineCore
from edgekv.engine.kv_pool import BlockMemory, KVPool
from edgekv.engine.native import LibraryPacker
from edgekv.engine.native_pool import NativeKVPool
from edgekv.engine.native_runner import NativeRunner
from edgekv.engine.proposer import Proposer
from edgekv.engine.runner import Runner
from edgekv.engine.sampler import Sampler
from edgekv.engine.segments import Segments
from edgekv.kernels.cpu.library import load_library
from edgekv.kernels.cpu.program import Pool
from edgekv.model.causal_lm import CausalLM
from edgekv.model.hf_config import read_spec
from edgekv.model.loader import load_model
from edgekv.model.lowering import lower
from edgekv.model.matrix_layout import WeightForm
from edgekv.model.native_lm import NativeLM
from edgekv.model.packing import load_packed

CPU = torch.device("cpu")


class EngineHarness:
    """A pool of `blocks` in segments of at most `segment_blocks`, and whatever was submitted to it."""

    def __init__(
        self,
        model: CausalLM | NativeLM,
        *,
        blocks: int = 128,
        segment_blocks: int = 128,
        block_size: int = 16,
        limits: Limits | None = None,
        prefix: bool = True,
        kv_format: KVFormatName = "float32",
        proposer: Proposer | None = None,
        controller: Controller | None = None,
    ) -> None:
        self.model = model
        self.memory: BlockMemory[Any]
        self._runner: Runner | NativeRunner
        if isinstance(model, NativeLM):
            self.memory = native = NativeKVPool(
                model.spec, kv_format=kv_format, block_size=block_size, segment_blocks=segment_blocks
            )
            self._runner = NativeRunner(model, native)
        else:
            self.memory = pool = KVPool(
                model.spec, dtype=torch.float32, device=CPU, block_size=block_size, segment_blocks=segment_blocks
            )
            self._runner = Runner(model, pool)
        numbers = BlockPool(block_size=block_size, segment_blocks=segment_blocks)
        self.ledger = Ledger(blocks * self.memory.block_bytes)
        self.segments = Segments(numbers, self.memory, self.ledger)
        for first in range(0, blocks, segment_blocks):
            size = min(segment_blocks, blocks - first)
            self.segments.add(size, self.ledger.reserve("kv.target", size * self.memory.block_bytes))
        self.cache = KVCache(numbers, PrefixCache(block_size) if prefix else None)
        self.scheduler = Scheduler(self.cache, limits or Limits())
        vocab = model.spec.vocab_size
        self.core = EngineCore(
            self.scheduler,
            self,
            Sampler(vocab, CPU),
            vocab,
            self.segments,
            proposer=proposer,
            controller=controller,
        )
        self.outputs: dict[int, list[int]] = {}
        self.said: dict[int, list[TokenOut]] = {}
        self.reasons: dict[int, FinishReason] = {}
        self.cached: dict[int, int] = {}
        self.logits: list[Tensor] = []
        self._poisoned: set[int] = set()
        self._ids = 0

    def forward(self, plan: StepPlan) -> Tensor:
        """The runner's, noted down row by row."""
        logits = self._runner.forward(plan)
        self.logits.extend(logits.clone())
        return logits

    def submit(self, prompt: list[int], max_tokens: int = 64, *, salt: bytes = b"", seed: int | None = None) -> int:
        temperature = 0.0 if seed is None else 0.8
        return self.ask(prompt, SamplingParams(max_tokens, seed=seed or 0, temperature=temperature), salt=salt)

    def ask(self, prompt: list[int], sampling: SamplingParams, *, salt: bytes = b"") -> int:
        self._ids += 1
        self.core.submit(SequenceSpec(self._ids, tuple(prompt), sampling, salt=salt))
        return self._ids

    def step(self) -> None:
        report = self.core.step()
        for started in report.started:
            self.cached[started.sequence_id] = started.cached_tokens
        for token in report.tokens:
            self.outputs.setdefault(token.sequence_id, []).append(token.sampled.token_id)
            self.said.setdefault(token.sequence_id, []).append(token)
        for finished in report.finished:
            assert finished.reason in ("stop", "length"), finished
            self.reasons[finished.sequence_id] = finished.reason
        self.scheduler.check_integrity()
        self._poison_free_blocks()

    def shrink(self, num_bytes: int) -> int:
        """Between steps; what was moved must not be read where it was."""
        given_back = self.segments.shrink(self.scheduler, num_bytes, keep_promises=True)
        self.scheduler.check_integrity()
        self._poison_free_blocks()
        return given_back

    def resize(self, *, shrink_bytes: int = 0, grow_bytes: int = 0) -> None:
        """Between steps, for others' need or after it: below every promise and up again."""
        self.core.resize(Resize(1 << 40, shrink_bytes, grow_bytes))
        self.scheduler.check_integrity()
        self.segments.check_integrity()
        self._poisoned &= set(self.block_ids())
        self._poison_free_blocks()

    def _poison_free_blocks(self) -> None:
        free = {block for block in self.block_ids() if self.cache.pool.state(block) is BlockState.FREE}
        self.memory.poison(free - self._poisoned)
        self._poisoned = free

    def block_ids(self) -> list[int]:
        shift = self.cache.pool.segment_blocks.bit_length() - 1
        return [s << shift | slot for s, size in self.memory.segments.items() for slot in range(size)]

    def run(self) -> dict[int, list[int]]:
        while self.core.busy:
            self.step()
        return self.outputs

    def generate(self, prompt: list[int], max_tokens: int = 64, *, seed: int | None = None) -> list[int]:
        number = self.submit(prompt, max_tokens, seed=seed)
        return self.run()[number]


def load(folder: Path) -> CausalLM:
    return load_model(folder, dtype=torch.float32, device=CPU)


def load_on_kernels(
    folder: Path, *, threads: int = 1, tier: str | None = None, form: WeightForm | None = None
) -> NativeLM:
    pool = Pool(load_library(), threads, tier=tier)
    spec, kept = read_spec(folder), form or WeightForm("float32")
    return NativeLM(load_packed(folder, spec, lower, form=kept, packer=LibraryPacker(pool)), pool)
