"""How fast an engine is by itself: real steps of scheduler, runner, model and sampler, with nobody to talk to.

Runs in: the thread that owns the core; owns: nothing. The core is fit for nothing else afterwards: what its prefix
cache holds for some prompts was not computed from them.

    a step = plan · prepare (the batch's arrays) · model · sample · report, and what lies between them
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from edgekv.core.sampling import SamplingParams
from edgekv.core.scheduler import Limits
from edgekv.core.sequence import Sequence, SequenceSpec
from edgekv.core.step import BlockCopy, StepPlan
from edgekv.engine.core import EngineCore, Forward
from edgekv.engine.native_runner import NativeRunner
from edgekv.engine.runner import Runner
from edgekv.kernels.cpu.abi import OpKind
from edgekv.model.native_lm import NativeLM
from edgekv.model.spec import ModelSpec

LOWEST_ID = 300  # most vocabularies have their control tokens and bytes below
NO_LIMIT = 1 << 30


@dataclass(frozen=True, slots=True)
class StepTime:
    """One step, or several added up, in seconds; `context` is the tokens that all sequences have in the cache."""

    total_s: float
    plan_s: float
    prepare_s: float
    model_s: float
    sample_s: float
    report_s: float
    context: int = 0

    @property
    def overhead(self) -> float:
        """The share of the time that was not the model's."""
        return 1 - self.model_s / self.total_s


class EngineMeter:
    """Puts sequences of random tokens through a core and times its steps.

    `settle` waits for the device, where the model's work goes on after its call has returned.
    """

    def __init__(self, core: EngineCore, seed: int, settle: Callable[[], None] | None = None) -> None:
        if not isinstance(core.runner, Runner | NativeRunner):
            raise TypeError(f"cannot look into a {type(core.runner).__name__}")
        self._core = core
        self._rng = random.Random(seed)
        self._next_id = 0
        self._stopwatch = Stopwatch()
        self._limits = core.scheduler.limits
        self.model = core.runner.model
        self._filling = _Filling(core.runner, core.scheduler.cache.block_size)
        self._stopwatch.wrap(self.model, "forward", "model", settle)
        for owner, method, part in (
            (core.scheduler, "plan", "plan"),
            (core.runner, "forward", "forward"),
            (core.sampler, "sample", "sample"),
            (core.scheduler, "complete", "report"),
            (core, "stats", "report"),
        ):
            self._stopwatch.wrap(owner, method, part)

    def prefill(self, tokens: int) -> StepTime:
        """One prompt from its submission to its first token."""
        self._submit(tokens, max_tokens=1)
        steps = []
        while self._core.busy:
            steps.append(self._step())
        return added(steps)

    def decode(
        self, context: int, batch: int, steps: int, on_ready: Callable[[], None] = lambda: None
    ) -> list[StepTime]:
        """So many steps of so many sequences, each with `context` tokens behind it at first.

        Only the first is computed: the others get copies of its keys and values, in blocks of their own, because to
        compute them all takes minutes. `on_ready` is called when all are there.
        """
        scheduler = self._core.scheduler
        most = steps + 8
        donor = self._submit(context, most)
        while not any(sequence.num_output for sequence in scheduler.running):
            self._step()
        others = [self._submit(context, most) for _ in range(batch - 1)]
        if others:
            [sequence] = scheduler.running
            self._core.runner = self._filling.from_(sequence)
            scheduler.limits = Limits(NO_LIMIT, NO_LIMIT, NO_LIMIT, self._limits.weights)
            self._step()
            scheduler.limits, self._core.runner = self._limits, self._filling.runner
        if scheduler.num_running != batch:
            raise ValueError(f"the KV pool has room for {scheduler.num_running} of {batch} sequences")
        for _ in range(2):
            self._step()
        on_ready()
        found = [self._step() for _ in range(steps)]
        for sequence_id in (donor, *others):
            self._core.abort(sequence_id)
        while self._core.busy:
            self._core.step()
        return found

    def _submit(self, tokens: int, max_tokens: int) -> int:
        self._next_id += 1
        vocab_size = self._core.vocab_size
        lowest = LOWEST_ID if vocab_size > 2 * LOWEST_ID else 0
        prompt = tuple(self._rng.randrange(lowest, vocab_size) for _ in range(tokens))
        self._core.submit(SequenceSpec(self._next_id, prompt, SamplingParams(max_tokens=max_tokens, temperature=0.0)))
        return self._next_id

    def _step(self) -> StepTime:
        parts = self._stopwatch.parts
        parts.clear()
        begun = time.perf_counter()
        report = self._core.step()
        total = time.perf_counter() - begun
        for finished in report.finished:
            if finished.detail:
                raise ValueError(finished.detail)
        forward, model = parts.get("forward", 0.0), parts.get("model", 0.0)
        return StepTime(
            total_s=total,
            plan_s=parts.get("plan", 0.0),
            prepare_s=forward - model,
            model_s=model,
            sample_s=parts.get("sample", 0.0),
            report_s=parts.get("report", 0.0),
            context=sum(sequence.num_computed for sequence in self._core.scheduler.running),
        )


