"""What launching costs: the host's time for a launch, and the card's between two that a graph has.

Runs in: the main thread; owns: nothing.
"""

import time
from collections.abc import Callable, Iterator

import torch

from bench.gpu.bench import Bench
from bench.gpu.row import Row, Target, Times
from edgekv.kernels.fused import rope

HOST_S = Target(3e-6, 1e-6, is_most=True)


def measure_launches(bench: Bench) -> Iterator[Row]:
    """A kernel with next to nothing to do."""
    heads, count = bench.sizes.heads, bench.sizes.launches
    q, k = bench.normal(1, heads.queries, heads.dim), bench.normal(1, heads.keys, heads.dim)
    angles = torch.zeros(1, 2, heads.dim // 2, device=bench.device)
    prepared = rope.prepare(q, k, angles)
    card = bench.rig.card
    launcher, stream = card.launchers.launcher(prepared.spec), card.stream
    own = _on_host(bench, lambda: launcher(prepared.grid, prepared.args, stream), count)
    yield Row("a launch of ours, on the host", own, target=HOST_S)
    theirs = _on_host(bench, lambda: angles.add_(0.0), count)
    yield Row("one of torch's (add_), on the host", theirs)
    again = bench.launches([prepared])

    def many() -> None:
        for _ in range(count):
            again()

    within = bench.rig.pass_of(many)
    samples = Times(tuple(within.seconds() / count for _ in range(bench.sizes.rounds[0])))
    note = "" if within.captured else "could not be captured"
    yield Row(f"a launch within a graph of {count}, on the card", samples, note=note)
    graph = card.capture(many, card)
    yield Row(f"putting a graph of {count} on the stream, on the host", _on_host(bench, graph.replay, 5))


def _on_host(bench: Bench, call: Callable[[], object], count: int) -> Times:
    """Seconds of a call, in batches that no queue is too short for."""
    samples = []
    for _ in range(max(5, bench.sizes.rounds[0]) if bench.rig.is_real else 1):
        bench.rig.wait()
        begun = time.perf_counter()
        for _ in range(count):
            call()
        samples.append((time.perf_counter() - begun) / count)
    bench.rig.wait()
    return Times(tuple(samples))
