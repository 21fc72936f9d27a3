"""How fast paged attention moves the cache, beside what this machine's memory can do in the same minute.

    python -m bench.attention [--threads 2] [--rounds 15] [--quick]

A decode step must read every key and value of its contexts once; its row says how many bytes that is, the rate at
which they went by and the share of the read bandwidth measured in the same run. Prefill is bound by arithmetic: its
row says GFLOP/s. The last table is the time of one layer of a small model, which is all bookkeeping.

Figures from a busy machine are worth nothing: the load is printed.
"""

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from edgekv.engine.kv_pool import KVPool, PoolShape
from edgekv.kernels.attn.paged_torch import PagedAttention
from edgekv.kernels.attn.ragged import RaggedBatch
from edgekv.kernels.attn.workspace import Workspace


@dataclass(frozen=True, slots=True)
class Case:
    """Sequences with these contexts each get `tokens` more; blocks in random order unless `in_order`."""

    name: str
    contexts: tuple[int, ...]
    tokens: int = 1
    kv_heads: int = 8
    group: int = 4
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    window: int | None = None
    softcap: float | None = None
    num_segments: int = 1
    in_order: bool = False

    @property
    def attended_tokens(self) -> int:
        """Keys that must be read at least."""
        return sum(
            min(context + self.tokens, (self.window or context + self.tokens) + self.tokens - 1)
            for context in self.contexts
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of those keys and of their values."""
        return self.attended_tokens * 2 * self.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def flops(self) -> int:
        """Of the two products, counting only what the mask lets through."""
        pairs = 0
        for context in self.contexts:
            for position in range(context, context + self.tokens):
                pairs += min(position + 1, self.window or position + 1)
        return 4 * pairs * self.kv_heads * self.group * self.head_dim


DECODE = (
    Case("8 x 2048", (2047,) * 8),
    Case("8 x 2048, blocks in order", (2047,) * 8, in_order=True),
    Case("8 x 2048, 4 segments, shuffled", (2047,) * 8, num_segments=4),
    Case("8 x 2048, 4 segments, in order", (2047,) * 8, num_segments=4, in_order=True),
    Case("1 x 2048", (2047,)),
    Case("1 x 16384", (16383,)),
    Case("32 x 256", (255,) * 32),
    Case("32 x 30 .. 1000", tuple(range(30, 1000, 31))),
    Case("8 x 2048, window 512", (2047,) * 8, window=512),
    Case("8 x 2048, soft cap", (2047,) * 8, softcap=50.0),
    Case("8 x 2048, float32", (2047,) * 8, dtype=torch.float32),
    Case("8 x 2048, float16", (2047,) * 8, dtype=torch.float16),
)
PREFILL = (
    Case("512 from 0", (0,), 512),
    Case("512 from 1536", (1536,), 512),
    Case("512 from 7680", (7680,), 512),
    Case("2048 from 0", (0,), 2048),
    Case("16 x 32 from 0", (0,) * 16, 32),
    Case("512 from 7680, window 512", (7680,), 512, window=512),
    Case("512 from 1536, soft cap", (1536,), 512, softcap=50.0),
    Case("512 from 1536, float16", (1536,), 512, dtype=torch.float16),
)
SMALL = (
    Case("1 x 100", (100,), kv_heads=4, group=2, head_dim=32, dtype=torch.float32),
    Case("8 x 100", (100,) * 8, kv_heads=4, group=2, head_dim=32, dtype=torch.float32),
    Case("64 x 30 .. 300", tuple(range(30, 300, 5))[:64], kv_heads=4, group=2, head_dim=32, dtype=torch.float32),
)


def timed(run: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Median and tenth percentile, seconds."""
    run()
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return statistics.median(times), float(np.percentile(times, 10))


def read_bandwidth(rounds: int) -> float:
    """Bytes a second that all threads together read: the sum of 256 MiB of float32."""
    data = torch.ones(64 << 20)
    return data.numel() * 4 / timed(lambda: data.sum(), rounds)[1]


def prepared(case: Case, num_layers: int = 1) -> tuple[Callable[[], PagedAttention], Callable[[PagedAttention], None]]:
    """What a step does once (the first of its layers builds the work list), and what it does in its layers."""
    size = 16
    tables_sizes = [-(-(context + case.tokens) // size) for context in case.contexts]
    total = sum(tables_sizes)
    per_segment = -(-total // case.num_segments)
    segment_blocks = 1 << (per_segment - 1).bit_length()
    pool = KVPool(
        PoolShape(num_layers, case.kv_heads, case.head_dim),
        dtype=case.dtype,
        device=torch.device("cpu"),
        block_size=size,
        segment_blocks=segment_blocks,
    )
    for _ in range(case.num_segments):
        index = pool.add_segment(per_segment)
        pool.cache.segments[index].data.normal_()
    shift = pool.cache.segment_shift
    blocks = np.array([s << shift | b for s in range(case.num_segments) for b in range(per_segment)])[:total]
    if not case.in_order:
        # In order of segments within a sequence, as it grows from one into the next.
        blocks = np.random.default_rng(0).permutation(blocks)
    starts = np.cumsum([0, *tables_sizes])
    tables = [blocks[a:b] for a, b in itertools.pairwise(starts.tolist())]
    if not case.in_order:
        tables = [table[np.argsort(table >> shift, kind="stable")] for table in tables]
    batch = RaggedBatch(
        starts=np.array(case.contexts),
        lengths=np.full(len(case.contexts), case.tokens),
        blocks=np.concatenate(tables),
        table_starts=starts,
    )
    rows = case.tokens * len(case.contexts)
    q = torch.randn(rows, case.kv_heads * case.group, case.head_dim).to(case.dtype)
    k, v = (torch.randn(rows, case.kv_heads, case.head_dim).to(case.dtype) for _ in range(2))
    workspace = Workspace(torch.device("cpu"))
    scale = case.head_dim**-0.5

    def layers(attention: PagedAttention) -> None:
        for layer in range(num_layers):
            attention(layer, q, k, v, scale=scale, window=case.window, softcap=case.softcap)

    return lambda: PagedAttention(pool.cache, batch, workspace), layers


def load() -> str:
    return f"load average {os.getloadavg()[0]:.2f}"


def row(*cells: object) -> None:
    print(f"{cells[0]!s:36}" + "".join(f"{cell!s:>14}" for cell in cells[1:]))


def decode_table(cases: Sequence[Case], rounds: int) -> None:
    bandwidth = read_bandwidth(rounds)
    print(f"\ndecode, one layer, {load()}; memory reads {bandwidth / 1e9:.1f} GB/s")
    row("8 kv heads x 128, 32 heads, bf16", "MB to read", "median ms", "p10 ms", "GB/s", "of bandwidth")
    for case in cases:
        step, layers = prepared(case)
        attention = step()
        median, best = timed(partial(layers, attention), rounds)
        rate = case.num_bytes / median
        cells = (f"{case.num_bytes / 1e6:.1f}", f"{median * 1e3:.2f}", f"{best * 1e3:.2f}", f"{rate / 1e9:.1f}")
        row(case.name, *cells, f"{rate / bandwidth:.0%}")
    print(f"{load()}; memory reads {read_bandwidth(rounds) / 1e9:.1f} GB/s")


def prefill_table(cases: Sequence[Case], rounds: int) -> None:
    side = torch.randn(2048, 2048).bfloat16()
    product = 2 * 2048**3 / timed(lambda: side @ side, rounds)[1]
    print(f"\nprefill, one layer, {load()}; a 2048-cubed bf16 product runs at {product / 1e9:.0f} GFLOP/s")
    row("8 kv heads x 128, 32 heads, bf16", "GFLOP", "median ms", "p10 ms", "GFLOP/s", "of product")
    for case in cases:
        step, layers = prepared(case)
        attention = step()
        median, best = timed(partial(layers, attention), rounds)
        rate = case.flops / median
        cells = (f"{case.flops / 1e9:.2f}", f"{median * 1e3:.2f}", f"{best * 1e3:.2f}", f"{rate / 1e9:.0f}")
        row(case.name, *cells, f"{rate / product:.0%}")


def small_table(cases: Sequence[Case], rounds: int, num_layers: int = 6) -> None:
    print(f"\nbookkeeping: {num_layers} layers of 4 kv heads x 32, float32, {load()}")
    row("", "once, us", "layers, us")
    for case in cases:
        step, layers = prepared(case, num_layers)
        attention = step()
        layers(attention)
        once, _ = timed(step, rounds * 10)
        each, _ = timed(partial(layers, attention), rounds * 10)
        row(case.name, f"{once * 1e6:.0f}", f"{each * 1e6:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure paged attention against this machine's memory.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="the first case of each table only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} threads, medians of {options.rounds}")
    last = 1 if options.quick else None
    with torch.inference_mode():
        decode_table(DECODE[:last], options.rounds)
        prefill_table(PREFILL[:last], max(3, options.rounds // 3))
        small_table(SMALL[:last], options.rounds)


if __name__ == "__main__":
    main()
