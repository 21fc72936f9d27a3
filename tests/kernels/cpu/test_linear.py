"""Linear layers in every format, against float64 on the exact weights, on every tier and on one and two threads."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgekv.kernels.cpu.abi import Epilogue
from edgekv.kernels.cpu.build import SOURCES, find_compiler
from edgekv.kernels.cpu.formats import PanelFormat, panel_format
from edgekv.kernels.cpu.library import load_library
from edgekv.kernels.quant.encodings import ENCODINGS
from tests.kernels.cpu.linear_harness import (
    Activations,
    Floats,
    Layer,
    Weight,
    pool,
    random_rows,
    random_weight,
    weight_of,
)

# One encoding for each format of panels, and what has to be packed otherwise.
FORMATS = ("f32", "f16", "bf16", "q8_0", "iq4_xs", "q5_1", "q4_0", "affine4_32", "affine4_64", "affine4_128",
           "q4_K", "q5_K", "q6_K")  # fmt: skip
TIERS = load_library().tiers
pools = [pytest.param((tier, threads), id=f"{tier}-{threads}") for tier in TIERS for threads in (1, 2)]
GATED = (Epilogue.SILU_MUL, Epilogue.GELU_MUL)


@pytest.fixture(params=pools, scope="session")
def handle(request: pytest.FixtureRequest) -> int:
    return pool(*request.param)


def draw(rng: np.random.Generator, *shape: int) -> Floats:
    return rng.standard_normal(shape, dtype=np.float32)


def check(handle: int, layer: Layer, acts: Activations, before: Floats) -> Floats:
    layer.pack(handle)
    found = layer.run(handle, acts, before)
    wanted, error = layer.wanted(acts, before)
    off = np.abs(found - wanted) / error
    assert off.max(initial=0) <= 1, f"{off.max():.2f} times the bound at {np.unravel_index(off.argmax(), off.shape)}"
    return found


def units(name: str) -> int:
    return ENCODINGS[name].block_cols


def test_there_is_an_encoding_for_every_format() -> None:
    assert {panel_format(ENCODINGS[name]) for name in FORMATS} == set(PanelFormat)


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(FORMATS),
    rows=st.integers(1, 100),
    blocks=st.integers(1, 6),
    tokens=st.integers(1, 40),
    add=st.booleans(),
    biased=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_product(
    handle: int, name: str, rows: int, blocks: int, tokens: int, add: bool, biased: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    weight = random_weight(name, rows, blocks * units(name), rng)
    layer = Layer((weight,), Epilogue.ADD if add else Epilogue.STORE, draw(rng, rows) if biased else None)
    check(handle, layer, Activations(draw(rng, tokens, weight.values.shape[1])), draw(rng, tokens, rows))


@pytest.mark.parametrize("tokens", [1, 16, 49, 301])
@pytest.mark.parametrize("name", FORMATS)
def test_many_columns_and_tokens(name: str, tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    weight = random_weight(name, 150, 2560, rng)
    check(pool(TIERS[0], 2), Layer((weight,)), Activations(draw(rng, tokens, 2560)), draw(rng, tokens, 150))


@pytest.mark.parametrize("registers", [1, 8, 32])
def test_items_find_room_in_their_scratch(tmp_path: Path, registers: int) -> None:
    compiler = find_compiler()
    if compiler is None:
        pytest.skip("there is no compiler")
    source, program = Path(__file__).parent / "csrc" / "cut_cases.cpp", tmp_path / "cases"
    flags = ("-std=c++17", "-O1", f"-I{SOURCES}", f"-DTESTED_REGISTERS={registers}")
    subprocess.run([*compiler, *flags, str(source), "-o", str(program)], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("epilogue", [Epilogue.STORE, Epilogue.SILU_MUL])
@pytest.mark.parametrize(
    ("name", "cols", "rows", "tokens"),
    [("q4_0", 32, 7296, 18), ("q4_0", 64, 3648, 36), ("q8_0", 32, 3648, 36), ("affine4_32", 64, 3456, 38)],
)
def test_items_of_so_many_panels_that_their_sums_fill_the_scratch(
    handle: int, name: str, cols: int, rows: int, tokens: int, epilogue: Epilogue
) -> None:
    """Each time there is room for an odd number of panels, and they go in pairs."""
    rng = np.random.default_rng(0)
    counts = (rows // 2, rows // 2) if epilogue in GATED else (rows,)
    layer = Layer(tuple(random_weight(name, count, cols, rng) for count in counts), epilogue)
    check(handle, layer, Activations(draw(rng, tokens, cols)), draw(rng, tokens, counts[0]))


def test_so_many_columns_that_tokens_are_dealt_out(handle: int) -> None:
    """What pays for the offsets of 48 tokens would be more than there is room for."""
    rng, cols = np.random.default_rng(0), 342 * 256
    layer = Layer((random_weight("q6_K", 1, cols, rng),))
    check(handle, layer, Activations(draw(rng, 48, cols)), draw(rng, 48, 1))


@pytest.mark.parametrize("cols", [1, 7, 33, 1025])
@pytest.mark.parametrize("name", ["f32", "f16", "bf16"])
def test_odd_columns(handle: int, name: str, cols: int) -> None:
    rng = np.random.default_rng(cols)
    weight = random_weight(name, 17, cols, rng)
    check(handle, Layer((weight,)), Activations(draw(rng, 3, cols)), draw(rng, 3, 17))


@settings(deadline=None, max_examples=30)
@given(
    name=st.sampled_from(FORMATS),
    epilogue=st.sampled_from(GATED),
    panels=st.integers(1, 5),
    tokens=st.sampled_from([1, 2, 5, 9, 16, 33]),
    biased=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_gated(
    handle: int, name: str, epilogue: Epilogue, panels: int, tokens: int, biased: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    cols = 2 * units(name)
    layer = Layer(
        (random_weight(name, 16 * panels, cols, rng), random_weight(name, 16 * panels, cols, rng)),
        epilogue,
        draw(rng, 32 * panels) if biased else None,
    )
    check(handle, layer, Activations(draw(rng, tokens, cols) / 4), draw(rng, tokens, 16 * panels))


@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_a_gate_and_what_it_gates_are_never_parted(handle: int, tokens: int) -> None:
    rng, cols = np.random.default_rng(0), 5120  # of which a panel is more than is read at a time
    weights = (random_weight("bf16", 48, cols, rng), random_weight("bf16", 48, cols, rng))
    layer = Layer(weights, Epilogue.SILU_MUL)
    check(handle, layer, Activations(draw(rng, tokens, cols) / 16), draw(rng, tokens, 48))


@pytest.mark.parametrize("epilogue", GATED)
def test_a_gate_far_from_zero_is_open_or_shut(handle: int, epilogue: Epilogue) -> None:
    gate = np.zeros((16, 32), np.float32)
    gate[:, 0] = [-1e30, -1e6, -300, -90, -89, -88, -87, -20, 20, 87, 88, 89, 300, 1e6, 1e30, 0]
    up = np.ones((16, 32), np.float32)
    weights = tuple(Weight(ENCODINGS["f32"], rows.view(np.uint8), rows) for rows in (gate, up))
    x = np.zeros((1, 32), np.float32)
    x[0, 0] = 1
    layer = Layer(weights, epilogue)
    layer.pack(handle)
    found = layer.run(handle, Activations(x), np.zeros((1, 16), np.float32))[0]
    assert np.abs(found[:7]).max() < 1e-5
    np.testing.assert_allclose(found[8:], gate[8:, 0], rtol=1e-6)


@settings(deadline=None, max_examples=30)
@given(
    names=st.lists(st.sampled_from(FORMATS), min_size=2, max_size=4),
    rows=st.lists(st.integers(1, 40), min_size=4, max_size=4),
    tokens=st.integers(1, 20),
    add=st.booleans(),
    seed=st.integers(0, 2**32),
)
@example(names=["q4_K", "q4_K", "q6_K"], rows=[64, 16, 16, 1], tokens=1, add=False, seed=0)
def test_parts_lie_side_by_side(
    handle: int, names: list[str], rows: list[int], tokens: int, add: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    weights = tuple(random_weight(name, count, 256, rng) for name, count in zip(names, rows, strict=False))
    layer = Layer(weights, Epilogue.ADD if add else Epilogue.STORE, draw(rng, sum(rows[: len(names)])))
    check(handle, layer, Activations(draw(rng, tokens, 256)), draw(rng, tokens, layer.rows))


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("name", FORMATS)
def test_a_token_is_the_same_in_every_batch(name: str, tier: str) -> None:
    rng = np.random.default_rng(0)
    rows, cols, tokens = 50, 1536, 60
    weight = random_weight(name, rows, cols, rng)
    layer = Layer((weight,))
    one, two = pool(tier, 1), pool(tier, 2)
    layer.pack(one)
    x = draw(rng, tokens, cols)
    out = np.zeros((tokens, rows), np.float32)
    together = layer.run(two, Activations(x), out)
    for size in (1, 2, 3, 4, 5, 6, 7, 8, 11, 14, 15, 23):
        first = 3 * size % (tokens - size)
        part = layer.run(one, Activations(x[first : first + size]), out[:size])
        assert np.array_equal(part, together[first : first + size]), size


@pytest.mark.parametrize("threads", [3, 4, 7])
def test_any_number_of_threads(threads: int) -> None:
    rng = np.random.default_rng(threads)
    layer = Layer((random_weight("q4_0", 1500, 2048, rng), random_weight("bf16", 100, 2048, rng)))
    one, many = pool(TIERS[0], 1), pool(TIERS[0], threads)
    layer.pack(many)
    acts, out = Activations(draw(rng, 2, 2048)), np.zeros((2, 1600), np.float32)
    assert np.array_equal(layer.run(many, acts, out), layer.run(one, acts, out))


@pytest.mark.parametrize("name", FORMATS)
def test_an_activation_that_is_no_number_stays_with_its_token(handle: int, name: str) -> None:
    rng = np.random.default_rng(0)
    weight = random_weight(name, 20, 512, rng)
    layer = Layer((weight,))
    layer.pack(handle)
    acts = Activations(draw(rng, 5, 512))
    acts.f32[2, 100] = acts.scale[2, 3] = np.nan
    acts.bf16[2, 100] = 0x7FC0
    found = layer.run(handle, acts, np.zeros((5, 20), np.float32))
    assert np.isnan(found).all(1).tolist() == [False, False, True, False, False]
    assert np.isfinite(found[[0, 1, 3, 4]]).all()


@pytest.mark.parametrize("name", ["q8_0", "q4_0", "q5_K", "q6_K", "affine4_32"])
def test_the_largest_integers_do_not_overflow(handle: int, name: str) -> None:
    encoding = ENCODINGS[name]
    quants = {"q8_0": slice(2, None), "q4_0": slice(2, None), "q5_K": slice(16, None), "q6_K": slice(0, 192)}
    rows = random_rows(encoding, 16, 2 * encoding.block_cols, np.random.default_rng(0))
    x = np.full((2, 2 * encoding.block_cols), 3, np.float32)
    x[1] = -3
    for byte in (0x00, 0xFF, 0x80, 0x7F):
        raw = rows.reshape(16, -1, encoding.block_bytes).copy()
        raw[..., quants.get(name, slice(4, None))] = byte
        weight = weight_of(encoding, raw.reshape(16, -1))
        check(handle, Layer((weight,)), Activations(x), np.zeros((2, 16), np.float32))
