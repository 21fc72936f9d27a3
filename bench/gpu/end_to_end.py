"""A whole model: tokens a second of one stream and of several, against what its bytes would take to be read.

Runs in: the main thread; owns: the engine.
"""

import gc
import importlib
import random
import time
from collections.abc import Iterator
from typing import Any

import torch

from bench.gpu.bench import Bench, NotMeasured
from bench.gpu.random_model import Made, hf_config, make_model, step_bytes
from bench.gpu.rig import WatchedCard
from bench.gpu.row import Row, Target, Times
from edgekv.core.block_pool import BlockPool
from edgekv.core.kv_cache import KVCache
from edgekv.core.ledger import Ledger
from edgekv.core.limits import Limits
from edgekv.core.sampling import SamplingParams
from edgekv.core.scheduler import Scheduler
from edgekv.core.sequence import SequenceSpec
from edgekv.engine.card_buffers import StepBuffers
from edgekv.engine.card_model import CardModel
from edgekv.engine.card_pool import CardKVPool
from edgekv.engine.card_runner import CardRunner
from edgekv.engine.core import EngineCore
from edgekv.engine.sampler import Sampler
from edgekv.engine.segments import Segments
from edgekv.model.card_memory import MOST_SEGMENTS, CardLimits

BLOCK_SIZE = 16
WARM_STEPS = 8
ROOFLINE = Target(0.75, 0.85)


