"""The card's sampler: its tokens are those of the formula in float64, and that is what the CPU's sampler draws."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edgekv.core import rng
from edgekv.core.sampling import SamplingParams
from edgekv.engine.sample_row import SampleRow
from edgekv.engine.sampler import Sampler
from edgekv.kernels.fused import sample
from edgekv.kernels.fused.sample import SampleRoom
from edgekv.kernels.fused.sample_reference import Choice, edited, reference, uniform
from edgekv.kernels.fused.sample_rows import RowSettings, SampleRows, make_rows, pack_rows, rows_bytes
from tests.kernels.fibers.harness import in_all_orders, run_prepared

# What float32 may decide otherwise: sums that come nearer to an edge than this share of the mass.
SLACK = 1e-5
# Log-probabilities (relative, absolute): a logarithm to 2 units in the last place, of a sum of float32 powers.
LOGPROBS = (1e-6, 4e-6)
# Threads and candidates of the kernel: as on the card, and few, so that small vocabularies are too large for them.
USUAL, FEW = (1024, 2048), (64, 64)
MOST_LOGPROBS = 24
CPU = torch.device("cpu")


@dataclass
class Step:
    """Rows of logits with settings, and the table of counts before the step."""

    logits: Tensor
    rows: list[RowSettings]
    counts: Tensor | None = None
    shape: tuple[int, int] = FEW
    plant: dict[str, int] | None = None

    def run(self, seed: int = 0) -> tuple[SampleRoom, Tensor]:
        num_rows, vocab_size = self.logits.shape
        room = poisoned_room(num_rows, vocab_size)
        rows = written_rows(self.rows, vocab_size)
        counts = no_counts(vocab_size) if self.counts is None else self.counts.clone()
        threads, candidates = self.shape
        prepared = sample.prepare(self.logits, rows, room, counts, threads=threads, candidates=candidates)
        run_prepared(prepared, seed=seed, plant=self.plant)
        return room, counts

    def tokens(self, seed: int = 0) -> list[int]:
        tokens: list[int] = self.run(seed)[0].tokens.tolist()
        return tokens

    def check(self, seeds: Sequence[int] = (0, 1)) -> None:
        def launch(seed: int) -> list[Tensor]:
            room, counts = self.run(seed)
            return [room.tokens, room.faults, room.logprobs, room.top_ids, room.top_logprobs, counts]

        room = SampleRoom(torch.empty(0), torch.empty(0), *(answers := in_all_orders(launch, seeds))[:5])
        choices = reference(self.logits, self.rows, self.counts)
        for index, choice in enumerate(choices):
            self._check_row(room, index, choice)
        if self.counts is not None:
            assert torch.equal(answers[5], self._counted(room))

    def _check_row(self, room: SampleRoom, index: int, choice: Choice | None) -> None:
        row, logits = self.rows[index], self.logits[index]
        assert room.faults[index] == (choice is None)
        if choice is None:
            assert room.tokens[index] == 0
            return
        token = int(room.tokens[index])
        assert token == choice.token_id or choice.slack < SLACK, (token, choice)
        if row.logprobs is None:
            assert room.logprobs[index].isnan()
            return
        logprobs = logits.double().log_softmax(-1)
        assert float(room.logprobs[index]) == pytest.approx(float(logprobs[token]), rel=LOGPROBS[0], abs=LOGPROBS[1])
        ids = room.top_ids[index].tolist()
        assert ids == [other for other, _ in choice.top] + [-1] * (MOST_LOGPROBS - len(choice.top))
        for found, (_, wanted) in zip(room.top_logprobs[index].tolist(), choice.top, strict=False):
            assert found == pytest.approx(wanted, rel=LOGPROBS[0], abs=LOGPROBS[1])

    def _counted(self, room: SampleRoom) -> Tensor:
        assert self.counts is not None
        counted = self.counts.clone()
        for index, row in enumerate(self.rows):
            if row.is_penalised and row.counts_row is not None and not room.faults[index]:
                place = (row.counts_row, int(room.tokens[index]))
                if counted[place] & sample.MOST_COUNTED < sample.MOST_COUNTED:
                    counted[place] += 1
        return counted


def poisoned_room(num_rows: int, vocab_size: int) -> SampleRoom:
    room = sample.make_room(num_rows, vocab_size, MOST_LOGPROBS, CPU)
    for part in (room.scores, room.logprobs, room.top_logprobs):
        part.fill_(torch.nan)
    for part in (room.bests, room.tokens, room.faults, room.top_ids):
        part.fill_(-7)
    return room


def written_rows(settings: Sequence[RowSettings], vocab_size: int) -> SampleRows:
    """With room for one edit more than there are, which is nobody's."""
    packed = pack_rows(settings, vocab_size)
    rows = make_rows(len(settings), packed.edit_ids.shape[1] + 1, CPU)
    rows.edit_values.fill_(torch.nan)
    rows.write(packed)
    return rows


