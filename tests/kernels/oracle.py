"""Attention as the formula says it, in float64 for one sequence, and a ragged batch of sequences over a paged cache."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from edgekv.core.step import BlockCopy
from edgekv.engine.kv_pool import KVPool, PoolShape
from edgekv.kernels.attn.paged_torch import PagedAttention
from edgekv.kernels.attn.ragged import RaggedBatch
from edgekv.kernels.attn.workspace import Workspace


def attend(
    q: Tensor, keys: Tensor, values: Tensor, *, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """The last queries of a context: q [tokens, heads, dim], keys and values [context, kv_heads, dim], in float64."""
    group = q.shape[1] // keys.shape[1]
    wide_keys = keys.double().repeat_interleave(group, 1)
    wide_values = values.double().repeat_interleave(group, 1)
    scores = torch.einsum("thd,chd->htc", q.double(), wide_keys) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    behind = torch.arange(len(keys) - len(q), len(keys))[:, None] - torch.arange(len(keys))  # query minus key position
    hidden = (behind < 0) if window is None else (behind < 0) | (behind >= window)
    return torch.einsum("htc,chd->thd", scores.masked_fill(hidden, -torch.inf).softmax(-1), wide_values)


@dataclass
class Setting:
    """The shape of the attention under test."""

    kv_heads: int = 2
    group: int = 2
    head_dim: int = 16
    block_size: int = 16
    segment_blocks: int = 8
    dtype: torch.dtype = torch.float32
    window: int | None = None
    softcap: float | None = None
    num_layers: int = 2

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.head_dim)


@dataclass(eq=False)
class Talk:
    """One sequence: its block table, and the keys and values that it has appended so far (what the oracle sees)."""

    table: list[int]
    keys: Tensor
    values: Tensor
    length: int = 0


@dataclass
class Bench:
    """A poisoned pool whose free blocks are handed out in random order, and the sequences on it."""

    setting: Setting
    segments: Iterable[int]
    seed: int = 0
    holes: Sequence[int] = ()
    pool: KVPool = field(init=False)

    def __post_init__(self) -> None:
        setting = self.setting
        self.rng = np.random.default_rng(self.seed)
        self.generator = torch.Generator().manual_seed(self.seed)
        self.pool = KVPool(
            PoolShape(setting.num_layers, setting.kv_heads, setting.head_dim),
            dtype=setting.dtype,
            device=torch.device("cpu"),
            block_size=setting.block_size,
            segment_blocks=setting.segment_blocks,
        )
        for num_blocks in self.segments:
            self.pool.add_segment(num_blocks)
        for index in self.holes:
            self.pool.remove_segment(index)
        shift = self.pool.cache.segment_shift
        free = [index << shift | block for index, size in self.pool.segments.items() for block in range(size)]
        self.free: list[int] = self.rng.permutation(free).tolist()
        self.pool.poison(self.free)
        self.workspace = Workspace(torch.device("cpu"))

    def talk(self) -> Talk:
        """A new, empty sequence."""
        setting = self.setting
        empty = torch.empty(setting.num_layers, 0, setting.kv_heads, setting.head_dim, dtype=setting.dtype)
        return Talk([], empty, empty)

    def copy_last_block(self, talk: Talk) -> Talk:
        """A fork that shares all full blocks and has a copy of the last, partly filled one."""
        table, written = list(talk.table), talk.length % self.setting.block_size
        if written:
            table[-1] = self.free.pop()
            self.pool.copy([BlockCopy(talk.table[-1], table[-1], written)])
        return Talk(table, talk.keys, talk.values, talk.length)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.setting.dtype)

    def step(self, work: Sequence[tuple[Talk, int]]) -> list[Tensor]:
        """Append random tokens to each sequence in one batch; results of all layers, [layers, tokens, heads, dim]."""
        setting = self.setting
        for talk, tokens in work:
            blocks = -(-(talk.length + tokens) // setting.block_size)
            while len(talk.table) < blocks:
                talk.table.append(self.free.pop())
        attention = PagedAttention(self.pool.cache, ragged(work), self.workspace)
        total = sum(tokens for _, tokens in work)
        k = self.random(setting.num_layers, total, setting.kv_heads, setting.head_dim)
        v = self.random(setting.num_layers, total, setting.kv_heads, setting.head_dim)
        q = self.random(setting.num_layers, total, setting.kv_heads * setting.group, setting.head_dim)
        row = 0
        self.queries: list[Tensor] = []
        for talk, tokens in work:
            rows = slice(row, row + tokens)
            talk.keys, talk.values = torch.cat((talk.keys, k[:, rows]), 1), torch.cat((talk.values, v[:, rows]), 1)
            talk.length += tokens
            self.queries.append(q[:, rows])
            row += tokens
        results = [
            attention(i, q[i], k[i], v[i], scale=setting.scale, window=setting.window, softcap=setting.softcap)
            for i in range(setting.num_layers)
        ]
        return list(torch.split(torch.stack(results), [tokens for _, tokens in work], 1))

    def expected(self, work: Sequence[tuple[Talk, int]]) -> list[Tensor]:
        """What the oracle says the last step's results are."""
        setting = self.setting
        return [
            torch.stack(
                [
                    attend(
                        self.queries[i][layer],
                        talk.keys[layer],
                        talk.values[layer],
                        scale=setting.scale,
                        window=setting.window,
                        softcap=setting.softcap,
                    )
                    for layer in range(setting.num_layers)
                ]
            )
            for i, (talk, _) in enumerate(work)
        ]


def ragged(work: Sequence[tuple[Talk, int]]) -> RaggedBatch:
    """The batch in which each sequence appends so many tokens next."""
    tables = [np.array(talk.table, dtype=np.int64) for talk, _ in work]
    return RaggedBatch(
        starts=np.array([talk.length for talk, _ in work]),
        lengths=np.array([tokens for _, tokens in work]),
        blocks=np.concatenate(tables),
        table_starts=np.cumsum([0, *(len(table) for table in tables)]),
    )


# (relative, absolute). Half types: one rounding of the result, and one of the probabilities before they meet values.
TOLERANCE = {
    torch.float32: (1e-5, 2e-6),
    torch.bfloat16: (2**-7, 1.5e-2),
    torch.float16: (2**-10, 1e-3),
}


def check_step(bench: Bench, work: Sequence[tuple[Talk, int]]) -> list[Tensor]:
    """One step; every row is as the oracle says."""
    results = bench.step(work)
    relative, absolute = TOLERANCE[bench.setting.dtype]
    for result, expected in zip(results, bench.expected(work), strict=True):
        torch.testing.assert_close(result.double(), expected, rtol=relative, atol=absolute)
    return results
