"""The kernels between the large ones: norms, gates, turns, what goes to the cache, and the choice of tokens.

Runs in: the main thread; owns: nothing.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from bench.gpu.bench import Bench, Calls
from bench.gpu.paged import BLOCK_SIZE, PagedCache
from bench.gpu.row import Row, of_bytes
from edgekv.kernels.attn import kv_append
from edgekv.kernels.attn.gpu_layout import GpuKvFormat
from edgekv.kernels.attn.kv_append import RopeTable
from edgekv.kernels.fused import gated, rmsnorm, rope, sample
from edgekv.kernels.fused.sample_rows import RowSettings, make_rows, pack_rows

COPIES = 4


def measure_fused(bench: Bench) -> Iterator[Row]:
    """Many rows, against a copy."""
    rows, width, heads = bench.sizes.rows, bench.sizes.width, bench.sizes.heads
    item = bench.act.itemsize
    x, other, out = ([bench.normal(rows, width) for _ in range(COPIES)] for _ in range(3))
    weight = bench.normal(width, dtype=torch.float32)
    plain = [bench.launches([rmsnorm.prepare(x[i], weight, out[i], eps=1e-5)]) for i in range(COPIES)]
    added = [
        bench.launches(
            [
                rmsnorm.prepare(
                    x[i], weight, out[i], eps=1e-5, add=rmsnorm.Add.BEFORE, other=other[i], total=other[i]
                )
            ]
        )
        for i in range(COPIES)
    ]
    gates = [bench.launches([gated.prepare(x[i], other[i], out[i], gated.Gate.SILU)]) for i in range(COPIES)]
    angles = _angles(bench, rows)
    queries = [bench.normal(rows, heads.queries, heads.dim) for _ in range(COPIES)]
    keys = [bench.normal(rows, heads.keys, heads.dim) for _ in range(COPIES)]
    turns = [bench.launches([rope.prepare(queries[i], keys[i], angles)]) for i in range(COPIES)]
    of_heads = rows * (heads.queries + heads.keys) * heads.dim * item
    for name, calls, moved in (
        ("rmsnorm", plain, 2 * rows * width * item),
        ("rmsnorm with the residual added", added, 4 * rows * width * item),
        ("silu(gate) · up", gates, 3 * rows * width * item),
        ("rope in place", turns, 2 * of_heads + angles.nbytes),
    ):
        times = bench.time(calls)
        shape = f"[{rows:,}, {width:,}]" if "rope" not in name else f"{rows:,} tokens"
        share = bench.share_of_copy(moved, times)
        yield Row(f"{name}, {shape}", times, of_bytes(moved, times.median), share, "of copy")


def measure_append(bench: Bench) -> Iterator[Row]:
    """A chunk's keys and values into the cache, turned on the way, and its queries beside it."""
    heads, tokens = bench.sizes.heads, bench.sizes.rows
    wide = GpuKvFormat.BF16 if bench.rig.card.has_bf16_units else GpuKvFormat.F16
    angles, positions = _angles(bench, tokens), torch.arange(tokens, dtype=torch.int32, device=bench.device)
    qkv = bench.normal(tokens, heads.queries + 2 * heads.keys, heads.dim)
    queries = bench.empty(tokens, heads.queries, heads.dim)
    nobody = torch.zeros(tokens, dtype=torch.int32, device=bench.device)
    for kv_format in (wide, GpuKvFormat.INT8, GpuKvFormat.INT4):
        paged = PagedCache(bench, kv_format, 1, -(-tokens // BLOCK_SIZE) * BLOCK_SIZE, layers=COPIES)
        sizes = (heads.queries, heads.keys, heads.keys)
        calls = [
            bench.launches(
                [
                    kv_append.prepare(
                        paged.cache, layer, *qkv.split(sizes, 1), queries, positions=positions,
                        block_table=paged.block_table, table_rows=nobody, rope=RopeTable(angles),
                        hadamard=kv_format is GpuKvFormat.INT4,
                    )
                ]
            )
            for layer in range(COPIES)
        ]  # fmt: skip
        times = bench.time(calls)
        row = paged.layout.row_bytes + paged.layout.scale_bytes
        moved = qkv.nbytes + queries.nbytes + angles.nbytes + 2 * tokens * heads.keys * row
        share = bench.share_of_copy(moved, times)
        name = f"kv_append to {kv_format.name.lower()}, {tokens:,} tokens"
        yield Row(name, times, of_bytes(moved, times.median), share, "of copy")


def measure_sampler(bench: Bench, rows: int) -> Iterator[Row]:
    """A token for each row: the likeliest, drawn from all, and from the likeliest that have 0.95 of the mass."""
    vocab = bench.sizes.vocab
    logits = bench.normal(rows, vocab, dtype=torch.float32).mul_(2)
    ways = {
        "the likeliest": RowSettings(temperature=0.0),
        "temperature": RowSettings(temperature=0.8),
        "top-p 0.95": RowSettings(temperature=0.8, top_p=0.95),
        "top-k 40 and logprobs": RowSettings(temperature=0.8, top_k=40, logprobs=5),
    }
    counts = sample.make_counts(1, vocab, bench.device)
    kept: list[object] = []

    def choose(settings: RowSettings) -> Calls:
        written, room = make_rows(rows, 1, bench.device), sample.make_room(rows, vocab, 20, bench.device)
        written.write(pack_rows([settings] * rows, vocab))
        kept.extend((written, room))
        return [bench.launches(sample.prepare(logits, written, room, counts))] * COPIES

    works: dict[str, Callable[[], Calls]] = {name: partial(choose, settings) for name, settings in ways.items()}
    works["softmax by torch"] = lambda: [partial(torch.softmax, logits, -1)] * COPIES
    found = bench.compare(works)
    for name in works:
        if name not in found.times:
            yield Row(f"{rows} x {vocab:,}, {name}", reason=found.reasons[name])
            continue
        times = found.times[name]
        share = bench.share_of_read(logits.nbytes, times)
        yield Row(f"{rows} x {vocab:,}, {name}", times, share=share, of="of reading the logits")


def _angles(bench: Bench, rows: int) -> Tensor:
    turns = bench.normal(rows, bench.sizes.heads.dim // 2, dtype=torch.float32)
    return torch.stack((turns.cos(), turns.sin()), 1)
