import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from edgekv.core.rng import uniform
from edgekv.core.sampling import SamplingParams
from edgekv.core.step import Sampled
from edgekv.engine.penalties import edit
from edgekv.engine.ranking import likeliest
from edgekv.engine.sampler import NonFiniteLogits, Sampler, SampleRow, check_params

INF = float("inf")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def params(**changes: object) -> SamplingParams:
    return replace(SamplingParams(max_tokens=100), **changes)  # type: ignore[arg-type]


def row(settings: SamplingParams, *, prompt: Sequence[int] = (), output: Sequence[int] = ()) -> SampleRow:
    return SampleRow(settings, [*prompt, *output], len(prompt))


def sample_one(logits: Sequence[float] | Tensor, sample_row: SampleRow) -> Sampled:
    tensor = torch.as_tensor(logits, dtype=torch.float32).unsqueeze(0)
    return Sampler(tensor.shape[1], "cpu").sample(tensor, [sample_row])[0]


# A slow reference in plain Python, written from the definitions.


def reference_scores(logits: Sequence[float], sample_row: SampleRow) -> list[float]:
    p, x = sample_row.params, list(logits)
    output = list(sample_row.tokens[sample_row.num_prompt :])
    for token_id, bias in p.logit_bias:
        x[token_id] += bias
    if len(output) < p.min_tokens:
        for token_id in p.stop_token_ids:
            x[token_id] = -INF
    for token_id in set(sample_row.tokens):
        x[token_id] = x[token_id] / p.repetition_penalty if x[token_id] > 0 else x[token_id] * p.repetition_penalty
    for token_id, count in Counter(output).items():
        x[token_id] -= p.frequency_penalty * count + p.presence_penalty
    return x


def reference_distribution(scores: Sequence[float], p: SamplingParams) -> list[tuple[int, float]]:
    """What is left after the filters, (id, share), likeliest first."""
    order = sorted(range(len(scores)), key=lambda token_id: (-scores[token_id], token_id))
    peak = scores[order[0]]
    left = [(token_id, math.exp((scores[token_id] - peak) / p.temperature)) for token_id in order]
    left = [(token_id, weight) for token_id, weight in left if weight > 0.0 and weight >= p.min_p]
    left = left[: p.top_k]
    total = math.fsum(weight for _, weight in left)
    nucleus: list[tuple[int, float]] = []
    while math.fsum(weight for _, weight in nucleus) < p.top_p * total and len(nucleus) < len(left):
        nucleus.append(left[len(nucleus)])
    kept = math.fsum(weight for _, weight in nucleus)
    return [(token_id, weight / kept) for token_id, weight in nucleus]


