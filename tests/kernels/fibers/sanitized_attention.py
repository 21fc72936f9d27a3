"""One case of each of attention's kernels, for a process whose libraries check each access to memory."""

import torch

from edgekv.kernels.attn import block_copy
from edgekv.kernels.attn.gpu_layout import GpuKvFormat
from tests.kernels.fibers import test_decode_split, test_gather_dequant, test_kv_append, test_prefill_paged
from tests.kernels.fibers.harness import run_prepared
from tests.kernels.fibers.paged_memory import Family, Pool, assert_near, ints

INT4 = Family(GpuKvFormat.INT4, 96, 16, torch.bfloat16, group=6)


def main() -> None:
    """Fails where one of them is wrong. Pools have no block more than they need."""
    decode = test_decode_split.Case(
        INT4, Pool(INT4.layout(segment_blocks=1), 5), [33, 17], window=30, least_blocks=1, has_sinks=True
    )
    assert_near(decode.run(1), decode.expected(), decode.bounds)
    print("decode_split, lse_merge")

    pool = Pool(INT4.layout(segment_blocks=1), 2)
    pool.normal(1)
    angles = pool.normal(18, 24)
    rope = test_kv_append.RopeTable(torch.stack((angles.cos(), angles.sin()), 1))
    test_kv_append.check(
        test_kv_append.Step(pool, INT4, range(18), [0] * 18, [pool.take(18)], rope=rope, hadamard=True), 1
    )
    print("kv_append")

    test_gather_dequant.Case(INT4, Pool(INT4.layout(segment_blocks=1), 4), [33, 16], [3, 0]).check()
    print("gather_dequant")

    kind = test_prefill_paged.Kind(INT4, torch.bfloat16, 80)
    chunks = test_prefill_paged.Case(kind, Pool(INT4.layout(segment_blocks=1), 4), [11, 12], [20, 4], window=9)
    test_prefill_paged.assert_right(chunks.run(1), chunks.expected(), kind)
    print("prefill_paged")

    pool = Pool(INT4.layout(segment_blocks=1), 2)
    pool.scribble(pool.generator)
    copies = ints([0, 1, 16]).view(1, 3)
    run_prepared(block_copy.prepare(pool.cache, pool.cache, copies))
    assert torch.equal(pool.segments[0], pool.segments[1])
    print("block_copy")


if __name__ == "__main__":
    main()
