"""Every operation on rows, over buffers and prepared activations of just their size; and batches full of nonsense."""

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekv.kernels.cpu import abi
from edgekv.kernels.cpu.abi import Error, Format, OpKind
from edgekv.kernels.cpu.formats import activation_stride
from tests.kernels.cpu.sanitized_cases._memory import any_pool, guarded, library

_HEAD_DIMS = (16, 32, 48, 80, 128)


def run(rng: np.random.Generator) -> None:
    _operations(rng)
    _nonsense(rng)


def _operations(rng: np.random.Generator) -> None:
    tokens, width = int(rng.integers(1, 12)), int(rng.integers(1, 300))
    if rng.integers(0, 8) == 0:
        width += 4096  # a soft-cap in parts
    samples = int(rng.integers(1, tokens + 1))
    step = _Step(rng, tokens, samples, (width, width))
    forms, of_samples, handle = int(rng.integers(0, 8)), int(rng.integers(0, 2)), any_pool(rng)
    weight = guarded(width, np.float32)
    weight[:] = rng.standard_normal(width)
    panels = guarded((-(-width // 16), 40, 16), np.float32)
    table = (abi.Matrix * 1)(abi.Matrix(panels.ctypes.data, int(Format.F32), width, 40, 0))
    plain = {"width": width, "of_samples": of_samples, "eps": 1e-6, "softcap": 30.0, "scale": 1.0}
    weighted = plain | {"weight": weight.ctypes.data if rng.integers(0, 2) else None}
    step.token_ids[:] = rng.integers(0, width, tokens)
    for fields in (
        {**weighted, "kind": OpKind.NORM, "src": 0, "dst": int(rng.integers(-1, 2)), "forms": forms},
        {**weighted, "kind": OpKind.NORM_ADD, "src": 0, "dst": 1},
        {**plain, "kind": OpKind.PREPARE, "src": 1, "dst": -1, "forms": forms},
        {**plain, "kind": OpKind.SOFTCAP, "src": -1, "dst": 1},
        {**plain, "kind": OpKind.GATHER, "src": 0, "dst": 1, "of_samples": 1},
    ):
        assert step.run(handle, fields) == 0
    narrow = _Step(rng, tokens, samples, (40,))
    narrow.token_ids[:] = step.token_ids
    embed = {"kind": OpKind.EMBED, "dst": 0, "width": 40, "scale": 2.0, "num_parts": 1}
    assert narrow.run(handle, {**embed, "parts": ctypes.addressof(table)}) == 0


def _nonsense(rng: np.random.Generator) -> None:
    """A batch of which one number, or none, is anything at all: it is refused, or harmless."""
    kv_heads, head_dim = int(rng.integers(1, 4)), int(rng.choice(_HEAD_DIMS))
    heads = kv_heads * int(rng.integers(1, 3))
    width = (heads + 2 * kv_heads) * head_dim
    lengths = rng.integers(1, 20, int(rng.integers(1, 4)))
    starts = rng.integers(0, 40, len(lengths))
    step = _Step(rng, int(lengths.sum()), 1, (width, heads * head_dim), heads, kv_heads, head_dim)
    needed = -(-(starts + lengths) // 16)
    step.set_spans(starts, lengths, needed)
    changed = rng.integers(0, 3) > 0
    if changed:
        odd = (-1, 0, 1, 4, 15, 16, 1 << 31, -(1 << 63), (1 << 63) - 1, int(rng.integers(0, 100)))
        names = ("starts", "lengths", "first_rows", "blocks", "token_ids", "positions", "sample_rows")
        target = getattr(step, names[int(rng.integers(0, len(names)))])
        target[int(rng.integers(0, len(target)))] = odd[int(rng.integers(0, len(odd)))]
    handle = any_pool(rng)
    common = {"src": 0, "width": width, "scale": 0.1, "eps": 1e-6}
    table = {"kind": OpKind.ROPE_TABLE, "width": head_dim // 2, "scale": 1.0, "weight": step.frequencies.ctypes.data}
    append = {**common, "kind": OpKind.ROPE_APPEND}
    attend = {**common, "kind": OpKind.ATTEND, "dst": 1, "window": int(rng.choice([0, 1, 7, 30]))}
    errors = [step.run(handle, fields) for fields in (table, append, attend)]
    assert set(errors) <= {0, *Error}
    assert changed or not any(errors)


class _Step:
    """An ek_step in guarded memory."""

    def __init__(
        self, rng: np.random.Generator, tokens: int, samples: int, widths: tuple[int, ...],
        heads: int = 1, kv_heads: int = 1, head_dim: int = 16,
    ) -> None:  # fmt: skip
        buffers, widest = [], max(widths)
        for width in widths:
            memory = guarded((tokens, activation_stride(width, 4)), np.float32, last=width)
            memory[:, :width] = rng.standard_normal((tokens, width))
            buffers.append(abi.Buffer(memory.ctypes.data, memory.shape[1]))
        self._buffers = (abi.Buffer * len(buffers))(*buffers)
        whole, groups = -(-widest // 16) * 16, -(-widest // 32)
        f32 = guarded((tokens, activation_stride(widest, 4)), np.float32, last=whole)
        bf16 = guarded((tokens, activation_stride(widest, 2)), np.uint16, last=whole)
        q8 = guarded((tokens, activation_stride(widest, 1)), np.int8, last=32 * groups)
        scales, sums = guarded((tokens, groups + 3), np.float32, last=groups), guarded((tokens, groups + 3), np.int32)
        self.frequencies, tables = guarded(head_dim // 2, np.float32), guarded((tokens, head_dim), np.float32)
        self.frequencies[:] = rng.random(head_dim // 2)
        self.token_ids, self.positions = guarded(tokens, np.int64), guarded(tokens, np.int64)
        self.sample_rows = guarded(samples, np.int64)
        self.sample_rows[:] = rng.integers(0, tokens, samples)
        self.batch = abi.Batch(tokens=tokens, samples=samples)
        self.program = abi.Program(None, 0, heads, kv_heads, head_dim, head_dim)
        self.step = abi.Step(
            batch=ctypes.addressof(self.batch), buffers=ctypes.addressof(self._buffers),
            prepared=abi.Acts(
                *(each.ctypes.data for each in (f32, bf16, q8, scales, sums)),
                *(each.shape[1] for each in (f32, bf16, q8, scales)),
            ),
            rope_tables=tables.ctypes.data,
        )  # fmt: skip
        self._point("token_ids", "positions", "sample_rows")

    def set_spans(self, starts: NDArray[Any], lengths: NDArray[Any], blocks: NDArray[Any]) -> None:
        """Spans and a cache of two segments with a hole between, just as many blocks as are needed."""
        count, total = len(starts), int(blocks.sum())
        self.starts, self.lengths, self.first_rows = (guarded(count, np.int64) for _ in range(3))
        self.blocks, self.table_starts = guarded(total, np.int64), guarded(count + 1, np.int64)
        self.starts[:], self.lengths[:] = starts, lengths
        self.first_rows[:], self.table_starts[1:] = np.cumsum(lengths) - lengths, np.cumsum(blocks)
        half, heads, dim = (total + 1) // 2, self.program.kv_heads, self.program.head_dim
        self.blocks[:] = [block if block < half else (2 << 6) + block - half for block in range(total)]
        sizes = (half, 0, total - half)
        memory = [guarded(2 * heads * size * 16 * dim, np.float32) for size in sizes]
        self._segments = (abi.Segment * 3)(
            *(abi.Segment(each.ctypes.data if size else None, size) for each, size in zip(memory, sizes, strict=True))
        )
        self._cache = abi.Cache(ctypes.addressof(self._segments), 3, 6, int(abi.KvFormat.F32), 1, heads, dim, 16)
        self.step.cache = ctypes.addressof(self._cache)
        self.batch.spans = count
        self._point("starts", "lengths", "first_rows", "blocks", "table_starts")
        attend = abi.Attend(cache=self.step.cache, batch=self.step.batch, heads=self.program.heads)
        shared = guarded(library().functions.ek_attend_shared_bytes(ctypes.byref(attend), 2), np.uint8)
        self.step.attend_shared = shared.ctypes.data

    def run(self, handle: int, fields: dict[str, Any]) -> int:
        op = abi.Op(**({"src": -1, "dst": -1} | fields))
        error: int = library().functions.ek_rows_run(
            handle, ctypes.byref(self.program), ctypes.byref(op), ctypes.byref(self.step)
        )
        return error

    def _point(self, *names: str) -> None:
        for name in names:
            setattr(self.batch, name, getattr(self, name).ctypes.data)