def chi_square_p(counts: Counter[int], distribution: list[tuple[int, float]], draws: int) -> float:
    assert set(counts) <= {token_id for token_id, _ in distribution}
    shares, rest = [], 0.0
    observed, rest_observed = [], 0
    for token_id, share in distribution:
        if share * draws >= 10:
            shares.append(share)
            observed.append(counts[token_id])
        else:
            rest, rest_observed = rest + share, rest_observed + counts[token_id]
    if rest * draws >= 1:
        shares.append(rest)
        observed.append(rest_observed)
    chi_square = sum((n - s * draws) ** 2 / (s * draws) for n, s in zip(observed, shares, strict=True))
    half = torch.tensor([(len(shares) - 1) / 2, chi_square / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


COMBINATIONS = {
    "plain": params(),
    "hot": params(temperature=1.7),
    "cold": params(temperature=0.4),
    "top-k": params(top_k=7),
    "top-p": params(top_p=0.8),
    "min-p": params(min_p=0.1),
    "top-k, top-p": params(top_k=12, top_p=0.7),
    "min-p, top-p, hot": params(min_p=0.05, top_p=0.9, temperature=1.5),
    "all": params(temperature=0.8, min_p=0.02, top_k=20, top_p=0.95),
    "penalties": params(repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=-0.2, logit_bias=((3, 1.5),)),
}
DRAWS = 20_000


def draw_many(p: SamplingParams, vocab_size: int = 40) -> tuple[Counter[int], list[tuple[int, float]]]:
    logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(5)) * 2.0
    rows = [row(replace(p, seed=seed), prompt=(1, 2, 2), output=(3, 3, 4)) for seed in range(DRAWS)]
    sampled = Sampler(vocab_size, "cpu").sample(logits.expand(DRAWS, vocab_size), rows)
    return (
        Counter(entry.token_id for entry in sampled),
        reference_distribution(reference_scores(logits.tolist(), rows[0]), p),
    )


@pytest.mark.parametrize("p", COMBINATIONS.values(), ids=COMBINATIONS)
def test_tokens_follow_the_exact_distribution(p: SamplingParams) -> None:
    assert chi_square_p(*draw_many(p), DRAWS) > 1e-3


def test_one_sequence_follows_the_exact_distribution() -> None:
    logits = torch.linspace(-2.0, 2.0, 12)
    rows = [SampleRow(params(seed=9), range(count), 0) for count in range(DRAWS)]
    sampled = Sampler(12, "cpu").sample(logits.expand(DRAWS, 12), rows)
    counts = Counter(entry.token_id for entry in sampled)
    assert chi_square_p(counts, reference_distribution(logits.tolist(), params()), DRAWS) > 1e-3


@pytest.mark.parametrize("name", ["plain", "top-p", "all"])
@pytest.mark.parametrize(
    "biased",
    [lambda seed, counter: uniform(seed, counter) ** 1.1, lambda seed, counter: uniform(seed, counter) * 0.97],
    ids=["bent", "never the last"],
)
def test_a_biased_draw_would_be_found(
    monkeypatch: pytest.MonkeyPatch, name: str, biased: Callable[[int, int], float]
) -> None:
    monkeypatch.setattr("edgekv.engine.sampler.uniform", biased)
    assert chi_square_p(*draw_many(COMBINATIONS[name]), DRAWS) < 1e-6


def test_a_wrong_temperature_would_be_found() -> None:
    counts, _ = draw_many(params(temperature=1.05))
    _, exact = draw_many(params())
    assert chi_square_p(counts, exact, DRAWS) < 1e-6


LOGITS = st.lists(
    st.one_of(st.floats(-12, 12, width=32), st.sampled_from([0.0, 1.0, 2.5]), st.just(-INF)), min_size=1, max_size=24
)
SETTINGS = st.builds(
    params,
    seed=st.integers(0, 2**64 - 1),
    temperature=st.one_of(st.just(1.0), st.floats(0.05, 4.0)),
    top_k=st.none() | st.integers(1, 30),
    top_p=st.just(1.0) | st.floats(0.01, 0.999),
    min_p=st.just(0.0) | st.floats(0.001, 1.0),
)


@settings(max_examples=250, deadline=None)
@given(logits=LOGITS, p=SETTINGS)
def test_filters_equal_the_plain_reference(logits: list[float], p: SamplingParams) -> None:
    assume(max(logits) > -INF)
    expected = reference_distribution(logits, p)
    # One row per kept candidate, with a number from the middle of its share.
    by_rank = p.top_p < 1.0 or (p.top_k is not None and p.top_k < len(logits))
    expected = expected if by_rank else sorted(expected)
    middles, seen, total = [], [], 0.0
    for token_id, share in expected:
        if share > 1e-9:
            middles.append(total + share / 2)
            seen.append(token_id)
        total += share
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgekv.engine.sampler.uniform", lambda seed, counter: middles[counter])
        rows = [SampleRow(p, range(n), 0) for n in range(len(middles))]
        tensor = torch.tensor(logits, dtype=torch.float32).expand(len(rows), len(logits))
        assert [entry.token_id for entry in Sampler(len(logits), "cpu").sample(tensor, rows)] == seen


TOKENS = st.lists(st.integers(0, 9), max_size=12)


@settings(max_examples=150, deadline=None)
@given(
    logits=st.lists(st.floats(-20, 20, width=32), min_size=20, max_size=20),
    rows=st.lists(
        st.builds(
            lambda prompt, output, **changes: row(params(**changes), prompt=prompt, output=output),
            prompt=TOKENS,
            output=TOKENS,
            repetition_penalty=st.just(1.0) | st.floats(0.5, 2.0),
            presence_penalty=st.just(0.0) | st.floats(-2.0, 2.0),
            frequency_penalty=st.just(0.0) | st.floats(-2.0, 2.0),
            min_tokens=st.integers(0, 8),
            stop_token_ids=st.frozensets(st.integers(0, 9), max_size=3),
            logit_bias=st.dictionaries(st.integers(0, 9), st.floats(-100, 100), max_size=4).map(
                lambda bias: tuple(bias.items())
            ),
        ),
        min_size=2,
        max_size=2,
    ),
)
def test_edits_equal_the_plain_reference(logits: list[float], rows: list[SampleRow]) -> None:
    edited = torch.tensor(logits, dtype=torch.float32).view(2, 10).clone()
    edit(edited, list(enumerate(rows)))
    for index, sample_row in enumerate(rows):
        expected = reference_scores(logits[10 * index : 10 * index + 10], sample_row)
        torch.testing.assert_close(edited[index], torch.tensor(expected), rtol=1e-5, atol=1e-4)


def test_stop_tokens_outside_the_vocabulary_touch_no_other_row() -> None:
    logits = torch.zeros(2, 4)
    edit(logits, [(0, row(params(min_tokens=1, stop_token_ids=frozenset({1, 5}))))])
    assert logits.tolist() == [[0.0, -INF, 0.0, 0.0], [0.0] * 4]


def mixed_rows(vocab_size: int) -> list[SampleRow]:
    choices = [
        *COMBINATIONS.values(),
        params(temperature=0.0),
        params(temperature=0.0, repetition_penalty=1.5),
        params(logprobs=3),
        params(top_p=0.999, temperature=3.0),
        params(top_k=vocab_size * 2),
        params(top_k=vocab_size // 2),
        params(top_k=vocab_size - 1, top_p=0.9),
        params(top_k=vocab_size // 30 + 1),
        params(top_k=2**31 - 1, min_p=0.001),
        params(min_tokens=9, stop_token_ids=frozenset(range(5)), logprobs=0),
    ]
    return [row(replace(p, seed=n), prompt=(0, n, 8), output=(n, 5, 5)) for n, p in enumerate(choices)]


@pytest.mark.parametrize("vocab_size", [40, 3000, 20_000])
@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "rounded to bfloat16"])
def test_a_row_does_not_depend_on_its_neighbours(vocab_size: int, bfloat16: bool) -> None:
    rows = mixed_rows(vocab_size)
    logits = torch.randn(len(rows), vocab_size, generator=torch.Generator().manual_seed(1)) * 3
    if bfloat16:
        logits = logits.bfloat16().float()
    sampler = Sampler(vocab_size, "cpu")
    together = sampler.sample(logits, rows)
    alone = [sampler.sample(logits[index : index + 1], [sample_row])[0] for index, sample_row in enumerate(rows)]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(2)).tolist()
    shuffled = sampler.sample(logits[order], [rows[index] for index in order])
    assert together == alone
    assert shuffled == [together[index] for index in order]


