"""The whole engine of a card, its kernels on fibers: the same tokens as transformers, whatever happens meanwhile."""

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from edgekv.core.sampling import SamplingParams
from edgekv.core.sequence import FinishReason, SequenceSpec
from edgekv.core.step import Sampled
from edgekv.engine import card_pool
from edgekv.engine.driver import DeviceLost
from edgekv.kernels.rt.device_error import DeviceLost as RuntimeDeviceLost
from edgekv.kernels.rt.device_error import OutOfDeviceMemory
from edgekv.kernels.rt.registry import KernelSpec
from tests.card.engine import CardHarness, card_model
from tests.card.host_card import HostCard
from tests.model.engine_harness import EngineHarness, load
from tests.model.tiny_models import ARCHITECTURES

Tiny = Callable[[str], Path]


def prompts(seed: int, *lengths: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 190) for _ in range(length)] for length in lengths]


def greedy(folder: Path, prompt: list[int], count: int) -> list[int]:
    """What transformers continues a prompt with, from one pass over all of it for each token."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_greedy_tokens_equal_transformers(arch: str, tiny: Tiny) -> None:
    card, own = HostCard(), prompts(1, 40, 7, 61)
    engine = CardHarness(card_model(tiny(arch), card), card)
    numbers = [engine.submit(prompt, 6) for prompt in own]
    engine.run()
    for number, prompt in zip(numbers, own, strict=True):
        assert engine.outputs[number] == greedy(tiny(arch), prompt, 6)
    assert engine.core.stats().ahead_steps > 0, "no step was begun ahead of the one before"
    assert engine.runner.graphs.sizes == (1, 2, 4)


# What torch says of a card that is full, depending on who finds out.
TOLD = itertools.cycle(
    (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    )
)

SAMPLING: dict[str, dict[str, object]] = {
    "seeded": {"temperature": 0.9, "seed": 7},
    "top-k": {"temperature": 1.1, "seed": 8, "top_k": 5},
    "top-p": {"temperature": 1.3, "seed": 9, "top_p": 0.7, "min_p": 0.02},
    "penalties": {"temperature": 0.8, "seed": 10, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
    "greedy penalties": {"presence_penalty": 1.5, "repetition_penalty": 1.7},
    "bias": {"logit_bias": ((5, 4.0), (17, -3.0)), "temperature": 0.7, "seed": 11},
    "least": {"min_tokens": 6, "stop_token_ids": frozenset(range(3, 120))},
    "logprobs": {"temperature": 0.5, "seed": 12, "logprobs": 4},
}


def reference_engine(folder: Path) -> EngineHarness:
    return EngineHarness(load(folder))


def test_every_way_of_sampling_equals_the_processors(tiny: Tiny) -> None:
    card, own = HostCard(), prompts(2, *(9 + 3 * i for i in range(len(SAMPLING))))
    engine, reference = CardHarness(card_model(tiny("llama"), card), card), reference_engine(tiny("llama"))
    for prompt, sampling in zip(own, SAMPLING.values(), strict=True):
        params = SamplingParams(12, **({"temperature": 0.0} | sampling))  # type: ignore[arg-type]
        engine.submit(prompt, 12, **sampling)
        reference.core.submit(SequenceSpec(engine.ids, tuple(prompt), params))
    engine.run()
    wanted: dict[int, list[Sampled]] = {}
    while reference.core.busy:
        for token in reference.core.step().tokens:
            wanted.setdefault(token.sequence_id, []).append(token.sampled)
    for number, name in enumerate(SAMPLING, 1):
        assert [each.token_id for each in engine.sampled[number]] == [t.token_id for t in wanted[number]], name
    logged = 1 + list(SAMPLING).index("logprobs")
    for got, want in zip(engine.sampled[logged], wanted[logged], strict=True):
        assert got.logprob == pytest.approx(want.logprob, abs=1e-4)
        assert [token for token, _ in got.top_logprobs] == [token for token, _ in want.top_logprobs]
        assert [x for _, x in got.top_logprobs] == pytest.approx([x for _, x in want.top_logprobs], abs=1e-4)


def test_a_row_that_is_nobodys_counts_nothing(tiny: Tiny) -> None:
    card = HostCard()
    engine = CardHarness(card_model(tiny("llama"), card), card)
    for prompt, count in zip(prompts(14, 9, 12, 15), (3, 12, 12), strict=True):
        engine.submit(prompt, count)
    # The last row of four, and then the third of three: what was its row is only padding.
    counted = engine.submit(prompts(15, 11)[0], 12, frequency_penalty=0.3)
    engine.run()
    table = engine.buffers.view("counts", 4, 199, dtype=torch.int16)
    assert int((table & 0x7FFF).sum()) == len(engine.outputs[counted]) == 12


def test_a_sequence_has_the_same_tokens_alone_and_among_others(tiny: Tiny) -> None:
    own, alone = prompts(3, 30, 11, 45, 5, 19), []
    for prompt, sampling in zip(own, SAMPLING.values(), strict=False):
        card = HostCard()
        engine = CardHarness(card_model(tiny("qwen3"), card), card, graphs=False)
        engine.submit(prompt, 10, **sampling)
        alone.append(engine.run()[1])
    card = HostCard()
    engine = CardHarness(card_model(tiny("qwen3"), card), card)
    for prompt, sampling in zip(own, SAMPLING.values(), strict=False):
        engine.submit(prompt, 10, **sampling)
    assert [engine.run()[number] for number in range(1, 6)] == alone


def test_preempted_moved_and_shrunk_sequences_go_on_as_if_nothing_was(tiny: Tiny) -> None:
    own = prompts(4, 50, 33, 20, 41)
    card = HostCard()
    engine = CardHarness(card_model(tiny("llama"), card), card, blocks=16, segment_blocks=4)
    numbers = [engine.submit(prompt, 24, temperature=0.9, seed=prompt[0]) for prompt in own]
    size = engine.memory.block_bytes

    def squeeze(step: int) -> None:
        if step in (6, 17):
            engine.resize(shrink_bytes=8 * size)
        if step in (11, 23):
            engine.resize(grow_bytes=8 * size)

    engine.run(squeeze)
    assert engine.core.stats().preemptions > 0
    wide = HostCard()
    roomy = CardHarness(card_model(tiny("llama"), wide), wide)
    others = [roomy.submit(prompt, 24, temperature=0.9, seed=prompt[0]) for prompt in own]
    roomy.run()
    assert [engine.outputs[n] for n in numbers] == [roomy.outputs[n] for n in others]


def test_prefixes_are_shared_and_copied(tiny: Tiny) -> None:
    [prefix] = prompts(5, 40)
    tails = prompts(6, 9, 14)
    card = HostCard()
    engine = CardHarness(card_model(tiny("llama"), card), card)
    engine.submit(prefix + tails[0], 6)
    engine.run()
    second = engine.submit(prefix + tails[1], 6)
    engine.run()
    assert engine.core.stats().cached_prompt_tokens == 40, "two whole blocks and eight tokens of the third"
    assert engine.outputs[second] == greedy(tiny("llama"), prefix + tails[1], 6)


def test_what_was_begun_for_a_sequence_that_ended_is_dropped(tiny: Tiny) -> None:
    [first, second] = prompts(7, 12, 15)
    long = greedy(tiny("llama"), first, 10)
    card = HostCard()
    engine = CardHarness(card_model(tiny("llama"), card), card)
    stops = engine.submit(first, 10, stop_token_ids=frozenset((long[3],)))
    goes_on = engine.submit(second, 10)
    aborted = engine.submit(prompts(8, 20)[0], 10)
    engine.run(lambda step: engine.core.abort(aborted) if step == 4 else None)
    assert engine.outputs[stops] == long[: long.index(long[3]) + 1]
    assert engine.outputs[goes_on] == greedy(tiny("llama"), second, 10)
    assert engine.ended == {stops: FinishReason.STOP, goes_on: FinishReason.LENGTH}
    assert len(engine.outputs[aborted]) < 10


def test_logits_that_are_not_finite_end_their_own_sequence(tiny: Tiny) -> None:
    [healthy, sick] = prompts(9, 21, 18)
    seen = {*healthy, *greedy(tiny("llama"), healthy, 8)}
    poison = next(token for token in range(3, 190) if token not in seen)
    card = HostCard()
    model = card_model(tiny("llama"), card)
    table = model.operations[0].op.matrix
    assert table is not None
    assert table.parts[0].plain is not None
    table.parts[0].plain[poison] = torch.nan
    engine = CardHarness(model, card)
    sick = [*sick[:-1], poison]
    well, ill = engine.submit(healthy, 8), engine.submit(sick, 8)
    engine.run()
    assert engine.ended[ill] is FinishReason.ERROR
    assert engine.ended[well] is FinishReason.LENGTH
    assert ill not in engine.outputs


def test_running_out_of_memory_anywhere_in_a_step_loses_no_request(tiny: Tiny) -> None:
    """A launch or a call of torch in the first step, one after the other, and in later ones."""
    own = prompts(10, 25, 38)
    card = HostCard()
    model = card_model(tiny("llama"), card)
    wanted = [greedy(tiny("llama"), prompt, 3) for prompt in own]
    engine = CardHarness(model, card, graphs=False, prefix=False)
    left = 0

    def fail(spec: KernelSpec | None) -> BaseException | None:
        nonlocal left
        left -= 1
        if left != 0:
            return None
        if spec is None:
            return next(TOLD)
        return OutOfDeviceMemory("cuLaunchKernel", 2, "CUDA_ERROR_OUT_OF_MEMORY")

    card.fail_launch = fail
    for place in (*range(1, 60, 4), 70, 80, 90):
        left = place
        numbers = [engine.submit(prompt, 3) for prompt in own]
        engine.run()
        assert left <= 0, "nothing failed"
        assert [engine.outputs[number] for number in numbers] == wanted, place
    assert {engine.ended[number] for number in engine.ended} == {FinishReason.LENGTH}


def test_a_segment_that_the_device_has_no_memory_for_costs_nothing(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    card = HostCard()
    engine = CardHarness(card_model(tiny("llama"), card), card, blocks=16, segment_blocks=4)
    [prompt] = prompts(13, 30)
    number = engine.submit(prompt, 12)

    def squeeze(step: int) -> None:
        if step == 3:
            engine.resize(shrink_bytes=8 * engine.memory.block_bytes)
            monkeypatch.setattr(card_pool, "SegmentMemory", no_memory)
            engine.resize(grow_bytes=8 * engine.memory.block_bytes)
            memory = engine.core.stats().memory
            assert memory is not None
            assert "the device had them not" in str(memory.shortfall)

    def no_memory(*_: object, **__: object) -> NoReturn:
        raise torch.OutOfMemoryError("CUDA out of memory")

    engine.run(squeeze)
    assert engine.outputs[number] == greedy(tiny("llama"), prompt, 12)


def test_a_lost_device_is_told_as_such(tiny: Tiny) -> None:
    card = HostCard()
    engine = CardHarness(card_model(tiny("llama"), card), card, graphs=False)
    engine.submit(prompts(11, 10)[0], 3)
    card.fail_launch = lambda spec: RuntimeDeviceLost("cuLaunchKernel", 700, "CUDA_ERROR_ILLEGAL_ADDRESS")
    with pytest.raises(DeviceLost, match="ILLEGAL_ADDRESS"):
        engine.run()


def test_graphs_that_do_not_fit_are_done_without(tiny: Tiny) -> None:
    card = HostCard()
    card.graph_bytes = 1000
    engine = CardHarness(card_model(tiny("llama"), card), card, graphs=False)
    engine.runner.capture(2500)
    assert engine.runner.graphs.sizes == (2, 4)
    assert engine.runner.graphs.num_bytes == 2000
    [prompt] = prompts(12, 20)
    number = engine.submit(prompt, 5)
    engine.run()
    assert engine.outputs[number] == greedy(tiny("llama"), prompt, 5)


def test_no_memory_for_a_graph_is_no_failure(tiny: Tiny) -> None:
    card = HostCard()
    engine = CardHarness(card_model(tiny("llama"), card), card, graphs=False)
    card.fail_allocation = 0
    engine.runner.capture(1 << 40)
    assert engine.runner.graphs.sizes == ()
