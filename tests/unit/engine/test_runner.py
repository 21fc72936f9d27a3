"""The runner with a small transformer: chunked, batched and forked steps give what one plain pass gives."""

from collections.abc import Sequence as Items
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edgekv.core.sampling import SamplingParams
from edgekv.core.sequence import Sequence, SequenceSpec
from edgekv.core.step import BlockCopy, Chunk, StepPlan
from edgekv.engine.kv_pool import KVPool, PoolShape
from edgekv.engine.runner import Runner
from edgekv.kernels.attn.dense import DenseAttention
from edgekv.kernels.attn.interface import Attention

VOCAB, HEADS, BLOCK = 40, 4, 16


@dataclass(frozen=True, slots=True)
class Spec:
    vocab_size: int = VOCAB
    num_layers: int = 3
    num_kv_heads: int = 2
    head_dim: int = 16


class TinyModel:
    """Embeddings of tokens and positions, attention with a residual (windowed in the middle layer), tied output."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.spec = Spec()
        width = HEADS * self.spec.head_dim
        self.tokens = torch.randn(VOCAB, width, generator=generator)
        self.positions = torch.randn(512, width, generator=generator)
        kv_width = 2 * self.spec.num_kv_heads * self.spec.head_dim
        self.layers = torch.randn(self.spec.num_layers, width + kv_width, width, generator=generator) / width**0.5
        self.calls = 0

    def forward(self, token_ids: Tensor, positions: Tensor, attention: Attention, sample_rows: Tensor) -> Tensor:
        self.calls += 1
        hidden = self.tokens[token_ids] + self.positions[positions]
        for layer, weight in enumerate(self.layers):
            qkv = F.linear(F.layer_norm(hidden, hidden.shape[-1:]), weight).view(len(hidden), -1, self.spec.head_dim)
            q, k, v = torch.split(qkv, [HEADS, self.spec.num_kv_heads, self.spec.num_kv_heads], 1)
            hidden = hidden + attention(layer, q, k, v, scale=0.25, window=20 if layer == 1 else None).flatten(1)
        return F.linear(hidden[sample_rows], self.tokens)


MODEL = TinyModel()


def make_runner(*segments: int, model: TinyModel = MODEL, segment_blocks: int = 8) -> tuple[Runner, KVPool]:
    pool = KVPool(
        model.spec, dtype=torch.float32, device=torch.device("cpu"), block_size=BLOCK, segment_blocks=segment_blocks
    )
    for num_blocks in segments:
        index = pool.add_segment(num_blocks)
        pool.poison(index * segment_blocks + block for block in range(num_blocks))
    return Runner(model, pool), pool


def sequence(tokens: Items[int], sequence_id: int = 7) -> Sequence:
    return Sequence.from_spec(SequenceSpec(sequence_id, tuple(tokens), SamplingParams(max_tokens=1)), arrival=0)


def chunk(owner: Sequence, start: int, end: int, table: Items[int]) -> Chunk:
    tokens = tuple(owner.tokens[start:end])
    return Chunk(owner, start, tokens, tuple(table), sampled=int(end == len(owner.tokens)))


def step(*chunks: Chunk, copies: tuple[BlockCopy, ...] = ()) -> StepPlan:
    return StepPlan(copies=copies, chunks=chunks)


def expected(tokens: Items[int]) -> Tensor:
    """Logits after the last token, from one plain pass."""
    last = torch.tensor([len(tokens) - 1])
    return MODEL.forward(torch.tensor(tokens), torch.arange(len(tokens)), DenseAttention(), last)[0]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_however_it_is_cut_and_batched_a_sequence_gets_its_own_logits(data: st.DataObject) -> None:
    runner, _ = make_runner(8, 8, 8, 3)
    free = data.draw(st.permutations(range(27)))
    prompts = data.draw(st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=90), min_size=1, max_size=4))
    owners = [sequence(prompt, index) for index, prompt in enumerate(prompts)]
    tables = [[free.pop() for _ in range(-(-len(prompt) // BLOCK))] for prompt in prompts]
    while any(owner.num_uncomputed for owner in owners):
        waiting = [owner for owner in owners if owner.num_uncomputed]
        chunks = []
        for owner in data.draw(st.lists(st.sampled_from(waiting), min_size=1, unique_by=id)):
            end = owner.num_computed + data.draw(st.integers(1, owner.num_uncomputed))
            chunks.append(chunk(owner, owner.num_computed, end, tables[owner.id]))
            owner.num_computed = end
        logits = runner.forward(step(*chunks))
        sampling = [chunk.sequence for chunk in chunks if chunk.samples]
        assert logits.shape == (len(sampling), VOCAB)
        assert logits.dtype == torch.float32
        for row, owner in zip(logits, sampling, strict=True):
            torch.testing.assert_close(row, expected(owner.tokens), rtol=1e-4, atol=1e-4)


def test_copies_come_before_the_forward_pass() -> None:
    runner, _ = make_runner(8)
    first, second = sequence(range(20)), sequence([*range(18), 30, 31], 8)
    runner.forward(step(chunk(first, 0, 20, [2, 5])))
    # Shares the first block and two tokens of the second.
    logits = runner.forward(step(chunk(second, 18, 20, [2, 6]), copies=(BlockCopy(5, 6, 2),)))
    torch.testing.assert_close(logits[0], expected(second.tokens), rtol=1e-4, atol=1e-4)


def test_a_sequence_continues_after_its_blocks_moved_and_their_segment_is_gone() -> None:
    runner, pool = make_runner(4, 4)
    owner = sequence(range(33))
    runner.forward(step(chunk(owner, 0, 32, [0, 2])))
    pool.copy((BlockCopy(0, 9, BLOCK), BlockCopy(2, 8, BLOCK)))
    pool.remove_segment(0)
    logits = runner.forward(step(chunk(owner, 32, 33, [9, 8, 10])))
    torch.testing.assert_close(logits[0], expected(owner.tokens), rtol=1e-4, atol=1e-4)


def test_steps_without_samples_or_without_chunks_answer_no_rows() -> None:
    model = TinyModel()
    runner, pool = make_runner(4, model=model)
    owner = sequence(range(20))
    assert runner.forward(step(chunk(owner, 0, 10, [0]))).shape == (0, VOCAB)
    assert model.calls == 1
    assert runner.forward(step(copies=(BlockCopy(0, 3, BLOCK),))).shape == (0, VOCAB)
    assert model.calls == 1
    data = pool.cache.segments[0].data
    assert torch.equal(data[:, :, :, 3, :10], data[:, :, :, 0, :10])


def test_blocks_reserved_ahead_are_ignored() -> None:
    runner, _ = make_runner(4)
    owner = sequence(range(16))
    logits = runner.forward(step(chunk(owner, 0, 16, [1, 3, 2])))
    torch.testing.assert_close(logits[0], expected(owner.tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        (chunk(sequence([1, VOCAB]), 0, 2, [1]), f"token id {VOCAB} is outside of the vocabulary of {VOCAB}"),
        (chunk(sequence([1, -1]), 0, 2, [1]), "token id -1 is outside"),
        (chunk(sequence(range(17)), 0, 17, [1]), "block table covers 16 tokens, its chunk ends at 17"),
        (chunk(sequence([]), 0, 0, [1]), "a chunk of 0 tokens"),
        (chunk(sequence(range(17)), 0, 17, [1, 8]), "block 8 of its block table is in no segment"),
        (chunk(sequence(range(17)), 0, 17, [1, 3]), "block 3 of its block table is in no segment"),
        (chunk(sequence(range(17)), 0, 17, [-2, 1]), "block -2 of its block table is in no segment"),
    ],
)
def test_a_faulty_chunk_is_refused_by_name_before_anything_happens(bad: Chunk, what: str) -> None:
    model = TinyModel()
    runner, pool = make_runner(3, model=model)
    before = pool.cache.segments[0].data.clone()
    good = chunk(sequence(range(5), 6), 0, 5, [0])
    with pytest.raises(ValueError, match=f"sequence 7: .*{what}"):
        runner.forward(step(good, bad, copies=(BlockCopy(0, 2, 16),)))
    assert model.calls == 0
    assert torch.equal(pool.cache.segments[0].data.isnan(), before.isnan())


def test_a_pool_of_another_shape_is_refused() -> None:
    pool = KVPool(PoolShape(3, 1, 16), dtype=torch.float32, device=torch.device("cpu"), block_size=16, segment_blocks=1)
    with pytest.raises(ValueError, match=r"\(3, 2, 16\), the pool's \(3, 1, 16\)"):
        Runner(MODEL, pool)


def test_scratch_memory_is_kept_and_reported() -> None:
    runner, _ = make_runner(8)
    owner = sequence([1] * 100)
    runner.forward(step(chunk(owner, 0, 100, range(7))))
    held = runner.workspace_bytes
    assert held == 7 * BLOCK * 2 * 2 * 16 * 4
    runner.forward(step(chunk(owner, 0, 50, range(7))))
    assert runner.workspace_bytes == held
