"""KV append and paged attention of the CPU kernels: as the formula says, and the same to the bit however it is cut."""

import dataclasses
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekv.kernels.cpu.abi import KvFormat
from tests.kernels.cpu.attend_harness import (
    PART,
    Cache,
    Memory,
    Schedule,
    Sequence,
    Shape,
    Step,
    check,
    chunks,
    play,
    pool,
    random_sequence,
    run_layer,
    tiers,
    whole,
)

FORMATS = list(KvFormat)
POOLS = list(product(tiers(), (1, 2)))
SHAPES = st.builds(
    Shape,
    kv_format=st.sampled_from(FORMATS),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 8) | st.just(16),
    head_dim=st.sampled_from([16, 32, 64, 80, 112, 128, 256]),
    num_layers=st.integers(1, 2),
    window=st.none() | st.integers(1, 90),
    softcap=st.none() | st.sampled_from([1.0, 20.0]),
)
MEMORIES = st.builds(
    Memory,
    block_size=st.sampled_from([16, 32, 48, 64, 128]),
    segments=st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any).map(tuple),
    seed=st.integers(0, 2**32 - 1),
)
TOKENS = st.sampled_from([1, 2, 15, 16, 17, 33]) | st.integers(1, 120)


def random_sequences(shape: Shape, tokens: list[int], seed: int) -> list[Sequence]:
    rng = np.random.default_rng(seed)
    return [random_sequence(shape, count, rng) for count in tokens]


def draw_schedule(data: st.DataObject, sequences: list[Sequence]) -> Schedule:
    """Each sequence cut somewhere; in each step some go on with their next chunk, in any order."""
    waiting = []
    for number, sequence in enumerate(sequences):
        cuts = data.draw(st.lists(st.integers(1, max(1, sequence.tokens - 1)), max_size=4), label="cuts")
        waiting.append([(number, count) for count in chunks(sequence.tokens, cuts)])
    schedule: Schedule = []
    while any(waiting):
        ready = [left for left in waiting if left]
        going = data.draw(st.lists(st.sampled_from(range(len(ready))), min_size=1, unique=True), label="step")
        schedule.append([ready[index].pop(0) for index in going])
    return schedule


def assert_same_bits(found: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one.view(np.uint32), other.view(np.uint32))


@settings(max_examples=30, deadline=None)
@given(SHAPES, MEMORIES, st.lists(TOKENS, min_size=1, max_size=4), st.sampled_from(POOLS), st.data())
def test_any_schedule_is_as_the_formula_says(
    shape: Shape, memory: Memory, tokens: list[int], where: tuple[str, int], data: st.DataObject
) -> None:
    sequences = random_sequences(shape, tokens, data.draw(st.integers(0, 2**32 - 1), label="seed"))
    schedule = draw_schedule(data, sequences)
    check(shape, sequences, *play(pool(*where), shape, memory.holding(tokens), sequences, schedule))


@settings(max_examples=30, deadline=None)
@given(SHAPES, st.lists(TOKENS, min_size=1, max_size=4), st.sampled_from(tiers()), st.data())
def test_chunks_batches_blocks_and_threads_change_no_bit(
    shape: Shape, tokens: list[int], tier: str, data: st.DataObject
) -> None:
    sequences = random_sequences(shape, tokens, data.draw(st.integers(0, 2**32 - 1), label="seed"))
    plays = []
    for threads, schedule in ((1, whole(sequences)), (2, draw_schedule(data, sequences))):
        memory = data.draw(MEMORIES, label="memory").holding(tokens)
        plays.append(play(pool(tier, threads), shape, memory, sequences, schedule)[0])
    assert_same_bits(*plays)


