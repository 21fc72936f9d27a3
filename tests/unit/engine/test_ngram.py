"""Prompt lookup finds the most recent occurrence of the longest suffix, and keeps finding it as the text grows."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekv.core.sampling import SamplingParams
from edgekv.core.sequence import Sequence, SequenceSpec
from edgekv.engine.ngram import NGramProposer, _Index

SIZES = range(4, 1, -1)


def text(tokens: list[int], number: int = 1) -> Sequence:
    return Sequence.from_spec(SequenceSpec(number, tuple(tokens), SamplingParams(max_tokens=99)), arrival=number)


def proposed(proposer: NGramProposer, sequence: Sequence, most: int = 4) -> tuple[int, ...] | None:
    return proposer.propose([sequence], {sequence.id: most}).get(sequence.id)


def looked_up(tokens: list[int], most: int) -> tuple[int, ...] | None:
    """What the definition says, by looking everywhere."""
    for size in SIZES:
        for place in range(len(tokens) - 1, size - 1, -1):
            if tokens[place - size : place] == tokens[-size:]:
                period = tokens[place:]
                return tuple(period[i % len(period)] for i in range(most))
    return None


def test_the_most_recent_of_several_places_is_continued() -> None:
    assert proposed(NGramProposer(), text([1, 2, 3, 9, 1, 2, 4, 8, 1, 2]), 3) == (4, 8, 1)


def test_a_longer_suffix_comes_before_a_more_recent_one() -> None:
    assert proposed(NGramProposer(), text([7, 1, 2, 3, 9, 1, 2, 4, 7, 1, 2]), 2) == (3, 9)


def test_what_repeats_itself_goes_on_repeating() -> None:
    assert proposed(NGramProposer(), text([5, 6, 7, 5, 6, 7, 5, 6]), 7) == (7, 5, 6, 7, 5, 6, 7)


def test_nothing_is_proposed_where_nothing_was_said_before() -> None:
    for tokens in ([1], [1, 1], [1, 2], [1, 2, 3], [3, 1, 2, 4, 2]):
        assert proposed(NGramProposer(), text(tokens)) is None
    assert proposed(NGramProposer(), text([1, 2, 1, 2]), 0) is None


@settings(max_examples=300, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 2), min_size=1, max_size=120),
    cuts=st.lists(st.integers(1, 120), max_size=6),
    most=st.integers(1, 9),
)
def test_however_a_text_has_grown_the_definition_holds(tokens: list[int], cuts: list[int], most: int) -> None:
    # Of three tokens there are 117 n-grams; in a table of this size no two of them share a slot.
    proposer, sequence = NGramProposer(slot_bits=20), text([])
    for end in sorted({min(cut, len(tokens)) for cut in cuts} | {len(tokens)}):
        sequence.tokens = tokens[:end]
        assert proposed(proposer, sequence, most) == looked_up(tokens[:end], most)


def test_no_two_of_those_ngrams_share_a_slot() -> None:
    index = _Index(SIZES, 20)
    for size in SIZES:
        ngrams = [[number // 3**digit % 3 for digit in range(size)] for number in range(3**size)]
        assert len({index._slot(ngram) for ngram in ngrams}) == 3**size


@settings(max_examples=100, deadline=None)
@given(tokens=st.lists(st.integers(0, 200_000), min_size=30, max_size=90), size=st.integers(1, 5))
def test_a_long_prompt_is_indexed_as_single_tokens_are(tokens: list[int], size: int) -> None:
    at_once, one_by_one = _Index([size], 10), _Index([size], 10)
    at_once.extend(tokens)
    for end in range(1, len(tokens) + 1):
        one_by_one.extend(tokens[:end])
    assert (at_once._after[size] == one_by_one._after[size]).all()


@settings(max_examples=100, deadline=None)
@given(tokens=st.lists(st.integers(0, 5), min_size=1, max_size=200), slot_bits=st.integers(1, 4))
def test_in_a_table_that_is_too_small_whatever_is_proposed_did_follow_the_suffix(
    tokens: list[int], slot_bits: int
) -> None:
    found = proposed(NGramProposer(slot_bits=slot_bits), text(tokens), 1)
    followed = {tokens[p] for p in range(2, len(tokens)) if tokens[p - 2 : p] == tokens[-2:]}
    assert found is None or found[0] in followed


def test_memory_is_bounded_and_goes_with_the_sequence() -> None:
    proposer = NGramProposer(slot_bits=8)
    for number in range(3):
        proposed(proposer, text([1, 2, 3] * 2_000, number))
    assert proposer.num_bytes == 3 * 3 * 4 * 256
    for number in range(3):
        proposer.forget(number)
    proposer.forget(99)
    assert proposer.num_bytes == 0


def test_a_sequence_with_the_id_of_one_that_ended_is_another() -> None:
    proposer = NGramProposer()
    proposed(proposer, text([1, 2, 3] * 9))
    proposer.forget(1)
    assert proposed(proposer, text([4, 5, 6, 4, 5]), 1) == (6,)


@pytest.mark.parametrize("options", [{"shortest": 0}, {"shortest": 5}, {"slot_bits": 0}, {"slot_bits": 31}])
def test_impossible_sizes_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"must be|is 1 or more"):
        NGramProposer(**options)
