"""What the card's memory and matrix units can do: everything else is told as a share of that.

Runs in: the main thread; owns: nothing.
"""

from collections.abc import Iterator
from functools import partial

import torch

from bench.gpu.bench import Bench, NotMeasured
from bench.gpu.row import Row, Times, of_bytes, of_flops


def measure_bandwidth(bench: Bench) -> Iterator[Row]:
    """Reading alone by the best of torch's reductions, and copying. The bench keeps what is found."""
    size = bench.sizes.stream_bytes
    bench.need(2 * size)
    source, target = bench.normal(size // 4, dtype=torch.float32), bench.empty(size // 4, dtype=torch.float32)
    halves = source.view(2, -1)
    found = bench.compare(
        {
            "sum": lambda: [partial(torch.sum, source)],
            "amax": lambda: [partial(torch.amax, source)],
            "dot": lambda: [partial(torch.dot, halves[0], halves[1])],
            "sum of rows": lambda: [partial(torch.sum, source.view(-1, source.numel() // 1024), 1)],
            "copy": lambda: [partial(target.copy_, source)],
        }
    )
    readers = {name: times for name, times in found.times.items() if name != "copy"}
    if not readers:
        raise NotMeasured(found.reasons["sum"])
    name, read = min(readers.items(), key=lambda each: each[1].median)
    bench.read_bytes_s = size / read.median
    yield Row("read", read, of_bytes(size, read.median), note=f"torch's {name} of {size / 2**30:.2f} GiB")
    copy = found.of("copy")
    bench.copy_bytes_s = 2 * size / copy.median
    if bench.copy_bytes_s > bench.read_bytes_s:
        # Then it is the reduction that is slow, and not the memory.
        bench.read_bytes_s = bench.copy_bytes_s
    share = bench.copy_bytes_s / bench.read_bytes_s
    yield Row("copy", copy, of_bytes(2 * size, copy.median), share, "of read", note="bytes read and written")


def measure_product(bench: Bench) -> Iterator[Row]:
    """A large product of what models compute in; the bench keeps what is found."""
    n = bench.sizes.matmul
    a, b = bench.normal(n, n), bench.normal(n, n)
    out = torch.empty_like(a)
    times: Times = bench.time([partial(torch.mm, a, b, out=out)] * 4)
    bench.flops_s = 2 * n**3 / times.median
    yield Row(f"product of [{n:,}, {n:,}]", times, of_flops(2 * n**3, times.median), note=str(bench.act))
