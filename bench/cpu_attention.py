"""How fast the CPU kernels' attention reads the cache, beside what memory can do in the same minute and torch's path.

    python -m bench.cpu_attention [--threads 2] [--formats bf16,int8] [--groups 4] [--dims 128] [--block-size 16]
                                  [--blocks random|in-order] [--rounds 15] [--no-torch] [--prefill]

A decode step must read every key and value of its contexts once: a row says how many bytes that is, the rate at which
they went by, and the share of the read bandwidth measured in the same rounds. Small contexts stay in the processor's
cache from round to round, so their share may pass 100 %. Prefill is bound by arithmetic: its rows say GFLOP/s, beside
torch's scaled_dot_product_attention over contiguous keys, and over the paged cache as edgekv's torch path does it.

Figures from a busy machine are worth nothing: the load is printed.
"""

import argparse
import ctypes
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from bench.attention import Case, prepared
from edgekv.kernels.cpu import abi
from edgekv.kernels.cpu.abi import KvFormat
from edgekv.kernels.cpu.kv import KvLayout
from edgekv.kernels.cpu.library import load_library
from edgekv.kernels.cpu.program import Pool
from edgekv.kernels.pages import map_pages

FORMATS = {"f32": KvFormat.F32, "f16": KvFormat.F16, "bf16": KvFormat.BF16, "int8": KvFormat.INT8}
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
KV_HEADS = 8
READ_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Work:
    """`batch` sequences of `context` tokens, the last `tokens` of which are this step's."""

    kv_format: str
    batch: int
    context: int
    head_dim: int
    group: int
    tokens: int = 1

    def layout(self, block_size: int) -> KvLayout:
        """One layer."""
        return KvLayout(FORMATS[self.kv_format], 1, KV_HEADS, self.head_dim, block_size)

    @property
    def num_bytes(self) -> int:
        """Keys and values that are read at least, with their scales."""
        return self.batch * self.context * self.layout(16).block_bytes // 16

    @property
    def flops(self) -> int:
        """Of the two products, counting only what the mask lets through."""
        pairs = sum(range(self.context - self.tokens + 1, self.context + 1)) * self.batch
        return 4 * pairs * KV_HEADS * self.group * self.head_dim