def no_counts(vocab_size: int) -> Tensor:
    return sample.make_counts(0, vocab_size, CPU)


def logits_of(kind: str, rows: int, vocab_size: int, seed: int) -> Tensor:
    normal = torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed))
    match kind:
        case "model":  # a few stand out of many
            return normal * 2 + (normal > 2.2) * 6
        case "flat":
            return normal * 0.01
        case "peaked":
            return normal * 30
        case "equals":  # as a matrix in bfloat16 leaves them
            return (normal * 3).round() / 2
        case _:  # "impossible": most tokens are
            return torch.where(normal > 0.5, normal * 4, -math.inf).index_fill_(1, torch.tensor([0]), 0.0)


@st.composite
def settings_of_rows(draw: st.DrawFn, vocab_size: int, counts_row: int) -> RowSettings:
    ids = st.integers(0, vocab_size - 1)
    values = st.floats(-5, 5, width=16) | st.just(-math.inf)
    penalised = draw(st.booleans())
    return RowSettings(
        seed=draw(st.integers(0, 2**64 - 1)),
        counter=draw(st.integers(0, 10_000)),
        temperature=draw(st.sampled_from([0.0, 0.3, 0.7, 1.0, 1.0, 2.0])),
        top_k=draw(st.none() | st.sampled_from([1, 2, 40, 63, 64, 65, 500, 10**9])),
        top_p=draw(st.sampled_from([1.0, 0.95, 0.9, 0.5, 0.999, 1e-9])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.05, 0.3])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.1, 0.7])) if penalised else 1.0,
        presence_penalty=draw(st.sampled_from([0.0, 0.5, -1.0])) if penalised else 0.0,
        frequency_penalty=draw(st.sampled_from([0.0, 0.25])) if penalised else 0.0,
        edits=draw(st.just(()) | st.lists(st.tuples(ids, values), max_size=5)),
        banned=draw(st.just(()) | st.lists(ids, max_size=3)),
        min_tokens=draw(st.sampled_from([0, 5, 20_000])),
        counts_row=counts_row,
        logprobs=draw(st.none() | st.sampled_from([0, 1, 5, 20])),
    )


def some_counts(rows: int, vocab_size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    table = sample.make_counts(rows, vocab_size, CPU)
    for row in table:
        prompt, output = (torch.randint(0, vocab_size, (most,), generator=generator).tolist() for most in (60, 90))
        sample.fill_counts(row, prompt, [*output, *output[:30], *output[:10]])
    return table


KINDS = ("model", "flat", "peaked", "equals", "impossible")


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25)
@given(data=st.data(), vocab_size=st.sampled_from([1, 31, 32, 100, 1000, 2048, 2500, 4100]), seed=st.integers(0, 2**31))
def test_any_rows_are_sampled_as_the_formula_says(
    kind: str, data: st.DataObject, vocab_size: int, seed: int
) -> None:
    rows = data.draw(st.integers(1, 3))
    own = [data.draw(settings_of_rows(vocab_size, index)) for index in reversed(range(rows))]
    Step(logits_of(kind, rows, vocab_size, seed), own, some_counts(rows, vocab_size, seed)).check((0, seed | 1))


