"""The workspace that is planned holds what a step of attention really allocates, measured."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from edgekv.config.units import MIB
from edgekv.core.demand import Demand
from edgekv.core.dtype_choice import DtypeName
from edgekv.core.sampling import SamplingParams
from edgekv.core.sequence import Sequence, SequenceSpec
from edgekv.core.step import Chunk
from edgekv.engine.batch import build_batch
from edgekv.engine.kv_pool import KVPool
from edgekv.kernels.attn.paged_torch import PagedAttention
from edgekv.kernels.attn.workspace import Workspace

CPU = torch.device("cpu")
BLOCK = 16


@dataclass(frozen=True)
class Shape:
    """One layer of attention, with next to nothing around it."""

    num_layers: int = 1
    num_kv_heads: int = 4
    head_dim: int = 256
    num_heads: int = 8
    num_parameters: int = 1
    vocab_size: int = 1
    hidden_size: int = 1
    intermediate_size: int = 1
    max_position_embeddings: int = 1 << 20
    windows: tuple[int | None, ...] = (None,)
    attention_softcap: float | None = None


def allocated_bytes(step: Any) -> int:
    """The most that `step()` has allocated at any moment."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    sizes: list[tuple[int, int]] = []

    def walk(events: Any) -> None:
        for event in events:
            if event.name == "[memory]":
                sizes.append((event.start_time_ns, event.extra_fields.alloc_size))
            walk(event.children)

    walk(recorded.profiler.kineto_results.experimental_event_tree())  # type: ignore[union-attr]
    now = most = 0
    for _, size in sorted(sizes):
        now += size
        most = max(most, now)
    return most


def attention_bytes(shape: Shape, dtype: torch.dtype, context: int, tokens: int) -> int:
    """What one layer's attention over `context` tokens, the last `tokens` of them new, allocates."""
    pool = KVPool(shape, dtype=dtype, device=CPU, block_size=BLOCK, segment_blocks=1 << 20)
    blocks = context // BLOCK
    # The longest piece comes first: the buffer between pool and context is as large as it can be.
    first = pool.add_segment(blocks - 1) << 20
    second = pool.add_segment(1) << 20
    spec = SequenceSpec(id=1, prompt=(0,) * context, sampling=SamplingParams(max_tokens=1))
    table = (*range(first, first + blocks - 1), second)
    chunk = Chunk(Sequence.from_spec(spec, arrival=0), context - tokens, (0,) * tokens, table, sampled=1)
    built = build_batch((chunk,), pool, vocab_size=1)
    attention = PagedAttention(pool.cache, built.ragged, Workspace(CPU))
    queries = torch.zeros(tokens, shape.num_heads, shape.head_dim, dtype=dtype)
    keys = torch.zeros(tokens, shape.num_kv_heads, shape.head_dim, dtype=dtype)
    with torch.inference_mode():
        return allocated_bytes(lambda: attention(0, queries, keys, keys, scale=0.1, softcap=shape.attention_softcap))


@pytest.mark.parametrize("tokens", [1, 64])
@pytest.mark.parametrize("softcap", [None, 50.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_attention_stays_within_its_workspace(
    dtype: DtypeName, softcap: float | None, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As many heads are gathered at a time as there are threads: the worst case has them all.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    shape, context = Shape(attention_softcap=softcap), 8192
    measured = attention_bytes(shape, getattr(torch, dtype), context, tokens)
    planned = Demand(
        shape=shape, device="cpu", dtype=dtype, kv_dtype=dtype, block_size=BLOCK, context_tokens=context,
        max_sequences=1, max_step_tokens=tokens,
    ).workspace_bytes  # fmt: skip
    assert measured <= planned
    assert planned < 1.5 * measured + 40 * MIB  # an upper bound, and not just any