def test_a_row_of_many_candidates_does_not_have_its_neighbours_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    vocab_size, looked_at = 50_000, []

    def counted(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        looked_at.append((logits.shape[0], k))
        return likeliest(logits, k)

    monkeypatch.setattr("edgekv.engine.sampler.likeliest", counted)
    usual = [params(top_p=0.9), params(top_k=40), params(top_k=1), params(top_k=256, top_p=0.5)]
    odd = [params(top_k=700), params(top_k=2**31 - 1, top_p=0.5), params(top_k=vocab_size - 1), params(top_k=5000)]
    logits = torch.randn(8, vocab_size, generator=torch.Generator().manual_seed(7)) * 8
    settings = [p for pair in zip(usual, odd, strict=True) for p in pair]
    Sampler(vocab_size, "cpu").sample(logits, [row(p, prompt=(1,)) for p in settings])
    # A top-k of more than the vocabulary is none: that row is as usual.
    assert sorted(looked_at) == [(1, 1024), (1, 8192), (1, vocab_size), (2, 64), (3, 256)]


def test_logits_are_left_as_they_are() -> None:
    rows = mixed_rows(40)
    logits = torch.randn(len(rows), 40)
    before = logits.clone()
    Sampler(40, "cpu").sample(logits, rows)
    assert torch.equal(logits, before)


def test_many_rows_of_a_large_vocabulary_are_drawn_in_parts() -> None:
    logits = torch.randn(70, 128_256, generator=torch.Generator().manual_seed(3)) * 3
    rows = [row(params(seed=seed, top_p=1.0 if seed % 2 else 0.9)) for seed in range(70)]
    sampler = Sampler(128_256, "cpu")
    together = sampler.sample(logits, rows)
    assert [sampler.sample(logits[n : n + 1], rows[n : n + 1])[0] for n in (0, 1, 31, 32, 33, 68, 69)] == [
        together[n] for n in (0, 1, 31, 32, 33, 68, 69)
    ]


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(st.sampled_from([0.0, 0.5, 1.0, -1.0, -INF]), min_size=1, max_size=60),
    k=st.integers(1, 70),
)
def test_the_likeliest_are_in_one_strict_order(values: list[float], k: int) -> None:
    logits = torch.tensor([values, values[::-1]])
    _, ids = likeliest(logits, k)
    for row_values, row_ids in zip(logits.tolist(), ids.tolist(), strict=True):
        expected = sorted(range(len(values)), key=lambda token_id: (-row_values[token_id], token_id))[:k]
        possible = sum(row_values[token_id] > -INF for token_id in expected)
        assert row_ids[:possible] == expected[:possible]
        assert len(set(row_ids)) == len(expected)


