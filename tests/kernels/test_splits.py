"""Contexts are cut so that all of them together fill a card, into no more parts than there is room for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekv.kernels.attn.splits import Splits, cut_of, part_tokens

CARD = 396  # thread blocks of decode that it has at a time


@pytest.mark.parametrize(
    ("contexts", "kv_heads", "parts"),
    [
        ([8192], 8, [47]),
        ([8192] * 8, 8, [7] * 8),
        ([8192] * 64, 8, [1] * 64),
        ([256], 8, [2]),
        ([131072], 1, [391]),
        # A long one among short ones is cut as if it was alone, or nearly.
        ([500, 32768, *[500] * 30], 8, [1, 33, *[1] * 30]),
        ([0, 8192, 0, 0], 8, [1, 47, 1, 1]),
        ([0, 0], 8, [1, 1]),
    ],
)
def test_contexts_are_cut_into_as_many_parts_as_fill_the_card(
    contexts: list[int], kv_heads: int, parts: list[int]
) -> None:
    cut = cut_of(Splits(CARD, kv_heads, 16), contexts)
    assert cut[1:].diff().tolist() == parts


@given(
    st.lists(st.integers(0, 40000), min_size=1, max_size=40),
    st.integers(1, 800),
    st.integers(1, 40),
    st.sampled_from((16, 32)),
    st.none() | st.integers(1, 5000),
)
def test_there_are_no_more_parts_than_there_is_room_for(
    contexts: list[int], thread_blocks: int, kv_heads: int, block_size: int, window: int | None
) -> None:
    splits = Splits(thread_blocks, kv_heads, block_size)
    cut = cut_of(splits, contexts, window=window)
    assert len(contexts) <= cut[-1] <= splits.most_parts(len(contexts), -(-max(contexts) // block_size))
    for query, context in enumerate(contexts):
        tokens = part_tokens(cut, query, context, block_size, window=window)
        assert sum(map(len, tokens)) == (context if window is None else min(context, window))
        assert all(tokens) or not context
        assert all(len(each) > (splits.least_blocks - 1) * block_size for each in tokens[1:-1])


@pytest.mark.parametrize("numbers", [(0, 1, 16, 8), (1, 0, 16, 8), (1, 1, 0, 8), (1, 1, 16, 0)])
def test_there_is_no_cut_into_nothing(numbers: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="no context can be cut by"):
        Splits(*numbers)
