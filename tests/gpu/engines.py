"""A card's whole engine in these tests, and what its answers are compared with.

Imports what edgekv itself depends on, and fails to be imported where that is not installed.
"""

import importlib.util
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgekv.core.dtype_choice import DtypeName
from edgekv.core.limits import Limits
from edgekv.core.sampling import SamplingParams
from edgekv.core.sequence import SequenceSpec
from edgekv.core.step import Sampled
from edgekv.model.matrix_layout import WeightForm, WeightsName
from tests.card.engine import CardHarness, card_model
from tests.card.guesser import Guesser
from tests.card.test_card_engine import SAMPLING
from tests.card.test_card_formats import BOUNDS, forced_logits
from tests.card.test_chain import OPTIONS as CHAINED_OPTIONS
from tests.card.test_chain import PROMPTS as CHAINED
from tests.card.test_chain import begin_chain
from tests.gpu.bed import Bed
from tests.model.engine_harness import EngineHarness, load, load_on_kernels

__all__ = ["BOUNDS", "CHAINED", "CHAINED_OPTIONS", "SAMPLING", "Guesser", "begin_chain", "forced_logits"]

CONTEXT_TOKENS = 4096


def prompts(seed: int, *lengths: int, most: int = 190) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, most) for _ in range(length)] for length in lengths]


def make_engine(
    bed: Bed, folder: Path, *, dtype: DtypeName = "float32", weights: WeightsName = "auto", graphs: bool = True,
    **options: Any,
) -> CardHarness:  # fmt: skip
    """A pool of 64 blocks, unless `options` say otherwise; all kernels are compiled, on all cores."""
    model = card_model(folder, bed.card, dtype=dtype, weights=weights)  # type: ignore[arg-type]
    engine = CardHarness(model, bed.card, graphs=False, **options)  # type: ignore[arg-type]
    engine.runner.load_kernels()
    if graphs:
        engine.runner.capture(1 << 40)
    return engine


def roomy() -> dict[str, Any]:
    """Options of an engine for prompts of hundreds of tokens."""
    limits = Limits(max_sequences=8, max_step_tokens=512, mixed_step_tokens=256)
    return {"limits": limits, "blocks": 1024, "segment_blocks": 128, "context_blocks": CONTEXT_TOKENS // 16}


def verifying() -> Limits:
    """Of steps that verify up to twelve proposals."""
    return Limits(max_sequences=4, max_step_tokens=48, mixed_step_tokens=24, max_proposed=12)


def reference_tokens(
    folder: Path, own: list[list[int]], count: int, sampling: list[dict[str, Any]] | None = None
) -> list[list[Sampled]]:
    """What edgekv's own model in plain torch, in float32 on the processor, continues prompts with."""
    engine = EngineHarness(load(folder), blocks=2048)
    for number, prompt in enumerate(own):
        settings: dict[str, Any] = {"temperature": 0.0} | (sampling[number] if sampling else {})
        engine.core.submit(SequenceSpec(number, tuple(prompt), SamplingParams(count, **settings)))
    found: list[list[Sampled]] = [[] for _ in own]
    while engine.core.busy:
        for token in engine.core.step().tokens:
            found[token.sequence_id].append(token.sampled)
    return found


def has_transformers() -> bool:
    return importlib.util.find_spec("transformers") is not None


def transformers_tokens(folder: Path, prompt: list[int], count: int) -> list[int]:
    """What transformers continues a prompt with, from one pass over all of it for each token."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def reference_logits(folder: Path, weights: WeightsName, blocks: tuple[int, ...]) -> Tensor:
    """Of the processor, in float32; quantised weights are those that the processor's kernels make of the file.

    Raises KernelsUnavailable where these cannot be compiled.
    """
    model = load(folder) if weights == "auto" else load_on_kernels(folder, form=WeightForm(None, weights))
    return forced_logits(EngineHarness(model, blocks=16).forward, blocks)


def run(engine: CardHarness, between: Callable[[int], None] = lambda step: None) -> list[list[int]]:
    """Outputs of all sequences in the order in which they were submitted."""
    outputs = engine.run(between)
    return [outputs.get(number, []) for number in range(1, engine.ids + 1)]
