"""Steps begun one behind the other, each on what the one before samples, and read only at the end: how a draft runs."""

from collections.abc import Callable
from pathlib import Path

import pytest

from edgekv.core.sampling import SamplingParams
from edgekv.core.scheduler import Limits
from edgekv.core.sequence import Sequence, SequenceSpec
from edgekv.core.step import UNKNOWN, Chunk, StepPlan
from edgekv.engine.card_runner import CardStep
from edgekv.engine.sample_row import sample_rows
from tests.card.engine import CardHarness, card_model
from tests.card.host_card import HostCard
from tests.card.test_card_engine import SAMPLING, prompts

Tiny = Callable[[str], Path]
PROMPTS = prompts(30, 5, 9, 7, 12)
OPTIONS = [SAMPLING[name] for name in ("seeded", "top-k", "least", "logprobs")]
OPTIONS[2] = {**OPTIONS[2], "min_tokens": 20}  # no step of a chain knows of an end


def begin_chain(engine: CardHarness, counts: list[int]) -> list[tuple[StepPlan, CardStep]]:
    """As many steps for each sequence as `counts` says: the first of them reads its prompt."""
    ids, sequences = engine.block_ids(), list[Sequence]()
    for number, (prompt, sampling) in enumerate(zip(PROMPTS, OPTIONS, strict=True)):
        params = SamplingParams(max(counts), **({"temperature": 0.0} | sampling))  # type: ignore[arg-type]
        sequences.append(Sequence.from_spec(SequenceSpec(number, tuple(prompt), params), arrival=number))
        sequences[-1].block_table = ids[2 * number : 2 * number + 2]
    begun: list[tuple[StepPlan, CardStep]] = []
    for step in range(max(counts)):
        chunks = []
        for sequence, count in zip(sequences, counts, strict=True):
            start, tokens = (len(sequence.tokens) + step - 1, (UNKNOWN,)) if step else (0, sequence.spec.prompt)
            if step < count:
                chunks.append(Chunk(sequence, start, tokens, tuple(sequence.block_table), sampled=1))
        plan = StepPlan((), tuple(chunks))
        begun.append((plan, engine.runner.begin(plan, sample_rows(plan), begun[-1][1] if begun else None)))
    return begun


@pytest.mark.parametrize("k", [1, 5, 16])
def test_a_chain_of_steps_that_nobody_reads_says_what_steps_one_by_one_say(k: int, tiny: Tiny) -> None:
    card = HostCard()
    model = card_model(tiny("llama"), card)
    counts = [k, (k + 1) // 2, k, 1]  # some leave the chain before others
    plain = CardHarness(model, card)
    for prompt, count, sampling in zip(PROMPTS, counts, OPTIONS, strict=True):
        plain.submit(prompt, count, **sampling)
    plain.run()
    said: dict[int, list[int]] = {number: [] for number in range(4)}
    for plan, pending in begin_chain(CardHarness(model, card, in_flight=k), counts):
        for chunk, sampled in zip(plan.chunks, pending.result(), strict=True):
            said[chunk.sequence.id].append(sampled.token_id)
    assert [said[number] for number in range(4)] == [plain.outputs[number] for number in range(1, 5)]


def test_behind_a_token_that_nobody_has_read_may_come_proposals(tiny: Tiny) -> None:
    card = HostCard()
    model = card_model(tiny("llama"), card)
    plain = CardHarness(model, card)
    plain.submit(PROMPTS[0], 3, **OPTIONS[0])
    first, second, third = plain.run()[1]
    engine = CardHarness(model, card, limits=Limits(max_sequences=4, max_step_tokens=48, max_proposed=4))
    [(plan, begun)] = begin_chain(engine, [1, 0, 0, 0])
    own = plan.chunks[0].sequence
    behind = StepPlan((), (Chunk(own, 5, (UNKNOWN, second), tuple(own.block_table), sampled=2),))
    pending = engine.runner.begin(behind, sample_rows(behind), begun)
    assert [each.token_id for each in begun.result() + pending.result()] == [first, second, third]


def test_what_a_step_chose_is_never_taken_for_another_steps(tiny: Tiny) -> None:
    card = HostCard()
    engine = CardHarness(card_model(tiny("llama"), card), card, in_flight=1, graphs=False)
    steps = [pending for _, pending in begin_chain(engine, [3, 1, 1, 1])]
    assert [len(pending.result()) for pending in steps[1:]] == [1, 1]
    with pytest.raises(AssertionError, match="more steps were begun behind it than may be in flight"):
        steps[0].result()