@pytest.mark.parametrize("kind", KINDS)
def test_as_many_threads_as_on_the_card(kind: str) -> None:
    rows = [
        RowSettings(5, 1, logprobs=20),
        RowSettings(6, 2, temperature=0.8, top_p=0.95, logprobs=3),
        RowSettings(7, 3, top_k=40, min_p=0.01),
        RowSettings(8, 4, temperature=3.0, top_p=0.9999),
    ]
    Step(logits_of(kind, 4, 6000, 11), rows, shape=USUAL).check((0, 3))


def oracle_row(row: RowSettings, vocab_size: int, prompt: Sequence[int], output: Sequence[int]) -> SampleRow:
    """The same for the CPU's sampler, whose counter is the length of its output."""
    params = SamplingParams(
        max_tokens=1,
        seed=row.seed,
        temperature=row.temperature,
        top_k=row.top_k,
        top_p=row.top_p,
        min_p=row.min_p,
        repetition_penalty=row.repetition_penalty,
        presence_penalty=row.presence_penalty,
        frequency_penalty=row.frequency_penalty,
        logit_bias=tuple(row.edits),
        logprobs=row.logprobs,
        min_tokens=row.min_tokens,
        stop_token_ids=frozenset(row.banned),
    )
    return SampleRow(params, [*prompt, *output], len(prompt))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(data=st.data(), vocab_size=st.sampled_from([32, 1000, 2500]), seed=st.integers(0, 2**31))
def test_the_formula_is_the_cpus_sampler(kind: str, data: st.DataObject, vocab_size: int, seed: int) -> None:
    tokens = st.lists(st.integers(0, vocab_size - 1), max_size=50)
    prompt, output = data.draw(tokens), data.draw(tokens)
    row = replace(data.draw(settings_of_rows(vocab_size, 0)), counter=len(output))
    edits, banned = [(token_id, value) for token_id, value in row.edits if token_id], [*filter(None, row.banned)]
    row = replace(row, edits=edits, banned=banned)  # some token is possible
    logits, counts = logits_of(kind, 1, vocab_size, seed), sample.make_counts(1, vocab_size, CPU)
    sample.fill_counts(counts[0], prompt, output)
    (choice,) = reference(logits, [row], counts)
    (wanted,) = Sampler(vocab_size, "cpu").sample(logits, [oracle_row(row, vocab_size, prompt, output)])
    assert choice is not None
    assert choice.token_id == wanted.token_id or choice.slack < SLACK
    if row.logprobs is not None:
        assert [other for other, _ in choice.top] == [other for other, _ in wanted.top_logprobs]


@given(seed=st.integers(0, 2**64 - 1), counter=st.integers(0, 2**32))
def test_random_numbers_are_the_cpus(seed: int, counter: int) -> None:
    assert uniform(seed, counter) == rng.uniform(seed, counter)


def test_a_row_draws_the_same_whoever_is_beside_it_and_however_many_threads_there_are() -> None:
    logits = logits_of("model", 12, 3000, 2)
    rows = [
        RowSettings(i, 9, temperature=1 + i / 10, top_p=(1.0, 0.9, 0.99)[i % 3], top_k=(None, 50)[i % 2])
        for i in range(12)
    ]
    together = Step(logits, rows).tokens()
    assert len(set(together)) > 1
    for index, row in enumerate(rows):
        for shape in (FEW, (64, 2048), (512, 512), USUAL):
            assert Step(logits[index : index + 1], [row], shape=shape).tokens(index) == [together[index]]


