"""compat.h's arithmetic beside that of numpy and torch, bit for bit where it is exact."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.kernels.fibers.cases import THREADS, EkNumbers, EkWarps, Words, numbers_case, warps_case
from tests.kernels.fibers.harness import SEEDS, fiber_kernel, in_all_orders

COUNT = 1 << 14
Floats = NDArray[np.float32]


def special() -> Floats:
    """Numbers about which there is something: limits of the formats, ties of their rounding, what is none."""
    powers = np.ldexp(1.0, np.arange(-149, 128))
    ties = [
        np.ldexp(1 + np.arange(64) / 64, exponent)[:, None].ravel()
        for exponent in (-26, -25, -24, -15, -14, -11, -10, -9, -8, -7, -6, 0, 7, 8, 15)
    ]
    whole = np.arange(-20, 20) / 2
    limits = [0.0, 448, 449, 464, 465, 480, 65504, 65519, 65520, 65536, 3.39e38, np.inf, np.nan]
    positive = np.concatenate([powers, *ties, whole, limits]).astype(np.float32)
    around = [np.nextafter(positive, np.float32(toward)) for toward in (-np.inf, np.inf)]
    every = np.concatenate([positive, *around])
    return np.concatenate([every, -every])


def inputs() -> Words:
    """[3, COUNT]: special numbers, floats of all sizes, and any bits."""
    rng = np.random.default_rng(1)
    words = rng.integers(0, 2**32, (3, COUNT), dtype=np.uint32)
    usual = rng.standard_normal((3, COUNT // 2)) * 2.0 ** rng.integers(-12, 12, (3, COUNT // 2))
    words[:, : COUNT // 2] = usual.astype(np.float32).view(np.uint32)
    some = special().view(np.uint32)
    words[0, : len(some)] = some
    words[0, -256:] = np.arange(256)
    return words


def to_bf16(x: Floats) -> Words:
    """With the NaN of NVIDIA's cards, so that all cards and the host agree to the bit."""
    rounded = torch.from_numpy(x).bfloat16().view(torch.int16).numpy().view(np.uint16)
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint32)


def to_f16(x: Floats) -> Words:
    with np.errstate(over="ignore"):
        return x.astype(np.float16).view(np.uint16).astype(np.uint32)


