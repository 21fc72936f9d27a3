"""Products with weights: one token to eight from memory's side, some more by matrix units.

Runs in: the main thread; owns: nothing.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.bench import Bench, Calls, Compared, copies_of
from bench.gpu.row import Row, Target, of_bytes, ratio
from bench.gpu.weights import random_plain, random_planes
from edgekv.kernels.common.prepared import Prepared
from edgekv.kernels.gemm import acts, dequant, gemm, gemv, wide_gemv
from edgekv.kernels.gemm.acts import Int8Rows
from edgekv.kernels.gemm.planes import plane_rows
from edgekv.kernels.quant.encodings import AFFINE4_128, Q4_0, Q4_K, Q6_K, Q8_0, Encoding

GEMV_TOKENS = 8
TARGETS = {"large": Target(0.85, 0.92), "small": Target(0.70, 0.80)}
FOUR_BITS = (Q4_0, Q4_K, AFFINE4_128)
QUANTISED = (*FOUR_BITS, Q6_K, Q8_0)

T = TypeVar("T")


def measure_gemv(bench: Bench, kind: str, rows: int, cols: int) -> Iterator[Row]:
    """One token: bfloat16 beside torch's product, and every width of quantised weights."""
    multiprocessors, allocate = bench.rig.card.compute_units, bench.rig.card.allocate
    x, out = bench.normal(1, cols), bench.empty(1, rows)
    codes = Int8Rows.empty(1, cols, bench.device)
    bench.launches([acts.prepare(x, codes)])()
    kept: list[object] = []
    sizes = {encoding.name: rows * plane_rows(encoding, cols).num_bytes for encoding in QUANTISED}
    sizes |= dict.fromkeys(("plain", "torch"), rows * cols * bench.act.itemsize)
    plain = _filled(bench, sizes["plain"], partial(random_plain, bench.act, rows, cols, allocate))

    def quantised(encoding: Encoding) -> Calls:
        planes = _filled(bench, sizes[encoding.name], partial(random_planes, encoding, rows, cols, allocate))
        kept.append(planes)
        return _each(bench, planes, lambda each: gemv.prepare(each, codes, out, multiprocessors=multiprocessors))

    works: dict[str, Callable[[], Calls]] = {
        "plain": lambda: _each(
            bench, plain, lambda each: wide_gemv.prepare(each, x, out, multiprocessors=multiprocessors)
        ),
        "torch": lambda: [partial(F.linear, x, each) for each in plain],
    }
    works |= {encoding.name: partial(quantised, encoding) for encoding in QUANTISED}
    found = bench.compare(works)
    shape = f"{kind} [{rows:,}, {cols:,}]"
    for name in works:
        size = sizes[name]
        title = {"plain": _name(bench.act), "torch": f"{_name(bench.act)} by torch"}.get(name, name)
        if name not in found.times:
            yield Row(f"{shape}, {title}", reason=found.reasons[name])
            continue
        times = found.times[name]
        target = TARGETS[kind] if name in {encoding.name for encoding in FOUR_BITS} else None
        note = f"{ratio(found.times['torch'], times):.2f} x torch's" if "torch" in found.times else ""
        share = bench.share_of_read(size, times)
        yield Row(f"{shape}, {title}", times, of_bytes(size, times.median), share, "of read", target, note)


def measure_batched(bench: Bench, rows: int, cols: int) -> Iterator[Row]:
    """Eight tokens by our gemv, 16 and 32 by our gemm, and hundreds by torch's product of what was dequantised."""
    multiprocessors, allocate = bench.rig.card.compute_units, bench.rig.card.allocate
    size = rows * plane_rows(Q4_K, cols).num_bytes
    planes = _filled(bench, size, partial(random_planes, Q4_K, rows, cols, allocate))
    plain_bytes = rows * cols * bench.act.itemsize
    plain = _filled(bench, plain_bytes, partial(random_plain, bench.act, rows, cols, allocate))
    scratch = bench.empty(rows, cols)
    parts = bench.empty(8 << 20 if bench.rig.is_real else 1 << 14, dtype=torch.float32)
    for tokens in (8, 16, 32, 512):
        x, out = bench.normal(tokens, cols), bench.empty(tokens, rows)
        codes = Int8Rows.empty(min(tokens, 8), cols, bench.device)

        def ours(x: Tensor = x, out: Tensor = out, codes: Int8Rows = codes) -> Calls:
            if len(x) <= GEMV_TOKENS:
                first = acts.prepare(x, codes)
                return [
                    bench.launches([first, gemv.prepare(each, codes, out, multiprocessors=multiprocessors)])
                    for each in planes
                ]
            return [
                bench.launches(gemm.prepare(each, x, out, multiprocessors=multiprocessors, parts=parts))
                for each in planes
            ]

        def dequantised(x: Tensor = x, out: Tensor = out) -> Calls:
            product = partial(torch.mm, x, scratch.t(), out=out)
            return [partial(_then, bench.launches([dequant.prepare(each, scratch)]), product) for each in planes]

        works: dict[str, Callable[[], Calls]] = {
            "plain weights": lambda x=x: [partial(F.linear, x, each) for each in plain],
            "dequantised, then torch's": dequantised,
        }
        if tokens <= gemm.MOST_TOKENS:
            works["ours"] = ours
        moved = {"ours": size, "plain weights": plain_bytes, "dequantised, then torch's": size + 2 * plain_bytes}
        yield from _against_plain(bench, f"[{rows:,}, {cols:,}] q4_K, {tokens} tokens", bench.compare(works), moved)


def _against_plain(bench: Bench, shape: str, found: Compared, moved: dict[str, int]) -> Iterator[Row]:
    theirs = found.times.get("plain weights")
    for name, size in moved.items():
        if name in found.reasons:
            yield Row(f"{shape}, {name}", reason=found.reasons[name])
        elif name in found.times:
            times = found.times[name]
            share = bench.share_of_read(size, times)
            note = "" if share is None else f"{share:.2f} of read"
            against = None if theirs is None or times is theirs else ratio(theirs, times)
            of = "" if against is None else "x plain weights"
            yield Row(f"{shape}, {name}", times, of_bytes(size, times.median), against, of, note=note)


def measure_dequant(bench: Bench, rows: int, cols: int) -> Iterator[Row]:
    """Quantised rows into plain ones: what is read and what is written, against a copy."""
    scratch = bench.empty(rows, cols)
    allocate = bench.rig.card.allocate
    for encoding in (Q4_K, Q8_0):
        size = rows * plane_rows(encoding, cols).num_bytes
        planes = _filled(bench, size, partial(random_planes, encoding, rows, cols, allocate))
        moved = size + rows * cols * bench.act.itemsize
        times = bench.time(_each(bench, planes, lambda each: dequant.prepare(each, scratch)))
        share = bench.share_of_copy(moved, times)
        yield Row(
            f"[{rows:,}, {cols:,}] {encoding.name} to {_name(bench.act)}", times, of_bytes(moved, times.median), share,
            "of copy",
        )  # fmt: skip


def _filled(bench: Bench, num_bytes: int, make: Callable[[], T]) -> list[T]:
    """As many as fill the arena."""
    copies = copies_of(bench.sizes.arena_bytes, num_bytes)
    bench.need(copies * num_bytes)
    return [make() for _ in range(copies)]


def _each(bench: Bench, weights: list[T], prepare: Callable[[T], Prepared]) -> Calls:
    return [bench.launches([prepare(each)]) for each in weights]


def _then(first: Callable[[], object], second: Callable[[], Tensor]) -> None:
    first()
    second()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