@pytest.mark.parametrize("p", [params(top_k=1, temperature=9.0), params(temperature=0.0), params(temperature=1e-6)])
def test_top_k_one_greedy_and_a_tiny_temperature_take_the_likeliest(p: SamplingParams) -> None:
    logits = torch.randn(500, generator=torch.Generator().manual_seed(4)) * 30
    assert {sample_one(logits, row(replace(p, seed=seed))).token_id for seed in range(50)} == {int(logits.argmax())}


def test_of_equal_logits_the_lowest_id_is_the_likeliest() -> None:
    assert sample_one([0.0, 2.0, 2.0, 2.0], row(params(temperature=0.0))).token_id == 1
    assert {sample_one([0.0, 2.0, 2.0, 2.0], row(params(top_k=1, seed=n))).token_id for n in range(30)} == {1}
    assert {sample_one([0.0, 2.0, 2.0, 2.0], row(params(top_k=2, seed=n))).token_id for n in range(30)} == {1, 2}


def test_top_p_of_a_flat_distribution_needs_more_than_the_first_candidates() -> None:
    flat = torch.zeros(5000)
    drawn = [sample_one(flat, row(params(top_p=0.5, seed=seed))).token_id for seed in range(200)]
    assert max(drawn) < 2500
    assert max(drawn) > 2300


def test_the_counter_is_the_number_of_output_tokens() -> None:
    flat = torch.zeros(1000)
    for output in ((), (5,), (5, 6, 7)):
        entry = sample_one(flat, row(params(seed=3), prompt=(1, 2, 3, 4), output=output))
        assert entry.token_id == int(uniform(3, len(output)) * 1000)