def to_e4m3(x: Floats) -> Words:
    """Whether torch saturates hangs on its version: it is given only what fits, and infinities are no numbers."""
    fitting = torch.from_numpy(np.clip(x, -448, 448)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    return np.where(np.isfinite(x), fitting, 0x7F | np.signbit(x) << 7).astype(np.uint32)


def from_f16(bits: Words) -> Floats:
    return bits.astype(np.uint16).view(np.float16).astype(np.float32)


def signed(words: Words) -> NDArray[np.int64]:
    """[..., 4]: bytes, the lowest first."""
    return words[..., None].view(np.int8).astype(np.int64)


def unsigned(words: Words) -> NDArray[np.int64]:
    return words[..., None].view(np.uint8).astype(np.int64)


def permuted(a: Words, b: Words, selector: Words) -> Words:
    both = np.concatenate([unsigned(a), unsigned(b)], axis=-1)
    chosen = [np.take_along_axis(both, (selector[:, None] >> 4 * i & 7).astype(np.int64), axis=-1) for i in range(4)]
    return np.concatenate(chosen, axis=-1).astype(np.uint8).view(np.uint32)[:, 0]


def references(words: Words) -> list[tuple[str, NDArray[np.generic], float]]:
    """What number_cases.h has to find, in its order, and how far off it may be, relative to it."""
    a, b, c = words
    x, y, z = words.view(np.float32)
    low, high = a & 0xFFFF, a >> 16
    wide = [each.astype(np.float64) for each in (x, y, z)]
    acc = c.view(np.int32).astype(np.int64)
    e4m3 = torch.from_numpy((a & 0xFF).astype(np.uint8)).view(torch.float8_e4m3fn).float().numpy()
    exact: list[tuple[str, NDArray[np.generic]]] = [
        ("bf16", (low << 16).view(np.float32)),
        ("bf16lo", (low << 16).view(np.float32)),
        ("bf16hi", (high << 16).view(np.float32)),
        ("tobf16", to_bf16(x)),
        ("pack_bf16", to_bf16(x) | to_bf16(y) << 16),
        ("f16", from_f16(low)),
        ("f16lo", from_f16(low)),
        ("f16hi", from_f16(high)),
        ("tof16", to_f16(x)),
        ("pack_f16", to_f16(x) | to_f16(y) << 16),
        ("e4m3", e4m3),
        ("toe4m3", to_e4m3(x)),
        ("perm", permuted(a, b, c & 0x7777)),
        ("dot4", (acc + (signed(a) * signed(b)).sum(-1)).astype(np.uint32)),
        ("dot4_us", (acc + (unsigned(a) * signed(b)).sum(-1)).astype(np.uint32)),
        ("dot4_uu", (c.astype(np.int64) + (unsigned(a) * unsigned(b)).sum(-1)).astype(np.uint32)),
        ("fma", fused(x, y, z)),
        ("max", np.fmax(x, y)),
        ("min", np.fmin(x, y)),
        ("int max", np.maximum(a.view(np.int32), b.view(np.int32)).view(np.uint32)),
        ("int min", np.minimum(a.view(np.int32), b.view(np.int32)).view(np.uint32)),
        ("rint", np.rint(x)),
    ]
    near: list[tuple[str, NDArray[np.generic]]] = [
        ("exp2", np.exp2(wide[0])),
        ("log2", np.log2(wide[0])),
        ("rcp", 1 / wide[0]),
        ("rsqrt", 1 / np.sqrt(wide[0])),
    ]
    return [(name, wanted, 0.0) for name, wanted in exact] + [
        *((name, wanted, 4e-7) for name, wanted in near),
        ("tanh", np.tanh(wide[0]), 1e-5),
    ]


def fused(x: Floats, y: Floats, z: Floats) -> Floats:
    """Rounded once: exact sums of long doubles where those are wide enough, which they are for most of the numbers."""
    return (x.astype(np.longdouble) * y + z).astype(np.float32)


def agree(name: str, found: Words, wanted: NDArray[np.generic], error: float) -> NDArray[np.bool_]:
    """Where they do. All NaNs of float32 and float16 are the same; what is next to nothing, or past all, may be so."""
    if wanted.dtype == np.uint32:
        same = found == wanted
        return same | same_halves(found, np.asarray(wanted)) if name in ("tof16", "pack_f16") else same
    number = found.view(np.float32)
    same = (number == wanted) | (np.isnan(number) & np.isnan(wanted))
    if not error:
        return same
    exact, got = np.asarray(wanted, np.float64), number.astype(np.float64)
    tiny, huge = np.finfo(np.float32).tiny, np.finfo(np.float32).max
    with np.errstate(invalid="ignore"):
        near = np.abs(got - exact) <= error * np.maximum(np.abs(exact), 0.1 if name in ("log2", "tanh") else 0)
        vanished = (np.abs(exact) < 2 * tiny) & (np.abs(got) < 2 * tiny)
        grown = (np.abs(exact) > huge / 2) & (np.abs(got) > huge / 2)
    return same | near | vanished | grown


def same_halves(found: Words, wanted: Words) -> NDArray[np.bool_]:
    """Where both float16 of a word are the same bits, or NaNs."""
    a, b = (words.view(np.uint16).reshape(-1, 2) for words in (np.ascontiguousarray(found), wanted))
    return ((a == b) | ((a & 0x7FFF > 0x7C00) & (b & 0x7FFF > 0x7C00))).all(1)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_numbers_are_those_of_numpy_and_torch() -> None:
    words = inputs()
    wanted = references(words)
    out = np.zeros((len(wanted), COUNT), np.uint32)
    args = EkNumbers(words.ctypes.data, out.ctypes.data, COUNT)
    fiber_kernel(numbers_case())(args, (-(-COUNT // THREADS),))
    wrong = []
    for found, (name, reference, error) in zip(out, wanted, strict=True):
        for i in np.flatnonzero(~agree(name, found, reference, error))[:3]:
            given = " ".join(f"{word:08x}" for word in words[:, i])
            number = found[i : i + 1].view(np.float32)[0]
            wrong.append(f"{name} of {given}: {found[i]:08x}, {number}, not {reference[i]}")
    assert not wrong, "\n".join(wrong)


def warp_references(words: Words, lanes: Words) -> list[Words]:
    """What warp_cases.h has to find, in its order."""
    warps = words.reshape(-1, 32)
    own = np.arange(32)
    odd = (warps & 1).astype(np.uint32) << own.astype(np.uint32)
    chosen = np.take_along_axis(warps, lanes.reshape(-1, 32).astype(np.int64), axis=1)
    pairs, fours = words.reshape(-1, 2), words.reshape(-1, 4)
    sums = np.repeat((words & 255).reshape(-1, THREADS).sum(1, dtype=np.uint32), THREADS)
    mixed = (fours[:, 0] - fours[:, 1]) ^ (fours[:, 2] - fours[:, 3])
    every_fourth = fours[:, :1] + np.arange(4, dtype=np.uint32)
    both = np.stack([pairs[:, 0], ~pairs[:, 0]], axis=1)
    each = [
        *(warps[:, own ^ mask] for mask in range(32)),
        *(warps[:, own ^ (1 << bit)] for bit in range(5)),
        chosen,
        chosen,
        np.repeat(np.bitwise_or.reduce(odd, axis=1), 32),
        np.repeat((warps == 12345).any(1), 32).astype(np.uint32),
        sums,
        words >> 8 & 255,
        words >> 16,
        np.repeat(pairs[:, 0] - pairs[:, 1], 2),
        np.repeat(mixed, 4),
        (words & 255) | words >> 24 << 8 | (words >> 8 & 0xFFFF) << 16,
        both,
        every_fourth,
    ]
    return [np.ascontiguousarray(one).reshape(-1) for one in each]


def test_lanes_exchange_what_the_order_of_lanes_says() -> None:
    rng = np.random.default_rng(2)
    count = 3 * THREADS
    words = aligned(rng.integers(0, 2**32, count, dtype=np.uint32))
    words[70] = 12345
    lanes = rng.integers(0, 32, count, dtype=np.uint32)
    wanted = warp_references(words, lanes)

    def launch(seed: int) -> Words:
        out = aligned(np.zeros(len(wanted) * count, np.uint32))
        args = EkWarps(words.ctypes.data, lanes.ctypes.data, out.ctypes.data, count)
        fiber_kernel(warps_case())(args, (count // THREADS,), seed=seed)
        return out.reshape(len(wanted), count)

    found = in_all_orders(launch, SEEDS)
    for i, (got, expected) in enumerate(zip(found, wanted, strict=True)):
        np.testing.assert_array_equal(got, expected, err_msg=f"function {i}")


def aligned(numbers: Words) -> Words:
    """The same at a multiple of 16 bytes."""
    memory = np.zeros(numbers.size + 4, np.uint32)
    start = -memory.ctypes.data % 16 // 4
    memory[start : start + numbers.size] = numbers
    return memory[start : start + numbers.size]