def added(steps: list[StepTime]) -> StepTime:
    """All of them as one."""
    sums = [sum(getattr(step, name) for step in steps) for name in StepTime.__slots__]
    return StepTime(*sums)


class Stopwatch:
    """Times methods of objects from without: seconds spent in each part since `parts` was cleared."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}

    def wrap(self, owner: object, method: str, part: str, settle: Callable[[], None] | None = None) -> None:
        """Time `owner.method` as `part` from now on, and `settle` after it."""
        run: Callable[..., Any] = getattr(owner, method)
        parts = self.parts

        def timed(*args: Any, **options: Any) -> Any:
            begun = time.perf_counter()
            try:
                answer = run(*args, **options)
                if settle is not None:
                    settle()
                return answer
            finally:
                parts[part] = parts.get(part, 0.0) + time.perf_counter() - begun

        setattr(owner, method, timed)


class _Filling:
    """A runner that computes one sequence and gives all others what that one has in the cache."""

    def __init__(self, runner: Forward, block_size: int) -> None:
        self.runner, self._block_size = runner, block_size
        self._donor: Sequence | None = None

    def from_(self, donor: Sequence) -> "_Filling":
        """Copy from this one, whose prompt is as long as theirs."""
        self._donor = donor
        return self

    def forward(self, plan: StepPlan) -> Tensor:
        """See `Forward`; the others sample from the donor's logits."""
        donor = self._donor
        assert donor is not None
        copies = [
            BlockCopy(source, target, self._block_size)
            for chunk in plan.chunks
            if chunk.sequence is not donor
            for source, target in zip(donor.block_table, chunk.block_table, strict=False)
        ]
        own = tuple(chunk for chunk in plan.chunks if chunk.sequence is donor)
        logits = self.runner.forward(replace(plan, copies=(), chunks=own))
        self.runner.forward(StepPlan(copies=tuple(copies), chunks=()))
        return logits.expand(plan.num_sampled, -1).clone()


def weight_bytes(model: Any, spec: ModelSpec) -> int:
    """What a step reads of the weights, each once; of an embedding that is not the head too, next to nothing."""
    if isinstance(model, NativeLM):
        used = [op for op in model.lowered.operations if op.kind is not OpKind.EMBED]
        matrices = {id(op.matrix): op.matrix.num_bytes for op in used if op.matrix is not None}
        return sum(matrices.values())
    looked_up = 0 if spec.tie_word_embeddings else spec.vocab_size * spec.hidden_size
    itemsize: int = model.dtype.itemsize
    return (spec.num_parameters - looked_up) * itemsize


def kv_bytes(spec: ModelSpec, token_bytes: float, context: int) -> int:
    """What a step reads of the cache for one sequence of so many tokens, `token_bytes` each in all layers together."""
    layer_bytes = token_bytes / spec.num_layers
    return round(sum(min(context, window or context) for window in spec.windows) * layer_bytes)


def prefill_flops(spec: ModelSpec, tokens: int, *, native: bool) -> int:
    """Multiplications and additions of a prompt: the layers' products for every token, the head's for the last.

    The native kernels compute what follows the last layer's attention for the last token only.
    """
    layers = spec.num_parameters - (1 if spec.tie_word_embeddings else 2) * spec.vocab_size * spec.hidden_size
    spared = spec.hidden_size * (spec.num_heads * spec.head_dim + 3 * spec.intermediate_size) if native else 0
    pairs = sum(_pairs(tokens, window) for window in spec.windows)
    attention = 4 * pairs * spec.num_heads * spec.head_dim
    head = 2 * spec.vocab_size * spec.hidden_size
    return 2 * layers * tokens - 2 * spared * (tokens - 1) + head + attention


def _pairs(tokens: int, window: int | None) -> int:
    """Of a token and one that it sees."""
    seen = min(tokens, window or tokens)
    return seen * (seen + 1) // 2 + (tokens - seen) * seen
