"""Paged attention of the CPU kernels, played step by step on a poisoned cache, and the formula in float64 beside it.

A `Sequence` is fixed beforehand: the queries, keys and values of all its tokens. A schedule says which tokens of which
sequences share a step. So the same tokens can be played in other chunks, batches, blocks and threads, and compared.
"""

import ctypes
import math
from collections.abc import Sequence as ListOf
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from edgekv.kernels.cpu import abi
from edgekv.kernels.cpu.abi import KvFormat
from edgekv.kernels.cpu.kv import KEYS, VALUES, Bytes, Floats, KvLayout
from edgekv.kernels.cpu.library import load_library
from edgekv.kernels.cpu.program import Pool

POISON = 0xFF  # bytes of it are NaN in every format of floats
PART = 512  # slots that the kernels attend to together


@dataclass(frozen=True, slots=True)
class Shape:
    """What is attended to, and how."""

    kv_format: KvFormat = KvFormat.F32
    kv_heads: int = 2
    group: int = 2
    head_dim: int = 16
    num_layers: int = 1
    window: int | None = None
    softcap: float | None = None

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.head_dim)


@dataclass(frozen=True, slots=True)
class Memory:
    """Where the cache's blocks are: segments of so many blocks, 0 for a hole, handed out in an order by `seed`."""

    block_size: int = 16
    segments: tuple[int, ...] = (64,)
    seed: int = 0

    def holding(self, tokens: ListOf[int]) -> "Memory":
        """The same with as many segments more as sequences of so many tokens need."""
        needed = sum(-(-count // self.block_size) for count in tokens) - sum(self.segments)
        most = max(self.segments)
        return replace(self, segments=self.segments + (most,) * max(0, -(-needed // most)))


@dataclass(frozen=True, slots=True, eq=False)
class Sequence:
    """All tokens of one sequence, [layers, tokens, heads, head_dim] each."""

    q: Floats
    k: Floats
    v: Floats

    @property
    def tokens(self) -> int:
        return len(self.q[0])


def random_sequence(shape: Shape, tokens: int, rng: np.random.Generator) -> Sequence:
    """Numbers as a model has them, so that some scores stand out."""

    def draw(heads: int) -> Floats:
        return rng.standard_normal((shape.num_layers, tokens, heads, shape.head_dim), dtype=np.float32)

    return Sequence(draw(shape.heads) * 2, draw(shape.kv_heads), draw(shape.kv_heads))


# Steps of (number of the sequence, tokens).
Schedule = list[list[tuple[int, int]]]


@cache
def pool(tier: str, threads: int) -> Pool:
    """Its threads sleep when there is nothing to do."""
    return Pool(load_library(), threads, tier=tier)


def tiers() -> tuple[str, ...]:
    """Those that work here."""
    return load_library().tiers


def aligned(num_bytes: int) -> Bytes:
    """Poisoned bytes at a multiple of 64."""
    data = np.full(num_bytes + 64, POISON, np.uint8)
    offset = -data.ctypes.data % 64
    return data[offset : offset + num_bytes]


@dataclass
class Cache:
    """Poisoned segments and the sequences' block tables."""

    shape: Shape
    memory: Memory
    tables: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape, sizes = self.shape, self.memory.segments
        self.layout = KvLayout(
            shape.kv_format, shape.num_layers, shape.kv_heads, shape.head_dim, self.memory.block_size
        )
        self.segments = [aligned(self.layout.segment_bytes(size)) for size in sizes]
        self.shift = (max(sizes) - 1).bit_length()
        ids = [index << self.shift | block for index, size in enumerate(sizes) for block in range(size)]
        self.free: list[int] = np.random.default_rng(self.memory.seed).permutation(ids).tolist()
        described = [
            abi.Segment(data.ctypes.data if size else None, size)
            for data, size in zip(self.segments, sizes, strict=True)
        ]
        self.described = (abi.Segment * len(sizes))(*described)
        self.struct = abi.Cache(
            segments=ctypes.addressof(self.described),
            num_segments=len(sizes),
            segment_shift=self.shift,
            format=shape.kv_format,
            num_layers=shape.num_layers,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            block_size=self.memory.block_size,
        )

    def grow(self, number: int, tokens: int) -> list[int]:
        """The table of a sequence, with blocks for so many tokens."""
        table = self.tables.setdefault(number, [])
        while len(table) * self.memory.block_size < tokens:
            table.append(self.free.pop())
        return table

    def stored(self, number: int, tokens: int) -> tuple[Floats, Floats]:
        """Keys and values that the cache holds of a sequence, [layers, tokens, kv_heads, head_dim]."""
        rows: list[Floats] = []
        for side in (KEYS, VALUES):
            blocks = []
            for block in self.tables[number]:
                segment, slot = self.segments[block >> self.shift], block & ((1 << self.shift) - 1)
                planes = self.layout.planes(segment)[:, side, :, slot]
                scales = self.layout.scales(segment)[:, side, :, slot]
                blocks.append(self.layout.decode(np.ascontiguousarray(planes), scales, side))
            rows.append(np.concatenate(blocks, 2).swapaxes(1, 2)[:, :tokens])
        return rows[0], rows[1]

    def foreign_bytes(self) -> Bytes:
        """All bytes of blocks that no sequence has."""
        found = []
        for block in self.free:
            segment, slot = self.segments[block >> self.shift], block & ((1 << self.shift) - 1)
            found.append(self.layout.planes(segment)[:, :, :, slot].ravel())
            found.append(self.layout.scales(segment)[:, :, :, slot].ravel().view(np.uint8))
        return np.concatenate(found) if found else np.empty(0, np.uint8)


@dataclass
class Step:
    """One step's batch, as the library sees it; keeps all that its structures point to."""

    cache: Cache
    work: list[tuple[int, int, int]]  # number of the sequence, its first token of the step, tokens

    def __post_init__(self) -> None:
        tables = [self.cache.grow(number, first + tokens) for number, first, tokens in self.work]
        lengths = np.array([tokens for _, _, tokens in self.work], np.int64)
        self.tokens = int(lengths.sum())
        self.first_rows = np.cumsum(lengths) - lengths
        self.arrays = {
            "starts": np.array([first for _, first, _ in self.work], np.int64),
            "lengths": lengths,
            "first_rows": self.first_rows,
            "blocks": np.array([block for table in tables for block in table], np.int64),
            "table_starts": np.cumsum([0, *(len(table) for table in tables)]).astype(np.int64),
        }
        pointers = {name: array.ctypes.data for name, array in self.arrays.items()}
        self.batch = abi.Batch(tokens=self.tokens, spans=len(self.work), samples=0, **pointers)

    def attend(self, layer: int, q: Floats, k: Floats, v: Floats, out: Floats, shared: Bytes | None) -> abi.Attend:
        """The structure for one layer; rows of q, k, v and out lie so many floats apart."""
        shape = self.cache.shape
        return abi.Attend(
            cache=ctypes.addressof(self.cache.struct),
            batch=ctypes.addressof(self.batch),
            layer=layer,
            heads=shape.heads,
            window=shape.window or 0,
            scale=shape.scale,
            softcap=shape.softcap or 0,
            q=q.ctypes.data,
            q_stride=q.strides[0] // 4,
            k=k.ctypes.data,
            k_stride=k.strides[0] // 4,
            v=v.ctypes.data,
            v_stride=v.strides[0] // 4,
            out=out.ctypes.data,
            out_stride=out.strides[0] // 4,
            shared=None if shared is None else shared.ctypes.data,
        )


def padded(rows: Floats) -> Floats:
    """Rows [tokens, heads, head_dim] as [tokens, heads * head_dim], with NaN behind each."""
    tokens = len(rows)
    wide = np.full((tokens, rows[0].size + 16), np.nan, np.float32)
    wide[:, :-16] = rows.reshape(tokens, -1)
    return wide[:, :-16]


def run_layer(
    pool: Pool, step: Step, layer: int, sequences: ListOf[Sequence], *, attends: bool = True
) -> Floats:
    """Append and attend in one layer; [tokens, heads, head_dim], NaN where nothing is attended to."""
    shape = step.cache.shape
    q, k, v = (
        padded(np.concatenate([getattr(sequences[number], name)[layer, a : a + n] for number, a, n in step.work]))
        for name in "qkv"
    )
    out = padded(np.full((step.tokens, shape.heads, shape.head_dim), np.nan, np.float32))
    shared = aligned(pool.attend_shared_bytes(step.attend(layer, q, k, v, out, None)) + 64)
    shared[-64:] = 0x5A
    pool.run_attend(step.attend(layer, q, k, v, out, shared), attends=attends)
    assert (shared[-64:] == 0x5A).all()
    assert out.base is not None
    assert np.isnan(np.asarray(out.base)[:, -16:]).all()
    return out.reshape(step.tokens, shape.heads, shape.head_dim)


def play(
    pool: Pool, shape: Shape, memory: Memory, sequences: ListOf[Sequence], schedule: Schedule
) -> tuple[list[Floats], Cache]:
    """Results of every sequence, [layers, tokens, heads, head_dim], and the cache as it is at the end."""
    state = Cache(shape, memory)
    done = [0] * len(sequences)
    results: list[list[Floats]] = [[] for _ in sequences]
    for work in schedule:
        step = Step(state, [(number, done[number], tokens) for number, tokens in work])
        layers = np.stack([run_layer(pool, step, layer, sequences) for layer in range(shape.num_layers)])
        for (number, tokens), row in zip(work, step.first_rows.tolist(), strict=True):
            results[number].append(layers[:, row : row + tokens])
            done[number] += tokens
    return [np.concatenate(parts, 1) for parts in results], state


def whole(sequences: ListOf[Sequence]) -> Schedule:
    """Every sequence at once, in one step each."""
    return [[(number, sequence.tokens)] for number, sequence in enumerate(sequences)]


def chunks(tokens: int, cuts: ListOf[int]) -> list[int]:
    """Lengths of the chunks of a sequence that is cut there."""
    return [b - a for a, b in pairwise(sorted({0, tokens, *(cut for cut in cuts if 0 < cut < tokens)}))]


def to_bf16(x: Floats) -> Floats:
    """Rounded to bf16, in float32."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def expected(shape: Shape, q: Floats, keys: Floats, values: Floats) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The formula in float64 for all tokens of a sequence in one layer, and the mean of |v| under each softmax.

    q [tokens, heads, head_dim], keys and values [tokens, kv_heads, head_dim], as the cache holds them.
    """
    group = shape.group
    wide_keys, wide_values = (np.repeat(x, group, 1).astype(np.float64) for x in (keys, values))
    queries = (to_bf16(q) if shape.kv_format is KvFormat.BF16 else q).astype(np.float64)
    scores = np.einsum("thd,chd->htc", queries, wide_keys, optimize=True) * np.float32(shape.scale)
    if shape.softcap is not None:
        scores = shape.softcap * np.tanh(scores / shape.softcap)
    behind = np.arange(len(q))[:, None] - np.arange(len(q))
    hidden = behind < 0 if shape.window is None else (behind < 0) | (behind >= shape.window)
    scores = np.where(hidden, -np.inf, scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return (
        np.einsum("htc,chd->thd", weights, wide_values, optimize=True),
        np.einsum("htc,chd->thd", weights, np.abs(wide_values), optimize=True),
    )


# Relative to the mean of |v|, and absolute (v is about 1). bf16: probabilities are rounded to it, half a unit in the
# last of 8 bits, each in its own direction. int8: queries and probabilities have 15 bits, counted from their largest.
TOLERANCE = {
    KvFormat.F32: (1e-5, 1e-6),
    KvFormat.F16: (1e-5, 1e-6),
    KvFormat.BF16: (2**-8, 1e-6),
    KvFormat.INT8: (5e-4, 5e-4),
}


def check(shape: Shape, sequences: ListOf[Sequence], results: ListOf[Floats], cache: Cache) -> None:
    """The cache holds what was appended, bit for bit, and nothing else; results are as the formula says."""
    assert (cache.foreign_bytes() == POISON).all()
    for number, (sequence, result) in enumerate(zip(sequences, results, strict=True)):
        keys, values = cache.stored(number, sequence.tokens)
        for side, given, stored in ((KEYS, sequence.k, keys), (VALUES, sequence.v, values)):
            np.testing.assert_array_equal(stored, rounded(cache.layout, given, side))
        for layer in range(shape.num_layers):
            wanted, spread = expected(shape, sequence.q[layer], keys[layer], values[layer])
            error = np.abs(result[layer] - wanted)
            relative, absolute = TOLERANCE[shape.kv_format]
            assert (error <= relative * spread + absolute).all(), (error - relative * spread).max()


def rounded(layout: KvLayout, rows: Floats, side: int) -> Floats:
    """What the cache makes of keys or values [layers, tokens, kv_heads, head_dim]."""
    tokens, size = rows.shape[1], layout.block_size
    filled = np.zeros((rows.shape[0], -(-tokens // size) * size, *rows.shape[2:]), np.float32)
    filled[:, :tokens] = rows
    blocks = filled.reshape(rows.shape[0], -1, size, *rows.shape[2:]).swapaxes(2, 3)
    decoded = layout.decode(*layout.encode(np.ascontiguousarray(blocks), side), side)
    return decoded.swapaxes(2, 3).reshape(filled.shape)[:, :tokens]
