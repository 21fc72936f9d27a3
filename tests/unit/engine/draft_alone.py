"""A draft model on a device that counts, and sequences to be asked for: nothing is computed."""

from collections.abc import Callable, Collection
from typing import Any

from edgekv.core.block_pool import BlockPool
from edgekv.core.kv_cache import KVCache
from edgekv.core.prefix_cache import PrefixCache
from edgekv.core.sampling import SamplingParams
from edgekv.core.sequence import Sequence, SequenceSpec, Stage
from edgekv.core.step import Sampled, StepPlan
from edgekv.engine.draft import DraftModel
from edgekv.engine.protocols import Pending
from edgekv.engine.sample_row import SampleRow
from edgekv.engine.sampler import NonFiniteLogits

BLOCK_SIZE = 4


class Step:
    def __init__(self, device: "Device", tokens: list[int], fault: Exception | None, bad: set[int]) -> None:
        self.device, self.tokens, self.fault, self.bad = device, tokens, fault, bad

    def result(self, without: Collection[int] = ()) -> list[Sampled]:
        self.device.waited.append(self)
        if self.fault is not None:
            raise self.fault
        if bad := self.bad - set(without):
            raise NonFiniteLogits(tuple(sorted(bad)), len(self.tokens))
        return [Sampled(token) for row, token in enumerate(self.tokens) if row not in without]


class Device:
    """Says one more than the last token, modulo 100; where it chooses by itself, whatever it is told to begin with."""

    def __init__(self) -> None:
        self.plans: list[StepPlan] = []
        self.rows: list[list[SampleRow]] = []
        self.steps: list[Step] = []
        self.waited: list[Step] = []
        self.begin_fault: Callable[[int], Exception | None] = lambda number: None
        self.result_fault: Callable[[int], Exception | None] = lambda number: None
        self.bad: Callable[[int, SampleRow], bool] = lambda number, row: False
        self.say: Callable[[list[int], int], int] = lambda tokens, unknown: (tokens[-1] + 1 + unknown) % 100

    def begin(self, plan: StepPlan, rows: list[SampleRow], after: Pending | None) -> Step:
        number = len(self.plans)
        self.plans.append(plan)
        self.rows.append(rows)
        if (fault := self.begin_fault(number)) is not None:
            raise fault
        tokens = [self.say(list(row.tokens), row.num_unknown) for row in rows]
        bad = {place for place, row in enumerate(rows) if self.bad(number, row)}
        self.steps.append(Step(self, tokens, self.result_fault(number), bad))
        return self.steps[-1]


class Draft:
    """A draft model on a pool of `blocks`, and the sequences that it is asked for."""

    def __init__(self, *, blocks: int = 64, prefix: bool = True, **options: Any) -> None:
        pool = BlockPool(block_size=BLOCK_SIZE, segment_blocks=4)
        for first in range(0, blocks, 4):
            pool.add_segment(min(4, blocks - first))
        self.cache = KVCache(pool, PrefixCache(BLOCK_SIZE) if prefix else None)
        self.now_s = 0.0
        sizes = {"vocab_size": 100, "target_vocab": 100, "context_tokens": 1000, "max_step_tokens": 64}
        self.model = DraftModel(self.cache, **(sizes | options), clock=lambda: self.now_s)
        self.device = self.model.pipeline = Device()

    def propose(self, *sequences: Sequence, k: int = 3) -> dict[int, tuple[int, ...]]:
        found = dict(self.model.propose(list(sequences), {sequence.id: k for sequence in sequences}))
        self.model.check_integrity()
        assert not self.cache._pins
        return found

    def chunks(self, step: int = -1) -> list[tuple[int, tuple[int, ...], int]]:
        return [(chunk.start, chunk.token_ids, chunk.sampled) for chunk in self.device.plans[step].chunks]

    def forget_plans(self) -> None:
        self.device.plans.clear()


def sequence(number: int, *tokens: int, arrival: int = 0, **sampling: Any) -> Sequence:
    params = SamplingParams(**({"max_tokens": 500} | sampling))
    spec = SequenceSpec(number, tuple(tokens), params)
    return Sequence(spec, arrival or number, list(tokens), Stage.RUNNING)