def test_the_draws_of_many_seeds_have_the_rows_distribution() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.5, 1.5, -math.inf, 2.0, 0.0, 1.0]]).repeat(400, 1)
    for row in (RowSettings(), RowSettings(top_p=0.8), RowSettings(top_k=3, temperature=0.5)):
        tokens = torch.tensor(Step(logits, [replace(row, seed=seed) for seed in range(400)]).tokens())
        counts = torch.bincount(tokens, minlength=8).double()
        weights = (logits[0].double() / row.temperature).softmax(0)
        order = weights.sort(descending=True, stable=True).indices
        kept = int((weights[order].cumsum(0) < row.top_p - 1e-12).sum()) + 1 if row.top_p < 1 else row.top_k or 8
        share = torch.zeros(8, dtype=torch.double).index_copy_(0, order[:kept], weights[order[:kept]])
        expected = share / share.sum() * 400
        assert not counts[expected == 0].any()
        assert (((counts - expected) ** 2 / expected.clamp(min=1e-9))[expected > 0]).sum() < 25  # chi square, 7 degrees


@pytest.mark.parametrize(("top_p", "kept"), [(0.1, 1), (0.3, 3), (0.5, 5), (0.7, 7), (0.7001, 8), (0.9999, 10)])
def test_top_p_of_equals_keeps_as_many_as_have_the_share(top_p: float, kept: int) -> None:
    logits = torch.full((200, 10), 3.0)
    tokens = Step(logits, [RowSettings(seed, 0, top_p=top_p) for seed in range(200)]).tokens()
    assert set(tokens) == set(range(kept))


@pytest.mark.parametrize("top_k", [1, 63, 64, 65, 130, 1999])
@pytest.mark.parametrize("vocab_size", [2000])
def test_top_k_of_equals_keeps_the_lowest_ids(top_k: int, vocab_size: int) -> None:
    # More equals than can be sorted: the last of them is looked for by its id.
    logits = torch.zeros(60, vocab_size)
    logits[:, 100] = 0.25
    tokens = Step(logits, [RowSettings(seed, 0, top_k=top_k, logprobs=20) for seed in range(60)])
    tokens.check()
    allowed = {100, *[token for token in range(vocab_size) if token != 100][: top_k - 1]}
    assert set(tokens.tokens()) <= allowed


def test_a_row_without_a_best_token_is_a_fault_and_no_other_row_is() -> None:
    logits = logits_of("model", 6, 2100, 4)
    logits[0, 7], logits[1, 2050], logits[2] = torch.nan, math.inf, -math.inf
    rows = [RowSettings(seed, 0, logprobs=2, edits=[(7, 1.0)] if seed else []) for seed in range(6)]
    rows[4] = replace(rows[4], edits=[(token_id, -math.inf) for token_id in range(2100)])
    Step(logits, rows).check()
    assert Step(logits, rows).run()[0].faults.tolist() == [1, 1, 1, 0, 1, 0]


def test_more_logprobs_than_there_is_room_for_are_left_out() -> None:
    logits = logits_of("flat", 1, 1000, 12)
    room, _ = Step(logits, [RowSettings(logprobs=100)]).run()
    (choice,) = reference(logits, [RowSettings(logprobs=MOST_LOGPROBS)])
    assert choice is not None
    assert room.top_ids[0].tolist() == [token for token, _ in choice.top]


def test_rows_of_a_wider_matrix_are_left_as_they_are() -> None:
    wide = torch.full((3, 1100), torch.nan)
    wide[:, :1000] = logits_of("model", 3, 1000, 9)
    before = wide.clone()
    step = Step(wide[:, :1000], [RowSettings(seed, 0, edits=[(1, 2.0), (1, 1.0)], logprobs=1) for seed in range(3)])
    step.check()
    assert torch.equal(wide.nan_to_num(), before.nan_to_num())


def test_edits_and_penalties_come_in_their_order() -> None:
    logits = logits_of("model", 1, 2500, 3)
    counts = some_counts(1, 2500, 8)
    row = RowSettings(
        0, 0, temperature=0.0, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2, counts_row=0,
        edits=[(5, -math.inf), (2499, 1.5), (2048, -30.0)],
    )  # fmt: skip
    row = replace(row, banned=[5, 7, 2499], min_tokens=1)
    room, _ = Step(logits, [row], counts).run()
    torch.testing.assert_close(room.scores[0], edited(logits[0], row, counts), rtol=1e-6, atol=1e-6)