# Contexts of several parts, whose results are put together; windows that end in, at and between them.
@pytest.mark.parametrize(
    ("kv_format", "window"),
    [*((kv_format, None) for kv_format in FORMATS), *((KvFormat.BF16, w) for w in (PART - 1, PART, 700))],
)
@pytest.mark.parametrize("tier", tiers())
def test_contexts_of_several_parts(tier: str, kv_format: KvFormat, window: int | None) -> None:
    shape = Shape(kv_format, kv_heads=1, group=2, head_dim=16, window=window)
    tokens = [2 * PART + 70, PART + 1]
    sequences = random_sequences(shape, tokens, 0)
    memory = Memory(32, (11, 0, 30)).holding(tokens)
    all_at_once, cache = play(pool(tier, 1), shape, memory, sequences, whole(sequences))
    check(shape, sequences, all_at_once, cache)
    schedule = [
        [(0, PART - 3), (1, PART - 1)],
        [(0, 7), (1, 1)],  # across a part's end, and up to it
        [(0, PART - 6)],
        [(1, 1), (0, 1)],
        *([(0, 1)] for _ in range(11)),
        [(0, 60)],
    ]
    assert_same_bits(play(pool(tier, 2), shape, memory, sequences, schedule)[0], all_at_once)


@pytest.mark.parametrize("tier", tiers())
def test_a_batch_of_long_and_short_contexts_is_cut_without_a_seam(tier: str) -> None:
    """One sequence far longer than the others is split among the threads; the others share items."""
    shape = Shape(KvFormat.BF16, kv_heads=2, group=1, head_dim=16)
    tokens = [2 * PART + 9, *range(20, 60)]
    sequences = random_sequences(shape, tokens, 1)
    schedule: Schedule = [[(i, count - 1) for i, count in enumerate(tokens)], [(i, 1) for i in range(len(tokens))]]
    memory = Memory(16, (64,)).holding(tokens)
    one, two = (play(pool(tier, threads), shape, memory, sequences, schedule) for threads in (1, 2))
    check(shape, sequences, *one)
    assert_same_bits(two[0], one[0])


@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("tier", tiers())
def test_a_group_of_more_heads_than_a_tile_has_rows(tier: str, kv_format: KvFormat) -> None:
    shape = Shape(kv_format, kv_heads=2, group=70, head_dim=16)
    sequences = random_sequences(shape, [21, 3], 7)
    memory = Memory(16, (4,))
    one, two = (play(pool(tier, threads), shape, memory, sequences, whole(sequences)) for threads in (1, 2))
    check(shape, sequences, *one)
    assert_same_bits(two[0], one[0])


@pytest.mark.parametrize("what", "qkv")
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("tier", tiers())
def test_what_is_not_finite_stays_where_it_is_seen(tier: str, kv_format: KvFormat, number: float, what: str) -> None:
    """Neither other sequences of the batch nor the tokens before it change by a bit; who sees it says so."""
    shape = Shape(kv_format, kv_heads=2, group=3, head_dim=32)
    clean = random_sequences(shape, [40, 50], 2)
    spoilt = Sequence(*(x.copy() for x in (clean[0].q, clean[0].k, clean[0].v)))
    getattr(spoilt, what)[0, 21, 0, 5] = number
    schedule: Schedule = [[(0, 10), (1, 10)], [(0, 29), (1, 39)], [(1, 1), (0, 1)]]
    wanted, found = (
        play(pool(tier, 2), shape, Memory(16, (9,)), [first, clean[1]], schedule)[0] for first in (clean[0], spoilt)
    )
    assert_same_bits(found[1:], wanted[1:])
    assert_same_bits([found[0][:, :21]], [wanted[0][:, :21]])
    heads = slice(0, 1) if what == "q" else slice(0, 3)
    stop = 22 if what == "q" else 40
    assert_same_bits([found[0][:, 21:, heads.stop :]], [wanted[0][:, 21:, heads.stop :]])
    seen = ~np.isfinite(found[0][0, 21:stop, heads])
    if what == "v" and kv_format is not KvFormat.INT8:
        assert seen[..., 5].all()  # the one dimension
        assert not np.delete(seen, 5, -1).any()
    elif what == "k" and np.isinf(number):
        assert (seen.all(-1) | (~seen).all(-1)).all()  # a score of -inf hides the token, of +inf spoils all
        assert seen.any()
    else:
        assert seen.all()


