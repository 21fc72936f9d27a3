"""How fast single kernels are: the compiled library's, and torch's for the same work.

Runs in: the thread that owns the pool; owns: the memory that the kernels work on. A kernel of a model never finds its
weights or its cache in the processor's caches, because a whole step's worth of others came in between. So each case
goes over so many matrices, or layers, that together they are far larger than those.
"""

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from edgekv.engine.kv_pool import KVPool, PoolShape
from edgekv.kernels.attn.paged_torch import PagedAttention
from edgekv.kernels.attn.ragged import RaggedBatch
from edgekv.kernels.attn.workspace import Workspace
from edgekv.kernels.cpu import abi
from edgekv.kernels.cpu.cache import FORMATS
from edgekv.kernels.cpu.formats import ALIGNMENT, activation_form, activation_stride, panel_bytes, panel_format
from edgekv.kernels.cpu.kv import KvLayout
from edgekv.kernels.cpu.program import Pool
from edgekv.kernels.pages import map_pages
from edgekv.kernels.quant.encodings import ENCODINGS

ARENA_BYTES = 384 << 20
MOST_COPIES = 64
MANY_TOKENS = 64  # from here on arithmetic is what takes time, not memory
LEAST_S, LEAST_PASSES = 0.25, 2
BLOCK_SIZE = 16
TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class LinearCase:
    """[tokens, cols] through a matrix of [rows, cols] that is stored in an encoding."""

    encoding: str
    rows: int
    cols: int
    tokens: int

    @property
    def num_bytes(self) -> int:
        """Of the panels."""
        encoding = ENCODINGS[self.encoding]
        return panel_bytes(panel_format(encoding), self.rows, self.cols, encoding.group)

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.rows * self.cols * self.tokens


