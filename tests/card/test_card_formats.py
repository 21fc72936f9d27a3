"""Weights, activations and keys and values in every format: how far logits are from transformers in float32.

Teacher-forced: a prompt in chunks, then tokens one by one, or several at once as proposals are verified, each compared
with one pass over all of them. Weights that are quantised are compared with the processor's kernels, which keep the
same codes (and equal transformers over those). Bounds are of the largest difference, in units of the logits' standard
deviation; measured are about half of them.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from edgekv.core.dtype_choice import DtypeName
from edgekv.core.kv_format import KVFormatName
from edgekv.core.sampling import SamplingParams
from edgekv.core.scheduler import Limits
from edgekv.core.sequence import Sequence, SequenceSpec
from edgekv.core.step import Chunk, StepPlan
from edgekv.engine.card_inputs import lay_out
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
        chunk = Chunk(sequence, start, tuple(PROMPT[start:end]), blocks[: -(-end // 16)], sampled=1)
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


OTHER = PROMPT[:3:-1]
# Of the prompt: rows that are verified in each step, and how many tokens of another prompt come with them.
VERIFIED = ((2, 1), (5, 24), (7, 0), (7, 14))


def verified_logits(forward: Callable[[StepPlan], Tensor], blocks: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Logits of the prompt's last tokens, several in each step, and of the other prompt's last token."""
    spec = SequenceSpec(0, tuple(PROMPT), SamplingParams(max_tokens=1))
    one, other = (Sequence.from_spec(spec, arrival) for arrival in (0, 1))
    start, begin, rows = CHUNKS[0], 0, list[Tensor]()
    forward(StepPlan((), (Chunk(one, 0, tuple(PROMPT[:start]), blocks[:3], sampled=0),)))
    for verified, more in VERIFIED:
        chunks = [Chunk(one, start, tuple(PROMPT[start : start + verified]), blocks[:3], sampled=verified)]
        if more:
            last = int(begin + more == len(OTHER) - 1)
            chunks.append(Chunk(other, begin, tuple(OTHER[begin : begin + more]), blocks[3:6], sampled=last))
        rows.append(forward(StepPlan((), tuple(chunks))).clone())
        start, begin = start + verified, begin + more
    assert (start, begin) == (len(PROMPT), len(OTHER) - 1)
    logits = torch.cat(rows)
    return logits[:-1], logits[-1]


@pytest.mark.parametrize(("arch", "dtype", "kv_format", "weights", "bound"), [b for b in BOUNDS if b[3] == "auto"])
def test_logits_of_verified_rows_are_within_the_same_bound(
    arch: str, dtype: DtypeName, kv_format: KVFormatName, weights: WeightsName, bound: float, tiny: Tiny
) -> None:
    card = HostCard()
    limits = Limits(max_sequences=2, max_step_tokens=48, max_proposed=7)
    engine = CardHarness(card_model(tiny(arch), card, dtype=dtype), card, kv_format=kv_format, limits=limits, blocks=16)
    engine.memory.poison(engine.block_ids())
    got, got_other = verified_logits(engine.runner.forward, tuple(engine.block_ids()[1:13:2]))
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny(arch), dtype=torch.float32)
    with torch.no_grad():
        want, want_other = (model(torch.tensor([tokens])).logits[0] for tokens in (PROMPT, OTHER[:-1]))
    want = want[CHUNKS[0] :]
    error = float((got - want).abs().max() / want.std())
    error_of_other = float((got_other - want_other[-1]).abs().max() / want.std())
    print(f"{arch} {dtype} KV {kv_format}: {error:.2g} and {error_of_other:.2g} of {bound}")
    assert max(error, error_of_other) <= bound


def test_rows_that_are_verified_beside_a_prompt_are_decodes_and_the_prompt_is_none(tiny: Tiny) -> None:
    card = HostCard()
    limits = Limits(max_sequences=2, max_step_tokens=48, max_proposed=7)
    model = card_model(tiny("llama"), card, dtype="bfloat16")
    engine = CardHarness(model, card, kv_format="bfloat16", limits=limits, blocks=16)
    verified_logits(engine.runner.forward, tuple(engine.block_ids()))
    inputs = lay_out(engine.buffers.inputs, engine.buffers.limits)
    verified, prompt = VERIFIED[-1]
    assert inputs.contexts[: verified + 1].tolist() == [*range(len(PROMPT) - verified + 1, len(PROMPT) + 1), 0]
    assert sorted(inputs.lengths.tolist()) == [0, prompt]
    assert sorted(inputs.totals.tolist()) == [0, len(OTHER) - 1]
    assert inputs.samples[: verified + 1].tolist() == [*range(verified), verified + prompt - 1]
