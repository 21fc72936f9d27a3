"""The kernels' pool: what they see of it is what there is."""

import ctypes

import pytest

from edgekv.core.sampling import SamplingParams
from edgekv.core.sequence import Sequence, SequenceSpec
from edgekv.core.step import Chunk
from edgekv.engine.batch import build_batch
from edgekv.engine.kv_pool import PoolShape
from edgekv.engine.native_pool import NativeKVPool
from edgekv.kernels.cpu.abi import Segment
from edgekv.kernels.cpu.cache import NativeCache

SHAPE = PoolShape(num_layers=2, num_kv_heads=3, head_dim=16)


def make_pool(*segments: int) -> NativeKVPool:
    pool = NativeKVPool(SHAPE, kv_format="int8", block_size=16, segment_blocks=4)
    for num_blocks in segments:
        pool.add_segment(num_blocks)
    return pool


def seen(cache: NativeCache) -> list[tuple[int | None, int]]:
    """Address and blocks of every segment, as the library reads them."""
    struct = cache.struct()
    table = ctypes.cast(struct.segments, ctypes.POINTER(Segment))
    return [(table[index].data, table[index].num_blocks) for index in range(struct.num_segments)]


def test_the_table_follows_segments_that_come_and_go() -> None:
    pool = make_pool(4, 3)
    cache = NativeCache(pool)
    addresses = {index: segment.address for index, segment in pool.allocated.items()}
    assert seen(cache) == [(addresses[0], 4), (addresses[1], 3)]
    pool.remove_segment(0)
    assert seen(cache) == [(None, 0), (addresses[1], 3)]
    pool.add_segment(2)
    assert seen(cache) == [(pool.allocated[0].address, 2), (addresses[1], 3)]
    pool.remove_segment(1)
    assert seen(cache) == [(pool.allocated[0].address, 2)]


@pytest.mark.parametrize("block", [-1, -8, 5, 8])
def test_a_block_of_a_segment_that_went_or_never_was_is_refused(block: int) -> None:
    pool = make_pool(4, 4)
    pool.remove_segment(1)
    spec = SequenceSpec(id=7, prompt=(0,) * 17, sampling=SamplingParams(max_tokens=1))
    chunk = Chunk(Sequence.from_spec(spec, arrival=0), 0, spec.prompt, (0, block), sampled=1)
    with pytest.raises(ValueError, match=f"sequence 7: block {block} of its block table is in no segment"):
        build_batch((chunk,), pool, vocab_size=1)
