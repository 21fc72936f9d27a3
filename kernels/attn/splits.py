"""splits.h: how contexts are cut into parts for several thread blocks, and the memory that the parts' results take.

Runs in: anywhere; owns: nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.signedinteger[Any]]

# The four warps of a thread block take a block of the cache each; twice, or starting them is not worth it.
_LEAST_BLOCKS = 8


@dataclass(frozen=True, slots=True)
class Splits:
    """How contexts are cut: so that the parts of all of them fill a card.

    `thread_blocks` of decode are what the card has at a time, and each kv head of a part is one of them. No part has
    fewer than `least_blocks` blocks, unless it is all of a context.
    """

    thread_blocks: int
    kv_heads: int
    block_size: int
    least_blocks: int = _LEAST_BLOCKS

    def __post_init__(self) -> None:
        """Raises ValueError where there would be no part."""
        if min(self.thread_blocks, self.kv_heads, self.block_size, self.least_blocks) < 1:
            raise ValueError(f"no context can be cut by {self}")

    @property
    def filling(self) -> int:
        """Parts that fill the card."""
        return max(1, self.thread_blocks // self.kv_heads)

    def most_parts(self, queries: int, max_blocks: int) -> int:
        """Of so many queries, whose contexts have up to `max_blocks` blocks each: `queries` if none is ever cut.

        `cut` never counts more: parts are as large as fills the card, and each query has one that is not full.
        """
        return min(self.filling + queries, queries * max(1, -(-max_blocks // self.least_blocks)))

    def cut(
        self, contexts: Ints, into: NDArray[np.int32], *, begins: Ints | None = None, window: int | None = None
    ) -> None:
        """Count the parts of `contexts` [queries] for the device, `into` [queries + 2].

        That is: blocks of a part, the first part of each query, and how many there are in all. Tokens before `begins`
        are seen to elsewhere; a query sees `window` tokens. A launch with another window is right, too, if not as even.
        A context of 0 has one part.
        """
        firsts = np.zeros_like(contexts) if begins is None else np.asarray(begins)
        if window is not None:
            firsts = np.maximum(firsts, contexts - window)
        blocks = np.maximum(0, -(-contexts // self.block_size) - firsts // self.block_size)
        part_blocks = max(self.least_blocks, -(-int(blocks.sum()) // self.filling))
        into[0], into[1] = part_blocks, 0
        into[2:] = np.maximum(1, -(-blocks // part_blocks)).cumsum()


def cut_of(
    splits: Splits, contexts: Sequence[int], *, begins: Sequence[int] | None = None, window: int | None = None
) -> Tensor:
    """`Splits.cut` as a tensor of the host, [queries + 2] int32."""
    into = np.empty(len(contexts) + 2, np.int32)
    splits.cut(np.array(contexts), into, begins=None if begins is None else np.array(begins), window=window)
    return torch.from_numpy(into)


def part_tokens(
    cut: Tensor, query: int, context: int, block_size: int, *, begin: int = 0, window: int | None = None
) -> list[range]:
    """`ek_seen`: the tokens that each part of a query sees."""
    part_blocks, (first, end) = int(cut[0]), cut[1 + query : 3 + query].tolist()
    first_token = begin if window is None else max(begin, context - window)
    tokens = []
    for number in range(end - first):
        begins = (first_token // block_size + number * part_blocks) * block_size
        ends = context if number == end - first - 1 else min(context, begins + part_blocks * block_size)
        tokens.append(range(max(begins, first_token), ends))
    return tokens


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """Results of parts, float32: `values` [slots, heads, head_dim] weighted with 2^(score - largest), and `states`
    [slots, heads, 2], the largest score (times log2 e) and the sum of the weights.

    Where that sum is 0 nothing was seen, and what the values are is nobody's business.
    """

    values: Tensor
    states: Tensor

    @property
    def slots(self) -> int:
        """Parts that there is room for."""
        return self.states.shape[0]


def parts_bytes(slots: int, heads: int, head_dim: int) -> int:
    """Bytes of the results of so many parts; 0 slots take none."""
    return slots * heads * (head_dim + 2) * 4


def parts_in(memory: Tensor, slots: int, heads: int, head_dim: int) -> Parts:
    """Results at the beginning of `memory` [bytes] uint8, which launches that come one after the other can share.

    Nothing is written. Raises ValueError where there is no room.
    """
    count = slots * heads
    if memory.numel() < parts_bytes(slots, heads, head_dim):
        raise ValueError(f"{memory.numel():,} bytes have no room for {slots} parts of {heads} heads")
    floats = memory[: parts_bytes(slots, heads, head_dim)].view(torch.float32)
    values, states = torch.split(floats, [count * head_dim, count * 2])
    return Parts(values.view(slots, heads, head_dim), states.view(slots, heads, 2))


def make_parts(slots: int, heads: int, head_dim: int, device: torch.device) -> Parts:
    """All slots empty, in memory of their own."""
    return Parts(torch.empty(slots, heads, head_dim, device=device), torch.zeros(slots, heads, 2, device=device))