@pytest.mark.parametrize("tier", tiers())
def test_int8_keeps_zeros_small_and_large_numbers(tier: str) -> None:
    shape = Shape(KvFormat.INT8, kv_heads=1, group=1, head_dim=16)
    (sequence,) = random_sequences(shape, [6], 3)
    for x in (sequence.k, sequence.v):
        x[0, 0] = 0
        x[0, 1] = 1e-12  # its scale is 0 in float16
        x[0, 2, :, 0] = 3e6
        x[0, 2, :, 1:] = 0
    results, cache = play(pool(tier, 1), shape, Memory(), [sequence], [[(0, 6)]])
    keys, values = cache.stored(0, 6)
    planes = cache.layout.planes(cache.segments[0]).view(np.int8)
    assert (planes == -128).sum() == 0
    for stored in (keys, values):
        assert (stored[0, :2] == 0).all()
        np.testing.assert_allclose(stored[0, 2, 0, 0], 3e6, rtol=1e-3)
    assert (results[0][0, :2] == 0).all()
    assert np.isfinite(results[0]).all()
    sequence.k[0, 3] = 1e30  # no float16 scale is so large
    results, _ = play(pool(tier, 1), shape, Memory(), [sequence], [[(0, 6)]])
    assert np.isfinite(results[0][0, :3]).all()
    assert np.isnan(results[0][0, 3:]).all()


@pytest.mark.parametrize("tier", tiers())
def test_a_key_that_dwarfs_all_others_is_all_that_counts(tier: str) -> None:
    shape = Shape(KvFormat.F32, head_dim=16)
    (sequence,) = random_sequences(shape, [30], 4)
    sequence.q[:] = 1
    sequence.k[0, 7] = 1e4
    results, _ = play(pool(tier, 1), shape, Memory(), [sequence], [[(0, 30)]])
    wanted = np.broadcast_to(np.repeat(sequence.v[0, 7], shape.group, 0), results[0][0, 7:].shape)
    np.testing.assert_array_equal(results[0][0, 7:], wanted)


@pytest.mark.parametrize("tier", tiers())
def test_scratch_that_others_left_changes_nothing(tier: str) -> None:
    """The same memory serves steps of different batches; what was in it is never read."""
    shape = Shape(KvFormat.BF16, kv_heads=1, group=2, head_dim=32)
    sequences = random_sequences(shape, [PART + 30], 5)
    state = Cache(shape, Memory(16, (64,)))
    run_layer(pool(tier, 2), Step(state, [(0, 0, PART + 29)]), 0, sequences)
    last = Step(state, [(0, PART + 29, 1)])
    first, again = (run_layer(pool(tier, 2), last, 0, sequences) for _ in range(2))
    assert_same_bits([again], [first])
    assert np.isfinite(first).all()


def test_shared_memory_is_enough_for_any_window_and_number_of_threads() -> None:
    shape = Shape(KvFormat.BF16, kv_heads=2, group=2, head_dim=32)
    tokens = [4 * PART]
    sequences = random_sequences(shape, tokens, 6)
    state = Cache(shape, Memory(16, (128,)))
    run_layer(pool(tiers()[0], 2), Step(state, [(0, 0, 4 * PART - 3)]), 0, sequences)
    for window in (None, 1, 100, PART, 3 * PART):
        # run_layer checks what lies behind the memory it was told to provide.
        state.shape = dataclasses.replace(shape, window=window)
        run_layer(pool(tiers()[0], 2), Step(state, [(0, 4 * PART - 3, 3)]), 0, sequences)


def test_a_span_whose_parts_find_no_room_is_as_it_is_on_one_thread() -> None:
    """64 tokens of 256 dimensions after 34,000 others leave more behind than there is room for; one token does not."""
    shape = Shape(KvFormat.BF16, kv_heads=1, group=1, head_dim=256)
    sequences = random_sequences(shape, [34_000, 5_000], 8)
    state = Cache(shape, Memory(128, (306,)))
    run_layer(pool(tiers()[0], 2), Step(state, [(0, 0, 33_936), (1, 0, 4_999)]), 0, sequences, attends=False)
    one, two = (
        run_layer(pool(tiers()[0], threads), Step(state, [(0, 33_936, 64), (1, 4_999, 1)]), 0, sequences)
        for threads in (1, 2)
    )
    assert_same_bits([two], [one])
    keys, values = state.stored(0, 34_000)
    scores = shape.scale * sequences[0].q[0, -1, 0].astype(np.float64) @ keys[0, :, 0].T
    weights = np.exp(scores - scores.max())
    np.testing.assert_allclose(one[63, 0], weights @ values[0, :, 0] / weights.sum(), atol=2e-3)