def test_what_is_drawn_is_counted_up_to_what_a_count_can_be() -> None:
    counts = sample.make_counts(2, 40, CPU)
    counts[1, 3], counts[1, 4] = sample.MOST_COUNTED, -1  # 0xffff: as often, and in the prompt
    logits = torch.zeros(2, 40)
    logits[0, 3], logits[1, 4] = 10.0, 10.0
    rows = [RowSettings(temperature=0.0, presence_penalty=0.1, counts_row=1)] * 2
    _, after = Step(logits, rows, counts).run()
    assert torch.equal(after, counts)
    _, after = Step(logits[:1], [replace(rows[0], counts_row=0)], counts).run()
    assert after[0].nonzero().tolist() == [[3]]


def test_counts_are_of_the_output_and_mark_the_prompt() -> None:
    row = sample.make_counts(1, 10, CPU)[0]
    sample.fill_counts(row, [1, 1, 2], [2, 5, 5])
    assert [count & 0xFFFF for count in row.tolist()] == [0, 0x8000, 0x8001, 0, 0, 2, 0, 0, 0, 0]
    sample.fill_counts(row, [], [])
    assert not row.any()


@pytest.mark.parametrize(
    "row",
    [RowSettings(3, 1, top_p=0.9), RowSettings(3, 1, edits=[(9, 400.0)], temperature=0.0)],
    ids=["draw", "edit"],
)
def test_a_planted_fault_is_found(row: RowSettings) -> None:
    step = Step(logits_of("model", 1, 2500, 6), [row], shape=(512, 512))
    step.check()
    with pytest.raises(AssertionError):
        replace(step, plant={"EK_PLANT_BARRIER": 1}).check((0, 1, 2, 3, 4, 5))


def test_steps_go_on_by_themselves() -> None:
    """Settings are written once, and the same two launches are every step."""
    vocab_size = 300
    beginning = [
        RowSettings(3, 7, temperature=0.9, top_p=0.95, logprobs=2, edits=[(20, 1.0), (5, 0.5)]),
        RowSettings(4, 0, temperature=0.0, presence_penalty=2.0, repetition_penalty=1.2, counts_row=1),
        RowSettings(5, 2, temperature=0.0, banned=[17, 20], min_tokens=4),
        RowSettings(6, 0, frequency_penalty=1.0, counts_row=0, banned=[1], min_tokens=2),
    ]
    logits = torch.empty(5, vocab_size)  # the last row is nobody's
    rows, room, counts = make_rows(5, 8, CPU), poisoned_room(5, vocab_size), some_counts(2, vocab_size, 3)
    prepared = sample.prepare(logits, rows, room, counts, threads=64, candidates=64)
    rows.write(pack_rows(beginning, vocab_size))
    tokens = []
    for step in range(5):
        logits.copy_(logits_of("model", 5, vocab_size, 5))
        logits[2, 17], logits[2, 20] = 19.5, 20.0  # what may not come yet
        if step == 1:
            logits[0, 9] = torch.nan
        known = [replace(row, counter=row.counter + step) for row in beginning]
        alone = Step(logits[:4].clone(), known, counts.clone())
        alone.check()
        run_prepared(prepared, seed=step)
        assert room.tokens[:4].tolist() == alone.tokens()
        assert torch.equal(counts, alone.run()[1])
        assert room.tokens[4] == logits[4].argmax()
        tokens.append(room.tokens.tolist())
    allowed = int(logits[2].index_fill(0, torch.tensor([17, 20]), -math.inf).argmax())
    assert [row[2] for row in tokens] == [allowed, allowed, 20, 20, 20]
    assert len({row[1] for row in tokens}) > 1