def test_minimum_length_bans_stop_tokens_until_it_is_reached() -> None:
    p = params(temperature=0.0, min_tokens=2, stop_token_ids=frozenset({1, 99}))
    logits = [0.0, 5.0, 1.0]
    assert sample_one(logits, row(p, prompt=(0, 0, 0), output=(0,))).token_id == 2
    assert sample_one(logits, row(p, prompt=(0,), output=(0, 0))).token_id == 1


# Log-probabilities.


def test_logprobs_are_those_of_the_raw_distribution() -> None:
    logits = torch.tensor([1.0, 3.0, 3.0, -INF, 0.0])
    p = params(
        temperature=0.3,
        top_k=1,
        repetition_penalty=2.0,
        logit_bias=((4, 100.0),),
        logprobs=5,
    )
    entry = sample_one(logits, row(p, prompt=(1,)))
    raw = logits.double().log_softmax(-1).tolist()
    assert entry.token_id == 4
    assert entry.logprob == pytest.approx(raw[4])
    assert [token_id for token_id, _ in entry.top_logprobs] == [1, 2, 0, 4]
    assert [value for _, value in entry.top_logprobs] == pytest.approx([raw[n] for n in (1, 2, 0, 4)])


def test_only_rows_that_ask_get_logprobs_and_as_many_as_they_ask() -> None:
    rows = [row(params(temperature=0.0, logprobs=number)) for number in (None, 0, 2, 50)]
    entries = Sampler(10, "cpu").sample(torch.arange(10.0).expand(4, 10), rows)
    assert [entry.logprob is None for entry in entries] == [True, False, False, False]
    assert [len(entry.top_logprobs) for entry in entries] == [0, 0, 2, 10]
    assert entries[2].top_logprobs[0] == (9, entries[2].logprob)


# Robustness.


@pytest.mark.parametrize("p", [params(temperature=0.0), params(), params(top_p=0.9), params(repetition_penalty=1.2)])
def test_bad_rows_are_named_and_the_others_can_be_sampled_without_them(p: SamplingParams) -> None:
    logits = torch.randn(6, 30, generator=torch.Generator().manual_seed(6))
    rows = [row(replace(p, seed=seed), prompt=(1,)) for seed in range(6)]
    expected = Sampler(30, "cpu").sample(logits, rows)
    logits[1, 7], logits[3, 0], logits[4, :] = float("nan"), INF, -INF
    logits[5, 20:] = -INF
    with pytest.raises(NonFiniteLogits, match="3 of 6 rows") as caught:
        Sampler(30, "cpu").sample(logits, rows)
    assert caught.value.rows == (1, 3, 4)
    kept = [0, 2]
    again = Sampler(30, "cpu").sample(logits[kept], [rows[index] for index in kept])
    assert again == [expected[index] for index in kept]


def test_a_ban_cannot_hide_a_fault_of_the_model() -> None:
    p = params(min_tokens=3, stop_token_ids=frozenset({1}))
    with pytest.raises(NonFiniteLogits):
        sample_one([0.0, float("nan"), 0.0], row(p))


def test_a_row_that_has_only_banned_tokens_is_bad() -> None:
    p = params(temperature=0.0, min_tokens=3, stop_token_ids=frozenset({1, 2}))
    with pytest.raises(NonFiniteLogits) as caught:
        sample_one([-INF, 1.0, 0.0], row(p))
    assert caught.value.rows == (0,)


