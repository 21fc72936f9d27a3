"""Weights, activations and keys and values in every format: how far logits are from transformers in float32.

Teacher-forced: a prompt in chunks, then tokens one by one, each compared with one pass over all of them. Weights that
are quantised are compared with the processor's kernels, which keep the same codes (and equal transformers over those).
Bounds are of the largest difference, in units of the logits' standard deviation; measured are about half of them.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from edgekv.core.capacity import DtypeName
from edgekv.core.kv_format import KVFormatName
from edgekv.core.sampling import SamplingParams
from edgekv.core.sequence import Sequence, SequenceSpec
from edgekv.core.step import Chunk, StepPlan
from edgekv.model.matrix_layout import WeightForm, WeightsName
from tests.card.engine import CardHarness, card_model
from tests.card.host_card import HostCard
from tests.model.engine_harness import EngineHarness, load_on_kernels

Tiny = Callable[[str], Path]

PROMPT = torch.randint(3, 190, (44,), generator=torch.Generator().manual_seed(5)).tolist()
CHUNKS = (23, 40)  # ends of the prompt's first two chunks; what follows comes token by token

BOUNDS: list[tuple[str, DtypeName, KVFormatName, WeightsName, float]] = [
    ("llama", "float32", "float32", "auto", 1e-5),
    ("gemma3", "float32", "float32", "auto", 1e-5),
    ("llama", "float32", "int8", "auto", 0.06),
    ("llama", "bfloat16", "bfloat16", "auto", 0.08),
    ("gemma2", "bfloat16", "bfloat16", "auto", 0.1),
    ("llama", "float16", "float32", "auto", 0.02),
    ("qwen3", "float16", "float16", "auto", 0.01),
    ("qwen2", "float16", "fp8", "auto", 0.2),
    ("llama3", "bfloat16", "int8", "auto", 0.1),
    ("mistral", "bfloat16", "int4", "auto", 1.2),
    ("llama", "bfloat16", "bfloat16", "int8", 0.12),
    ("gemma3", "bfloat16", "bfloat16", "int4", 0.3),
    ("qwen3", "float16", "float16", "int4", 0.1),
]


def forced_logits(forward: Callable[[StepPlan], Tensor], blocks: tuple[int, ...]) -> Tensor:
    """Logits of the last token of each chunk, and of each token after them."""
    sequence = Sequence.from_spec(SequenceSpec(0, tuple(PROMPT), SamplingParams(max_tokens=1)), 0)
    rows, start = [], 0
    for end in (*CHUNKS, *range(CHUNKS[-1] + 1, len(PROMPT) + 1)):
        chunk = Chunk(sequence, start, tuple(PROMPT[start:end]), blocks[: -(-end // 16)], samples=True)
        rows.append(forward(StepPlan((), (chunk,))).clone())
        start = end
    return torch.cat(rows)


def wanted_logits(folder: Path, weights: WeightsName) -> Tensor:
    if weights != "auto":
        harness = EngineHarness(load_on_kernels(folder, form=WeightForm(None, weights)), blocks=8)
        return forced_logits(harness.forward, (0, 1, 2))
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([PROMPT])).logits[0]
    return logits[[CHUNKS[0] - 1, *range(CHUNKS[1] - 1, len(PROMPT))]]


@pytest.mark.parametrize(("arch", "dtype", "kv_format", "weights", "bound"), BOUNDS)
def test_logits_are_within_their_bound(
    arch: str, dtype: DtypeName, kv_format: KVFormatName, weights: WeightsName, bound: float, tiny: Tiny
) -> None:
    card = HostCard()
    model = card_model(tiny(arch), card, dtype=dtype, weights=weights)
    engine = CardHarness(model, card, kv_format=kv_format, blocks=16)
    engine.memory.poison(engine.block_ids())
    got = forced_logits(engine.runner.forward, tuple(engine.block_ids()[1:8:2]))
    want = wanted_logits(tiny(arch), weights)
    error = float((got - want).abs().max() / want.std())
    print(f"{arch} {dtype} KV {kv_format} weights {weights}: {error:.2g} of {bound}")
    assert error <= bound
    if dtype == "float32" and kv_format == "float32":
        assert torch.equal(got.argmax(1), want.argmax(1))
