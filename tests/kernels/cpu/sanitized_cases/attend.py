"""Append and attention of a few steps, in memory that ends where the batch, the cache and its scratch do."""

import ctypes

import numpy as np

from edgekv.kernels.cpu import abi
from edgekv.kernels.cpu.abi import KvFormat
from edgekv.kernels.cpu.kv import KvLayout
from tests.kernels.cpu.sanitized_cases._memory import any_pool, guarded, library


def run(rng: np.random.Generator) -> None:
    layout = KvLayout(
        kv_format=KvFormat(int(rng.integers(0, 4))),
        num_layers=int(rng.integers(1, 3)),
        num_kv_heads=int(rng.integers(1, 4)),
        head_dim=16 * int(rng.choice([1, 2, 3, 5, 8, 16], p=[0.3, 0.3, 0.1, 0.1, 0.1, 0.1])),
        block_size=16 * int(rng.integers(1, 5)),
    )
    group = int(rng.choice([1, 2, 3, 4, 7, 16, 70], p=[0.2, 0.2, 0.2, 0.2, 0.1, 0.05, 0.05]))
    lengths = [int(rng.choice([1, 17, 40, 90]))] + [int(rng.integers(1, 40)) for _ in range(rng.integers(0, 3))]
    if rng.integers(0, 4) == 0:
        lengths[0] += 512  # a second part
    sequences = _Sequences(layout, lengths, rng)
    handle = any_pool(rng)
    # A chunk of each sequence, then what is left of some.
    for last in (False, True):
        spans = [i for i in range(len(lengths)) if not last or rng.integers(0, 2)]
        counts = [lengths[i] - sequences.done[i] if last else int(rng.integers(1, lengths[i] + 1)) for i in spans]
        work = [(i, count) for i, count in zip(spans, counts, strict=True) if count]
        if work:
            sequences.step(handle, work, layout.num_kv_heads * group, rng)


class _Sequences:
    """Segments of a cache, one of them missing, and block tables over it."""

    def __init__(self, layout: KvLayout, lengths: list[int], rng: np.random.Generator) -> None:
        self.layout, self.done = layout, [0] * len(lengths)
        needed = [-(-length // layout.block_size) for length in lengths]
        sizes = [int(rng.integers(1, 9)) for _ in range(3)]
        sizes[int(rng.integers(0, 3))] = 0
        sizes.append(max(0, sum(needed) - sum(sizes)) + 1)
        self.shift = (max(sizes) - 1).bit_length()
        self.memory = [guarded(layout.segment_bytes(size), np.uint8) for size in sizes]
        for data in self.memory:
            data[:] = 0xFF
        blocks = [index << self.shift | block for index, size in enumerate(sizes) for block in range(size)]
        order = rng.permutation(blocks)
        self.tables = np.split(order[: sum(needed)], np.cumsum(needed)[:-1])
        self.segments = (abi.Segment * len(sizes))(
            *(abi.Segment(data.ctypes.data if size else None, size)
              for data, size in zip(self.memory, sizes, strict=True))
        )  # fmt: skip
        self.cache = abi.Cache(
            segments=ctypes.addressof(self.segments), num_segments=len(sizes), segment_shift=self.shift,
            format=layout.kv_format, num_layers=layout.num_layers, kv_heads=layout.num_kv_heads,
            head_dim=layout.head_dim, block_size=layout.block_size,
        )  # fmt: skip

    def step(self, handle: int, work: list[tuple[int, int]], heads: int, rng: np.random.Generator) -> None:
        """One layer of a step that appends so many tokens to these sequences."""
        lengths = [count for _, count in work]
        ends = [self.done[i] + count for i, count in work]
        tables = [self.tables[i][: -(-end // self.layout.block_size)] for (i, _), end in zip(work, ends, strict=True)]
        arrays = {
            "starts": [self.done[i] for i, _ in work],
            "lengths": lengths,
            "first_rows": np.cumsum(lengths) - lengths,
            "blocks": np.concatenate(tables),
            "table_starts": np.cumsum([0, *map(len, tables)]),
        }
        kept = {}
        for name, numbers in arrays.items():
            kept[name] = guarded(len(np.asarray(numbers)), np.int64)
            kept[name][:] = numbers
        pointers = {name: array.ctypes.data for name, array in kept.items()}
        batch = abi.Batch(tokens=sum(lengths), spans=len(work), samples=0, **pointers)
        narrow = self.layout.num_kv_heads * self.layout.head_dim
        widths = {"q": heads * self.layout.head_dim, "k": narrow, "v": narrow, "out": heads * self.layout.head_dim}
        rows = {}
        for name, width in widths.items():
            stride = width + int(rng.integers(0, 5))
            rows[name] = guarded((sum(lengths), stride), np.float32, last=width)
            rows[name].ravel()[: stride * (sum(lengths) - 1) + width] = rng.standard_normal()
        attend = abi.Attend(
            cache=ctypes.addressof(self.cache), batch=ctypes.addressof(batch),
            layer=int(rng.integers(0, self.layout.num_layers)), heads=heads,
            window=int(rng.choice([0, 1, 20, 500])), scale=0.3, softcap=float(rng.choice([0, 10])),
            **{name: array.ctypes.data for name, array in rows.items()},
            **{f"{name}_stride": array.shape[1] for name, array in rows.items()},
        )  # fmt: skip
        functions = library().functions
        num_bytes = functions.ek_attend_shared_bytes(ctypes.byref(attend), functions.ek_pool_threads(handle))
        shared = guarded(num_bytes, np.uint8)
        shared[:] = rng.integers(0, 256)
        attend.shared = shared.ctypes.data
        assert functions.ek_attend_run(handle, ctypes.byref(attend), 1, 1) == 0
        for i, count in work:
            self.done[i] += count