@settings(max_examples=200, deadline=None)
@given(
    logits=st.lists(
        st.one_of(st.floats(allow_nan=False, allow_infinity=False, width=32), st.just(-INF)), min_size=1, max_size=12
    ),
    temperature=st.sampled_from([1e-300, 1e-6, 1.0, 1e300]),
    top_k=st.none() | st.integers(1, 10**9),
    top_p=st.sampled_from([1e-300, 0.5, 1.0 - 2**-53, 1.0]),
    number=st.sampled_from([0.0, 0.5, 1.0 - 2**-53]),
)
def test_a_possible_token_of_the_vocabulary_is_returned_whatever_the_settings(
    logits: list[float], temperature: float, top_k: int | None, top_p: float, number: float
) -> None:
    assume(max(logits) > -INF)
    p = params(temperature=temperature, top_k=top_k, top_p=top_p)
    check_params(p, len(logits))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgekv.engine.sampler.uniform", lambda seed, counter: number)
        assert logits[sample_one(logits, row(p)).token_id] > -INF


@pytest.mark.parametrize(
    ("p", "first", "last"),
    [(params(), 1, 2), (params(top_k=3), 2, 1), (params(top_p=0.99), 2, 2)],
    ids=["plain", "top-k", "top-p"],
)
def test_a_number_at_the_edge_takes_the_first_or_last_token_that_is_left(
    monkeypatch: pytest.MonkeyPatch, p: SamplingParams, first: int, last: int
) -> None:
    # The number 1 stands for the rounding errors of a cumulative sum that a GPU computes in pieces.
    monkeypatch.setattr("edgekv.engine.sampler.uniform", lambda seed, counter: float(seed))
    logits = [-INF, 0.0, 5.0, -INF]
    assert sample_one(logits, row(replace(p, seed=0))).token_id == first
    assert sample_one(logits, row(replace(p, seed=1))).token_id == last


@pytest.mark.parametrize("token_id", [-1, 3])
def test_ids_outside_the_vocabulary_are_refused(token_id: int) -> None:
    with pytest.raises(ValueError, match="outside the vocabulary"):
        sample_one([0.0, 1.0, 2.0], row(params(logit_bias=((token_id, 1.0),))))
    with pytest.raises(ValueError, match="not all in the vocabulary"):
        sample_one([0.0, 1.0, 2.0], row(params(repetition_penalty=1.1), prompt=(token_id,)))
    with pytest.raises(ValueError, match="not all in the vocabulary"):
        sample_one([0.0, 1.0, 2.0], row(params(presence_penalty=1.1), output=(token_id,)))


def test_logits_of_another_shape_or_dtype_are_refused() -> None:
    sampler = Sampler(4, "cpu")
    assert sampler.sample(torch.zeros(0, 4), []) == []
    for logits in (torch.zeros(1, 5), torch.zeros(2, 4), torch.zeros(4), torch.zeros(1, 4).double()):
        with pytest.raises(ValueError, match="logits must be"):
            sampler.sample(logits, [row(params())])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", INF),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("min_p", math.nan),
        ("repetition_penalty", 0.0),
        ("presence_penalty", math.nan),
        ("frequency_penalty", INF),
        ("logprobs", -1),
        ("logit_bias", ((10, 1.0),)),
        ("logit_bias", ((-1, 1.0),)),
        ("logit_bias", ((1, INF),)),
        ("logit_bias", ((1, math.nan),)),
    ],
)
def test_settings_that_cannot_be_honoured_are_named(field: str, value: object) -> None:
    check_params(params(), 10)
    with pytest.raises(ValueError, match=field):
        check_params(params(**{field: value}), 10)


def test_small_vocabularies_are_drawn_from_as_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(64, 300, generator=torch.Generator().manual_seed(1)) * 3.0
    logits[:, 7] = -INF
    rows = [row(params(seed=seed, temperature=0.3 + seed % 5 / 3, min_p=seed % 3 / 40)) for seed in range(64)]
    drawn = Sampler(300, "cpu").sample(logits, rows)
    assert len({each.token_id for each in drawn}) > 20
    monkeypatch.setattr("edgekv.engine.sampler._SMALL_VOCABULARY", 0)
    assert Sampler(300, "cpu").sample(logits, rows) == drawn