class Native:
    """The work on a cache of its own; keeps all that the structures point to."""

    def __init__(self, work: Work, pool: Pool, block_size: int, in_order: bool) -> None:
        layout = work.layout(block_size)
        blocks = -(-work.context // block_size)
        total = work.batch * blocks
        self.pool = pool
        self.memory = np.frombuffer(map_pages(layout.segment_bytes(total), commit=True), np.uint8)
        rng = np.random.default_rng(0)
        planes, scales = layout.planes(self.memory), layout.scales(self.memory)
        rows = rng.standard_normal((block_size, work.head_dim), dtype=np.float32)
        for side in (0, 1):
            planes[:, side], scales[:, side] = layout.encode(rows, side)
        ids = np.arange(total) if in_order else rng.permutation(total)
        self.arrays = {
            "starts": np.full(work.batch, work.context - work.tokens),
            "lengths": np.full(work.batch, work.tokens),
            "first_rows": np.arange(work.batch) * work.tokens,
            "blocks": ids,
            "table_starts": np.arange(work.batch + 1) * blocks,
        }
        pointers = {name: array.ctypes.data for name, array in self.arrays.items()}
        count, narrow = work.batch * work.tokens, KV_HEADS * work.head_dim
        self.batch = abi.Batch(tokens=count, spans=work.batch, samples=0, **pointers)
        self.segments = (abi.Segment * 1)(abi.Segment(self.memory.ctypes.data, total))
        self.cache = abi.Cache(
            segments=ctypes.addressof(self.segments), num_segments=1, segment_shift=(total - 1).bit_length(),
            format=layout.kv_format, num_layers=1, kv_heads=KV_HEADS, head_dim=work.head_dim, block_size=block_size,
        )  # fmt: skip
        self.q, self.out = (rng.standard_normal((count, narrow * work.group), dtype=np.float32) for _ in range(2))
        self.k, self.v = (rng.standard_normal((count, narrow), dtype=np.float32) for _ in range(2))
        self.attend = abi.Attend(
            cache=ctypes.addressof(self.cache), batch=ctypes.addressof(self.batch), layer=0,
            heads=KV_HEADS * work.group, window=0, scale=work.head_dim**-0.5, softcap=0,
            q=self.q.ctypes.data, q_stride=self.q.shape[1], k=self.k.ctypes.data, k_stride=narrow,
            v=self.v.ctypes.data, v_stride=narrow, out=self.out.ctypes.data, out_stride=self.out.shape[1],
        )  # fmt: skip
        self.shared = np.empty(pool.attend_shared_bytes(self.attend), np.uint8)
        self.attend.shared = self.shared.ctypes.data

    def append(self) -> None:
        """The step's keys and values into the cache."""
        self.pool.run_attend(self.attend, attends=False)

    def __call__(self) -> None:
        """Attention alone."""
        self.pool.run_attend(self.attend, append=False)


def paged_torch(work: Work) -> Callable[[], None] | None:
    """The torch path over the same shapes; it appends, too, which is little."""
    if work.kv_format not in DTYPES:
        return None
    case = Case(
        "", (work.context - work.tokens,) * work.batch, work.tokens,
        kv_heads=KV_HEADS, group=work.group, head_dim=work.head_dim, dtype=DTYPES[work.kv_format],
    )  # fmt: skip
    step, layers = prepared(case)
    attention = step()
    return lambda: layers(attention)


def contiguous_torch(work: Work) -> Callable[[], None] | None:
    """Torch's attention over keys and values that lie end to end, the group as rows of a kv head."""
    if work.kv_format not in DTYPES or work.tokens != work.context:
        return None
    q = torch.randn(KV_HEADS, work.group, work.tokens, work.head_dim).to(DTYPES[work.kv_format])
    k, v = (torch.randn(KV_HEADS, 1, work.context, work.head_dim).to(q.dtype).expand_as(q) for _ in range(2))

    def run() -> None:
        F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return run


def seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def together(runs: list[Callable[[], object] | None], rounds: int) -> list[list[float]]:
    """Times of all of them, in turn; of those that are slow only some."""
    times: list[list[float]] = [[] for _ in runs]
    for run in runs:
        if run is not None:
            run()
    for turn in range(rounds):
        for run, measured in zip(runs, times, strict=True):
            if run is not None and (turn < 3 or sum(measured) < 1):
                measured.append(seconds(run))
    return times


def milliseconds(measured: list[float]) -> str:
    return f"{statistics.median(measured) * 1e3:.3f}" if measured else "-"


def row(*cells: object) -> None:
    print("".join(f"{cell!s:>11}" for cell in cells), flush=True)


def decode_table(works: list[Work], pool: Pool, options: argparse.Namespace) -> None:
    memory = np.frombuffer(map_pages(READ_BYTES, commit=True), np.uint8)
    row("format", "dim", "group", "batch", "context", "MB", "ms", "p10 ms", "GB/s", "read GB/s", "share", "torch ms")
    for work in works:
        native = Native(work, pool, options.block_size, options.blocks == "in-order")
        torch_path = None if options.no_torch else paged_torch(work)
        with torch.inference_mode():
            own, read, other = together(
                [native, lambda: pool.read(memory.ctypes.data, READ_BYTES), torch_path], options.rounds
            )
        rate, bandwidth = work.num_bytes / statistics.median(own), READ_BYTES / statistics.median(read)
        row(
            work.kv_format, work.head_dim, work.group, work.batch, work.context, f"{work.num_bytes / 1e6:.1f}",
            milliseconds(own), f"{np.percentile(own, 10) * 1e3:.3f}", f"{rate / 1e9:.1f}", f"{bandwidth / 1e9:.1f}",
            f"{rate / bandwidth:.0%}", milliseconds(other),
        )  # fmt: skip


def prefill_table(works: list[Work], pool: Pool, options: argparse.Namespace) -> None:
    row("format", "dim", "group", "tokens", "context", "ms", "GFLOP/s", "append ms", "SDPA ms", "paged ms")
    for work in works:
        native = Native(work, pool, options.block_size, options.blocks == "in-order")
        others = [None, None] if options.no_torch else [contiguous_torch(work), paged_torch(work)]
        with torch.inference_mode():
            own, append, sdpa, paged = together([native, native.append, *others], max(5, options.rounds // 2))
        row(
            work.kv_format, work.head_dim, work.group, work.tokens, work.context, milliseconds(own),
            f"{work.flops / statistics.median(own) / 1e9:.0f}", milliseconds(append), milliseconds(sdpa),
            milliseconds(paged),
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the CPU kernels' attention against this machine's memory.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--dims", default="64,128")
    parser.add_argument("--groups", default="1,4,8")
    parser.add_argument("--batches", default="1,8,16")
    parser.add_argument("--contexts", default="128,512,2048,8192")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--blocks", choices=("random", "in-order"), default="random")
    parser.add_argument("--prefill", action="store_true", help="prefill alone")
    parser.add_argument("--no-torch", action="store_true", help="our kernels alone")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dims, groups, batches, contexts = (
        [int(number) for number in text.split(",")]
        for text in (options.dims, options.groups, options.batches, options.contexts)
    )
    shapes = [(f, d, g) for f in options.formats.split(",") for d in dims for g in groups]
    pool = Pool(load_library(), options.threads)
    print(
        f"{pool.tier}, {pool.threads} threads, {KV_HEADS} kv heads, blocks of {options.block_size} {options.blocks},"
        f" medians of {options.rounds}; load average {os.getloadavg()[0]:.2f}"
    )
    if options.prefill:
        sizes = ((512, 512), (512, 2048), (2048, 2048), (8, 2048))
        prefill_table([Work(f, 1, c, d, g, n) for f, d, g in shapes for n, c in sizes], pool, options)
    else:
        decode_table([Work(f, b, c, d, g) for f, d, g in shapes for b in batches for c in contexts], pool, options)
    print(f"load average {os.getloadavg()[0]:.2f}")


if __name__ == "__main__":
    main()