class Engine:
    """The engine over a model, without a server; its card is watched."""

    def __init__(self, bench: Bench, model: CardModel, sequences: int, context: int) -> None:
        """Raises NotMeasured, and what the engine raises."""
        spec, card = model.spec, WatchedCard(bench.rig)
        step_tokens = 512 if bench.rig.is_real else 16
        self.card, self._rig = card, bench.rig
        self._rng, self._submitted = random.Random(0), 0
        own = CardLimits(step_tokens, sequences, -(-context // BLOCK_SIZE))
        buffers = StepBuffers(card, spec, own, model.facts, model.dtype)
        blocks = sequences * -(-context // BLOCK_SIZE)
        segment_blocks = 256 if bench.rig.is_real else 4
        self.pool = CardKVPool(
            spec, kv_format=model.dtype, device=card.device, block_size=BLOCK_SIZE, segment_blocks=segment_blocks,
            table=buffers.view("segment_table", MOST_SEGMENTS, dtype=torch.int64),
        )  # fmt: skip
        segments = -(-blocks // segment_blocks)
        num_bytes = segments * segment_blocks * self.pool.block_bytes
        bench.need(num_bytes)
        self.runner = CardRunner(card, model, self.pool, buffers)
        numbers, ledger = BlockPool(block_size=BLOCK_SIZE, segment_blocks=segment_blocks), Ledger(num_bytes)
        places = Segments(numbers, self.pool, ledger)
        for _ in range(segments):
            places.add(segment_blocks, ledger.reserve("kv.target", segment_blocks * self.pool.block_bytes))
        begun = time.perf_counter()
        self.runner.load_kernels()
        self.load_s = time.perf_counter() - begun
        self.runner.warm_up()
        self.runner.capture(1 << 40)
        scheduler = Scheduler(KVCache(numbers, None), Limits(sequences, step_tokens, step_tokens))
        self.core = EngineCore(
            scheduler, self.runner, Sampler(spec.vocab_size, card.device), spec.vocab_size, places, pipeline=self.runner
        )

    def warm(self, lengths: list[int]) -> None:
        """Such prompts once, to the end: libraries load what they need at first use."""
        self._submit(lengths, WARM_STEPS)
        while self.core.busy:
            self.core.step()

    def begin(self, lengths: list[int], max_tokens: int) -> Times:
        """Prompts of such lengths, worked through until each has its first token; seconds of all of it."""
        waiting = set(self._submit(lengths, max_tokens))
        self._rig.wait()
        begun = time.perf_counter()
        while waiting:
            waiting -= {token.sequence_id for token in self._step()}
        return Times((time.perf_counter() - begun,))

    def decode(self, steps: int) -> Times:
        """Seconds of each of so many steps, which come one after the other as in a server."""
        for _ in range(WARM_STEPS):
            self._step()
        self.card.spans.clear()
        samples = []
        for _ in range(steps):
            begun = time.perf_counter()
            self._step()
            samples.append(time.perf_counter() - begun)
        self._rig.wait()
        return Times(tuple(samples))

    def _submit(self, lengths: list[int], max_tokens: int) -> list[int]:
        vocab, first = self.runner.model.spec.vocab_size, self._submitted
        self._submitted += len(lengths)
        for number, length in enumerate(lengths, first):
            prompt = tuple(self._rng.randrange(vocab) for _ in range(length))
            self.core.submit(SequenceSpec(number, prompt, SamplingParams(max_tokens, temperature=0.0)))
        return list(range(first, self._submitted))

    def _step(self) -> tuple[Any, ...]:
        report = self.core.step()
        for finished in report.finished:
            raise NotMeasured(f"a sequence ended: {finished.reason} {finished.detail}")
        return report.tokens


def measure_model(bench: Bench, made: Made) -> Iterator[Row]:
    """One stream and several, at the contexts that there are."""
    model = make_model(bench, made)
    steps = bench.sizes.steps
    for sequences, context in bench.sizes.streams:
        total = context + steps + WARM_STEPS + 4
        engine = Engine(bench, model, sequences, total)
        title = f"{made.title}, {sequences} x {context:,}"
        engine.warm([context] * sequences)
        prompts = engine.begin([context] * sequences, total - context)
        tokens = sequences * context
        yield Row(
            f"{title}, prompts", prompts, f"{tokens / prompts.median:,.0f} tok/s",
            note=f"kernels loaded in {engine.load_s:.1f} s",
        )  # fmt: skip
        times = engine.decode(steps)
        contexts = [context + WARM_STEPS + steps // 2] * sequences
        moved = step_bytes(model, contexts, engine.pool.block_bytes // BLOCK_SIZE)
        share = bench.share_of_read(moved, times)
        target = ROOFLINE if made.is_quantised and sequences == 1 else None
        yield Row(
            f"{title}, decode", times, f"{sequences / times.median:,.1f} tok/s", share, "of the roofline", target,
            f"{moved / 1e9:.2f} GB a step",
        )  # fmt: skip
        yield from _on_card(bench, title, engine, moved)
        del engine
        gc.collect()  # what is in a cycle keeps its memory


def _on_card(bench: Bench, title: str, engine: Engine, moved: int) -> Iterator[Row]:
    """A step's graph by itself, and how long the card waits for the next one."""
    if len(engine.card.spans) < 2:
        yield Row(f"{title}, a step's graph", reason="no graph ran")
        return
    times = engine.card.graph_times()
    share = bench.share_of_read(moved, times)
    yield Row(f"{title}, a step's graph", times, share=share, of="of the roofline", note="on the card")
    gaps = engine.card.gaps()
    idle = sum(gaps.samples) / (sum(gaps.samples) + sum(times.samples))
    note = "copies of a step's numbers among it"
    yield Row(f"{title}, between two graphs", gaps, share=idle, of="of the time", note=note)


def measure_transformers(bench: Bench, made: Made) -> Iterator[Row]:
    """`generate` of transformers with a model of the same shape, as it comes."""
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError as error:
        raise NotMeasured(f"transformers is not installed ({error})") from None
    if made.is_quantised:
        raise NotMeasured("transformers reads GGUF's formats by making them plain numbers")
    bench.need(made.spec.num_parameters * 2 + (2 << 30))
    config = transformers.LlamaConfig(**hf_config(made.spec))
    with torch.device(bench.device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=bench.act).eval()
    steps = bench.sizes.steps
    for sequences, context in bench.sizes.streams:
        prompts = torch.randint(0, made.spec.vocab_size, (sequences, context), device=bench.device)

        def generate(count: int, prompts: torch.Tensor = prompts) -> float:
            options = {"do_sample": False, "min_new_tokens": count, "max_new_tokens": count, "pad_token_id": 0}
            bench.rig.wait()
            begun = time.perf_counter()
            model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
            bench.rig.wait()
            return time.perf_counter() - begun

        few = max(1, steps // 8)
        generate(few)
        # The prompt's time is in both.
        each = (generate(steps + few) - generate(few)) / steps
        if each > 0:
            yield Row(
                f"{made.title}, {sequences} x {context:,}, transformers", Times((each,)),
                f"{sequences / each:,.1f} tok/s",
            )  # fmt: skip