def test_a_row_that_begins_leaves_the_others_alone() -> None:
    logits, vocab_size = logits_of("model", 1, 300, 8), 300
    rows, room, counts = make_rows(4, 3, CPU), poisoned_room(4, vocab_size), no_counts(vocab_size)
    all_rows = [RowSettings(seed, 10 * seed, edits=[(seed, 1.0)], logprobs=1) for seed in range(4)]
    rows.write(pack_rows(all_rows, vocab_size))
    new = RowSettings(77, 0, edits=[(8, -math.inf), (9, 30.0)], banned=[10], min_tokens=1, logprobs=3)
    rows.write(pack_rows([new], vocab_size), 2)
    run_prepared(sample.prepare(logits, rows, room, counts, first_row=2, threads=64, candidates=64))
    (choice,) = reference(logits, [new])
    assert choice is not None
    assert room.tokens.tolist() == [-7, -7, choice.token_id, -7]
    assert room.faults.tolist() == [-7, -7, 0, -7]
    assert room.top_ids[2, :3].tolist() == [token for token, _ in choice.top]
    assert choice.token_id == 9
    others = [0, 1, 3]
    assert (room.top_ids[others] == -7).all()
    assert (room.bests[:, others] == -7).all()
    assert room.scores[others].isnan().all()
    assert room.top_logprobs[others].isnan().all()
    assert room.logprobs.isnan().tolist() == [True, True, False, True]
    rows.write(pack_rows([replace(new, counter=1)], vocab_size), 2)
    assert torch.equal(rows.settings[others], written_rows(all_rows, vocab_size).settings[others])


def test_what_is_launched_can_be_told_without_memory() -> None:
    meta = torch.device("meta")
    rows, room = make_rows(3, 5, meta), sample.make_room(3, 5000, 4, meta)
    prepared = sample.prepare(torch.empty(2, 5000, device=meta), rows, room, sample.make_counts(1, 5000, meta))
    assert [each.spec for each in prepared] == [sample.edit_spec(), sample.spec()]
    assert [each.grid for each in prepared] == [(3, 2, 1), (2, 1, 1)]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="penalties need"):
        pack_rows([RowSettings(presence_penalty=1.0)], 10)
    with pytest.raises(ValueError, match="more than"):
        sample.make_room(1, 10, 5000, CPU)
    rows, room, counts = make_rows(2, 1, CPU), poisoned_room(3, 10), no_counts(10)
    with pytest.raises(ValueError, match="float32"):
        sample.prepare(torch.zeros(1, 10, dtype=torch.float64), rows, room, counts)
    for logits, first_row in ((torch.zeros(3, 10), 0), (torch.zeros(1, 10), 2), (torch.zeros(1, 11), 0)):
        with pytest.raises(ValueError, match="have no room for logits"):
            sample.prepare(logits, rows, room, counts, first_row=first_row)
    with pytest.raises(ValueError, match="counts no vocabulary of 10"):
        sample.prepare(torch.zeros(1, 10), rows, room, no_counts(11))
    for settings_, first_row in (
        ([RowSettings()] * 3, 0),
        ([RowSettings()], 2),
        ([RowSettings(edits=[(1, 1.0)], banned=[2], min_tokens=1)], 0),
    ):
        with pytest.raises(ValueError, match="do not fit in 2 rows with 1 edits each"):
            rows.write(pack_rows(settings_, 10), first_row)


def test_room_is_as_large_as_is_said() -> None:
    room = sample.make_room(3, 5000, 20, CPU)
    parts = (room.scores, room.bests, room.tokens, room.faults, room.logprobs, room.top_ids, room.top_logprobs)
    assert sum(part.numel() * part.itemsize for part in parts) == sample.room_bytes(3, 5000, 20)
    rows = make_rows(3, 40, CPU)
    parts = (rows.settings, rows.edit_ids, rows.edit_values)
    assert sum(part.numel() * part.itemsize for part in parts) == rows_bytes(3, 40)
