"""The sampler on the card: its tokens are those of the formula in float64, at every step of a batch that goes on."""

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from edgekv.kernels.fused import sample
from edgekv.kernels.fused.sample import SampleRoom
from edgekv.kernels.fused.sample_reference import Choice, reference
from edgekv.kernels.fused.sample_rows import RowSettings, make_rows, pack_rows
from edgekv.kernels.rt.registry import KernelSpec
from tests.gpu import bounds
from tests.gpu.bed import Bed

MOST_LOGPROBS = 20
ROWS = [
    RowSettings(temperature=0.0, logprobs=5),
    RowSettings(5, 1, logprobs=20),
    RowSettings(6, 2, temperature=0.8, top_p=0.95, logprobs=3),
    RowSettings(7, 3, top_k=40, min_p=0.01),
    RowSettings(8, 4, temperature=3.0, top_p=0.9999),
    RowSettings(9, 5, top_k=3000, top_p=0.9),
    RowSettings(10, 6, temperature=0.7, repetition_penalty=1.2, frequency_penalty=0.3, counts_row=0),
    RowSettings(11, 7, temperature=0.0, presence_penalty=2.0, repetition_penalty=1.3, counts_row=1),
    RowSettings(12, 8, edits=[(5, 4.0), (17, -math.inf)], banned=[1, 2, 3], min_tokens=20),
]
KINDS = ("model", "flat", "peaked", "equals")


def specs(bed: Bed) -> Iterator[KernelSpec]:
    yield from sample.variants()


def logits_of(kind: str, rows: int, vocab_size: int, seed: int) -> Tensor:
    normal = torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed))
    match kind:
        case "model":  # a few stand out of many
            return normal * 2 + (normal > 2.2) * 6
        case "flat":
            return normal * 0.01
        case "peaked":
            return normal * 30
        case _:  # "equals": as a matrix in bfloat16 leaves them
            return (normal * 3).round() / 2


def assert_chosen(room: SampleRoom, index: int, choice: Choice | None, settings: RowSettings, logits: Tensor) -> None:
    assert choice is not None
    assert room.faults[index] == 0
    token = int(room.tokens[index])
    assert token == choice.token_id or choice.slack < bounds.SLACK, (settings, token, choice)
    if settings.logprobs is None:
        return
    relative, absolute = bounds.LOGPROBS
    own = float(logits.double().log_softmax(-1)[token])
    assert float(room.logprobs[index]) == pytest.approx(own, rel=relative, abs=absolute)
    ids = room.top_ids[index].tolist()
    assert ids == [other for other, _ in choice.top] + [-1] * (MOST_LOGPROBS - len(choice.top))
    for got, (_, wanted) in zip(room.top_logprobs[index].tolist(), choice.top, strict=False):
        assert got == pytest.approx(wanted, rel=relative, abs=absolute)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [0, 1, 2])
def test_steps_of_a_batch_are_sampled_as_the_formula_says(kind: str, size: int, bed: Bed) -> None:
    vocab_size = bed.sized(card=(1000, 32000, 128256), host=(300, 2049, 4100))[size]
    count, cpu = len(ROWS), torch.device("cpu")
    # The last row has no number to choose by.
    settings = [*ROWS, RowSettings()]
    rows = make_rows(count + 1, 8, bed.device)
    rows.write(pack_rows(settings, vocab_size))
    room = sample.make_room(count + 1, vocab_size, MOST_LOGPROBS, bed.device)
    counts = sample.make_counts(2, vocab_size, cpu)
    for number, row in enumerate(counts):
        sample.fill_counts(row, range(number, 90, 3), [5 * i % 97 for i in range(60)])
    own_counts = bed.put(counts)
    logits = torch.empty(count + 1, vocab_size, device=bed.device)
    prepared = sample.prepare(logits, rows, room, own_counts)
    for step in range(bed.sized(card=5, host=2)):
        numbers = logits_of(kind, count + 1, vocab_size, 7 * size + step)
        numbers[count, 3] = torch.nan
        logits.copy_(numbers)
        bed.run(prepared)
        answers = (room.tokens, room.faults, room.logprobs, room.top_ids, room.top_logprobs)
        told = SampleRoom(room.scores, room.bests, *(answer.cpu() for answer in answers))
        known = [replace(row, counter=row.counter + step) for row in ROWS]
        for index, choice in enumerate(reference(numbers[:count], known, counts)):
            assert_chosen(told, index, choice, known[index], numbers[index])
            if known[index].is_penalised:
                counts[known[index].counts_row, told.tokens[index]] += 1
        assert told.faults[count] == 1
        assert torch.equal(own_counts.cpu(), counts)


def test_the_draws_of_many_seeds_have_the_rows_distribution(bed: Bed) -> None:
    seeds = bed.sized(card=4000, host=300)
    logits = torch.tensor([[1.0, 2.0, 0.5, 1.5, -math.inf, 2.0, 0.0, 1.0]])
    rows, room = make_rows(seeds, 1, bed.device), sample.make_room(seeds, 8, 1, bed.device)
    rows.write(pack_rows([RowSettings(seed) for seed in range(seeds)], 8))
    own, counts = bed.put(logits.repeat(seeds, 1)), sample.make_counts(1, 8, bed.device)
    bed.run(sample.prepare(own, rows, room, counts))
    drawn = torch.bincount(room.tokens.cpu().long(), minlength=8).double()
    expected = logits[0].double().softmax(0) * seeds
    assert drawn[4] == 0
    chi_square = ((drawn - expected) ** 2 / expected.clamp(min=1e-9))[expected > 0].sum()
    assert chi_square < 25  # six degrees
