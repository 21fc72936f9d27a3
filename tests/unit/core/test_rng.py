import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekv.core.rng import uniform


def chi_square_p(counts: list[int], expected: float) -> float:
    """Wilson and Hilferty's approximation, good to three digits for the 99 and more degrees of freedom here."""
    df = len(counts) - 1
    chi_square = sum((count - expected) ** 2 / expected for count in counts)
    z = ((chi_square / df) ** (1 / 3) - (1 - 2 / (9 * df))) / math.sqrt(2 / (9 * df))
    return 0.5 * math.erfc(z / math.sqrt(2))


def histogram(numbers: list[float], bins: int) -> list[int]:
    counts = [0] * bins
    for number in numbers:
        counts[int(number * bins)] += 1
    return counts


STREAMS = {
    "one seed, counters in order": [uniform(7, counter) for counter in range(50_000)],
    "neighbouring seeds, first number": [uniform(seed, 0) for seed in range(50_000)],
    "neighbouring seeds, fifth number": [uniform(seed, 5) for seed in range(50_000)],
    "seed and counter rise together": [uniform(n, n) for n in range(50_000)],
    "seeds that differ in the high bits": [uniform(n << 48, 3) for n in range(50_000)],
}


@pytest.mark.parametrize("numbers", STREAMS.values(), ids=STREAMS)
def test_numbers_are_uniform(numbers: list[float]) -> None:
    assert 1e-4 < chi_square_p(histogram(numbers, 100), len(numbers) / 100) < 1 - 1e-4


@pytest.mark.parametrize("numbers", STREAMS.values(), ids=STREAMS)
def test_consecutive_numbers_are_independent(numbers: list[float]) -> None:
    counts = [0] * 256
    for first, second in pairwise(numbers):
        counts[int(first * 16) * 16 + int(second * 16)] += 1
    assert 1e-4 < chi_square_p(counts, (len(numbers) - 1) / 256) < 1 - 1e-4


def test_low_bits_are_used() -> None:
    fractions = [uniform(11, counter) * 2**45 % 1.0 for counter in range(50_000)]
    assert 1e-4 < chi_square_p(histogram(fractions, 256), 50_000 / 256) < 1 - 1e-4


def test_the_test_finds_a_biased_stream() -> None:
    biased = [uniform(7, counter) ** 1.05 for counter in range(50_000)]
    assert chi_square_p(histogram(biased, 100), 500.0) < 1e-6


def test_streams_of_different_seeds_share_no_numbers() -> None:
    numbers = {uniform(seed, counter) for seed in range(200) for counter in range(200)}
    assert len(numbers) == 200 * 200


def test_values_are_pinned_for_ever() -> None:
    # A saved seed must give the same text after an update.
    assert [uniform(0, 0), uniform(0, 1), uniform(42, 0), uniform(2**64 - 1, 10**6)] == [
        0.6524484863740322,
        0.7012121095215252,
        0.34329192209867343,
        0.4611314684076886,
    ]


@given(seed=st.integers(-(2**70), 2**70), counter=st.integers(0, 2**70))
def test_any_seed_and_counter_give_a_number_below_one(seed: int, counter: int) -> None:
    number = uniform(seed, counter)
    assert 0.0 <= number < 1.0
    assert number * 2**53 == int(number * 2**53)
    assert number == uniform(seed + 2**64, counter + 2**64)
