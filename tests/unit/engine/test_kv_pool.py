"""The pool's memory: segments that really come and go, copies between blocks, and poison."""

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekv.core.block_pool import BlockPool
from edgekv.core.step import BlockCopy
from edgekv.engine.kv_pool import KVPool, PoolShape

SHAPE = PoolShape(num_layers=2, num_kv_heads=3, head_dim=8)


def make_pool(*segments: int, segment_blocks: int = 4, dtype: torch.dtype = torch.float32) -> KVPool:
    pool = KVPool(SHAPE, dtype=dtype, device=torch.device("cpu"), block_size=16, segment_blocks=segment_blocks)
    for num_blocks in segments:
        pool.add_segment(num_blocks)
    return pool


def block(pool: KVPool, block_id: int) -> torch.Tensor:
    """[layers, 2, kv_heads, block_size, head_dim]."""
    return pool.cache.segments[block_id // 4].data[:, :, :, block_id % 4]


def randomise(pool: KVPool) -> None:
    for segment in pool.cache.segments.values():
        segment.data.normal_()


def test_sizes_are_counted_in_blocks_tokens_and_bytes() -> None:
    pool = make_pool(4, 3, dtype=torch.bfloat16)
    assert pool.segments == {0: 4, 1: 3}
    assert pool.num_blocks == 7
    assert pool.num_tokens == 7 * 16
    assert pool.block_bytes == 2 * 2 * 3 * 16 * 8 * 2
    assert pool.num_bytes == 7 * pool.block_bytes
    assert sum(s.data.untyped_storage().nbytes() for s in pool.cache.segments.values()) == pool.num_bytes


def test_a_segment_is_a_tensor_of_its_own_in_the_layout_of_the_kernels() -> None:
    pool = make_pool(4, 4)
    first, second = (pool.cache.segments[index].data for index in (0, 1))
    assert first.shape == (2, 2, 3, 4, 16, 8)
    assert first.is_contiguous()
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()


def test_removing_a_segment_frees_its_memory_and_leaves_the_others() -> None:
    pool = make_pool(4, 2)
    randomise(pool)
    kept = pool.cache.segments[1].data.clone()
    storage = weakref.ref(pool.cache.segments[0].data)
    pool.remove_segment(0)
    assert storage() is None
    assert pool.segments == {1: 2}
    assert pool.num_blocks == 2
    assert torch.equal(pool.cache.segments[1].data, kept)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 4) | st.none(), max_size=20))
def test_segment_indices_agree_with_the_block_pools(changes: list[int | None]) -> None:
    memory, blocks = make_pool(), BlockPool(block_size=16, segment_blocks=4)
    present: list[int] = []
    for position, num_blocks in enumerate(changes):
        if num_blocks is not None:
            index = memory.add_segment(num_blocks)
            assert index == blocks.add_segment(num_blocks)
            present.append(index)
        elif present:
            index = present.pop(position % len(present))
            memory.remove_segment(index)
            blocks.remove_segment(index)
        assert memory.num_blocks == blocks.total_blocks


def test_a_copy_takes_the_first_slots_of_every_layer_across_segments() -> None:
    pool = make_pool(4, 4)
    randomise(pool)
    source = block(pool, 1).clone()
    untouched = [block(pool, other).clone() for other in (0, 4, 5, 7)]
    pool.copy((BlockCopy(source=1, target=6, num_tokens=5), BlockCopy(source=1, target=2, num_tokens=16)))
    assert torch.equal(block(pool, 6)[..., :5, :], source[..., :5, :])
    assert torch.equal(block(pool, 2), source)
    assert torch.equal(block(pool, 1), source)
    assert all(torch.equal(block(pool, other), was) for other, was in zip((0, 4, 5, 7), untouched, strict=True))


def test_a_copy_clears_what_the_targets_earlier_owner_left() -> None:
    pool = make_pool(4)
    pool.poison([3])
    pool.copy((BlockCopy(source=0, target=3, num_tokens=5),))
    assert torch.equal(block(pool, 3)[..., 5:, :], torch.zeros(2, 2, 3, 11, 8))


def test_copies_happen_in_order() -> None:
    pool = make_pool(4)
    randomise(pool)
    source = block(pool, 0).clone()
    pool.copy((BlockCopy(0, 1, 16), BlockCopy(1, 2, 16)))
    assert torch.equal(block(pool, 2), source)


def test_poison_fills_the_named_blocks_alone() -> None:
    pool = make_pool(4, 2)
    pool.poison([1, 5])
    poisoned = [block_id for block_id in (0, 1, 2, 3, 4, 5) if bool(block(pool, block_id).isnan().any())]
    assert poisoned == [1, 5]
    assert all(bool(block(pool, block_id).isnan().all()) for block_id in poisoned)


@pytest.mark.parametrize("missing", [3, 5, 8, 400, -1])
def test_a_block_that_is_in_no_segment_is_refused(missing: int) -> None:
    pool = make_pool(3, 1)
    with pytest.raises(ValueError, match=f"block {missing} is in no segment"):
        pool.copy((BlockCopy(missing, 0, 1),))
    with pytest.raises(ValueError, match=f"block {missing} is in no segment"):
        pool.poison([missing])


def test_nonsense_is_refused() -> None:
    pool = make_pool(4)
    with pytest.raises(ValueError, match="cannot copy 17"):
        pool.copy((BlockCopy(0, 1, 17),))
    with pytest.raises(ValueError, match="onto itself"):
        pool.copy((BlockCopy(1, 1, 16),))
    with pytest.raises(ValueError, match="1 to 4 blocks, not 5"):
        pool.add_segment(5)
    with pytest.raises(ValueError, match="no segment 1"):
        pool.remove_segment(1)
    with pytest.raises(ValueError, match="power of two, not 3"):
        make_pool(segment_blocks=3)