@dataclass(frozen=True, slots=True)
class AttentionCase:
    """`batch` sequences of `context` tokens each get `tokens` more, in one layer."""

    kv_dtype: str
    heads: int
    kv_heads: int
    head_dim: int
    batch: int
    context: int
    tokens: int = 1

    @property
    def num_blocks(self) -> int:
        """Of one sequence."""
        return -(-(self.context + self.tokens) // BLOCK_SIZE)

    @property
    def num_bytes(self) -> int:
        """Keys and values of the layer, with their scales."""
        return self.batch * (self.context + self.tokens) * self.layout(1).block_bytes // BLOCK_SIZE

    @property
    def flops(self) -> int:
        """Of the two products, counting only what a token sees."""
        pairs = self.tokens * self.context + self.tokens * (self.tokens + 1) // 2
        return 4 * self.batch * pairs * self.heads * self.head_dim

    def layout(self, num_layers: int) -> KvLayout:
        """Of a cache with so many layers."""
        return KvLayout(FORMATS[self.kv_dtype], num_layers, self.kv_heads, self.head_dim, BLOCK_SIZE)

    @property
    def num_layers(self) -> int:
        """As many as are far more than any cache holds."""
        segment = self.batch * self.num_blocks * self.layout(1).block_bytes
        return max(1, min(MOST_COPIES, ARENA_BYTES // segment))


class NativeKernels:
    """The compiled library's, on the threads of a pool. Each case is one program of nothing but that operation."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._arena = _small_numbers(ARENA_BYTES)

    def linear(self, case: LinearCase) -> list[float]:
        """Seconds of each of many calls."""
        encoding = ENCODINGS[case.encoding]
        panels, size = panel_format(encoding), -(-case.num_bytes // ALIGNMENT) * ALIGNMENT
        copies = 2 if case.tokens >= MANY_TOKENS else max(1, min(MOST_COPIES, ARENA_BYTES // size))
        if copies * size > len(self._arena):
            self._arena = _small_numbers(copies * size)
        matrices = (abi.Matrix * copies)(
            *(
                abi.Matrix(self._arena.data_ptr() + size * copy, panels, case.rows, case.cols, encoding.group)
                for copy in range(copies)
            )
        )
        ops = [abi.Op(kind=abi.OpKind.PREPARE, src=0, width=case.cols, forms=activation_form(panels))]
        ops += [
            abi.Op(kind=abi.OpKind.LINEAR, dst=1, width=case.cols, num_parts=1, parts=ctypes.addressof(matrix))
            for matrix in matrices
        ]
        step = _Step(case.tokens, (case.cols, case.rows))
        step.prepare(case.cols)
        return self._measure(ops, abi.Program(heads=1, kv_heads=1, head_dim=2), step)[1:].ravel().tolist()

    def attention(self, case: AttentionCase) -> list[float]:
        """Seconds of each of many calls, one a layer."""
        num_layers, num_blocks = case.num_layers, case.batch * case.num_blocks
        if num_blocks * case.layout(num_layers).block_bytes > len(self._arena):
            self._arena = _small_numbers(num_blocks * case.layout(num_layers).block_bytes)
        segment = abi.Segment(self._arena.data_ptr(), num_blocks)
        cache = abi.Cache(
            ctypes.addressof(segment), 1, num_blocks.bit_length(), FORMATS[case.kv_dtype], num_layers, case.kv_heads,
            case.head_dim, BLOCK_SIZE,
        )  # fmt: skip
        width = (case.heads + 2 * case.kv_heads) * case.head_dim
        step = _Step(case.batch * case.tokens, (width, case.heads * case.head_dim))
        step.attend(cache, _batch(case), case.heads, self._pool)
        ops = [
            abi.Op(kind=abi.OpKind.ATTEND, src=0, dst=1, width=width, layer=layer, scale=case.head_dim**-0.5)
            for layer in range(num_layers)
        ]
        program = abi.Program(heads=case.heads, kv_heads=case.kv_heads, head_dim=case.head_dim, rope_dim=case.head_dim)
        return self._measure(ops, program, step).ravel().tolist()

    def _measure(self, ops: list[abi.Op], program: abi.Program, step: "_Step") -> npt.NDArray[np.float64]:
        """Seconds by operation and pass."""
        array = (abi.Op * len(ops))(*ops)
        program.ops, program.num_ops = ctypes.addressof(array), len(array)
        spent = np.zeros(len(array), np.int64)
        step.struct.op_ns = _address(spent)
        passes: list[npt.NDArray[np.int64]] = []

        def run() -> None:
            spent[:] = 0
            self._pool.run(program, step.struct)
            passes.append(spent.copy())

        _repeat(run)
        return np.stack(passes[1:], axis=1) / 1e9


class TorchKernels:
    """What torch's path does instead: bfloat16 weights whatever they were stored in, attention by gather and SDPA."""

    def __init__(self) -> None:
        self._arena = torch.full((ARENA_BYTES // 2,), 0.01, dtype=torch.bfloat16)

    @torch.inference_mode()
    def linear(self, case: LinearCase) -> list[float]:
        """Seconds of each of many calls."""
        size = case.rows * case.cols
        copies = 2 if case.tokens >= MANY_TOKENS else max(1, min(MOST_COPIES, ARENA_BYTES // 2 // size))
        if copies * size > len(self._arena):
            self._arena = torch.full((copies * size,), 0.01, dtype=torch.bfloat16)
        weights = [self._arena[size * copy : size * (copy + 1)].view(case.rows, case.cols) for copy in range(copies)]
        rows = torch.randn(case.tokens, case.cols).bfloat16()
        times: list[float] = []

        def run() -> None:
            for weight in weights:
                times.append(_timed(partial(F.linear, rows, weight)))

        _repeat(run)
        return times[copies:]

    @torch.inference_mode()
    def attention(self, case: AttentionCase) -> list[float]:
        """Seconds of each of many calls, one a layer; `kv_dtype` is one that torch's pool has."""
        num_layers, num_blocks = case.num_layers, case.batch * case.num_blocks
        dtype = TORCH_DTYPES[case.kv_dtype]
        pool = KVPool(
            PoolShape(num_layers, case.kv_heads, case.head_dim), dtype=dtype, device=torch.device("cpu"),
            block_size=BLOCK_SIZE, segment_blocks=1 << (num_blocks - 1).bit_length(),
        )  # fmt: skip
        index = pool.add_segment(num_blocks)
        pool.cache.segments[index].data.fill_(0.01)
        attention = PagedAttention(pool.cache, _batch(case), Workspace(torch.device("cpu")))
        rows = case.batch * case.tokens
        q = torch.randn(rows, case.heads, case.head_dim).to(dtype)
        k, v = (torch.randn(rows, case.kv_heads, case.head_dim).to(dtype) for _ in range(2))
        times: list[float] = []

        def run() -> None:
            for layer in range(num_layers):
                times.append(_timed(partial(attention, layer, q, k, v, scale=case.head_dim**-0.5)))

        _repeat(run)
        return times[num_layers:]


class _Step:
    """An ek_step over two buffers: what is read, and what is written."""

    def __init__(self, tokens: int, widths: tuple[int, int]) -> None:
        strides = [activation_stride(width, 4) for width in widths]
        self._tokens = tokens
        self._rows = [torch.randn(tokens, stride) for stride in strides]
        self._buffers = (abi.Buffer * 2)(*(abi.Buffer(row.data_ptr(), row.shape[1]) for row in self._rows))
        self._ids = np.zeros(tokens, np.int64)
        self._kept: list[object] = []
        self._batch = abi.Batch(tokens=tokens, token_ids=_address(self._ids), positions=_address(self._ids))
        self.struct = abi.Step(batch=ctypes.addressof(self._batch), buffers=ctypes.addressof(self._buffers))

    def prepare(self, cols: int) -> None:
        """Room for prepared activations of every form."""
        acts, groups = self.struct.prepared, -(-cols // abi.GROUP)
        for name, itemsize in (("f32", 4), ("bf16", 2), ("q8", 1)):
            stride = activation_stride(cols, itemsize)
            setattr(acts, name, self._room(self._tokens * stride * itemsize))
            setattr(acts, f"{name}_stride", stride)
        acts.group_stride = groups
        acts.q8_scale, acts.q8_sum = self._room(4 * self._tokens * groups), self._room(4 * self._tokens * groups)

    def attend(self, cache: abi.Cache, ragged: RaggedBatch, heads: int, pool: Pool) -> None:
        """The cache and where the sequences are in it."""
        batch, self._kept = self._batch, [*self._kept, cache, ragged]
        batch.spans = ragged.num_spans
        for name in ("positions", "starts", "lengths", "first_rows", "blocks", "table_starts"):
            array = np.ascontiguousarray(getattr(ragged, name), np.int64)
            self._kept.append(array)
            setattr(batch, name, _address(array))
        self.struct.cache = ctypes.addressof(cache)
        attend = abi.Attend(cache=ctypes.addressof(cache), batch=ctypes.addressof(batch), heads=heads)
        self.struct.attend_shared = self._room(pool.attend_shared_bytes(attend))

    def _room(self, num_bytes: int) -> int:
        memory = torch.zeros(num_bytes + ALIGNMENT, dtype=torch.uint8)
        self._kept.append(memory)
        return (memory.data_ptr() + ALIGNMENT - 1) & -ALIGNMENT


def _small_numbers(num_bytes: int) -> Tensor:
    """Bytes that are small numbers whatever they are read as, never infinite and never denormal.

    On pages as weights and caches have them: small ones are read more slowly.
    """
    return torch.frombuffer(map_pages(num_bytes, commit=False), dtype=torch.uint8).random_(0x28, 0x30)


def _batch(case: AttentionCase) -> RaggedBatch:
    """Blocks in random order, as in a pool that has been used."""
    tables = np.arange(case.batch + 1) * case.num_blocks
    return RaggedBatch(
        starts=np.full(case.batch, case.context),
        lengths=np.full(case.batch, case.tokens),
        blocks=np.random.default_rng(0).permutation(case.batch * case.num_blocks),
        table_starts=tables,
    )


def _repeat(run: Callable[[], None]) -> None:
    """Once to warm up, then until there is enough to say something."""
    run()
    begun, passes = time.perf_counter(), 0
    while passes < LEAST_PASSES or time.perf_counter() - begun < LEAST_S:
        run()
        passes += 1


def _timed(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def _address(array: npt.NDArray[np.int64]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address
