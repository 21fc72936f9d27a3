"""Every kernel of kernels/gemm once with sanitizers: no access to memory but that of its tensors, no overflow."""

import numpy as np
import pytest
import torch

from edgekv.kernels.gemm import acts, dequant
from edgekv.kernels.gemm.acts import Int8Rows
from edgekv.kernels.gemm.epilogue import Epilogue
from edgekv.kernels.gemm.gemm import GemmCut
from edgekv.kernels.gemm.shape import GemvShape
from tests.kernels.fibers.gemm_cases import check_gemm, check_gemv, check_wide, draw, draw_layer, draw_plain
from tests.kernels.fibers.harness import run_prepared, run_sanitized

DTYPE = torch.float16


def main() -> None:
    """Sizes are multiples of nothing; of a group of 32 columns there are many lanes, and not enough."""
    rng = np.random.default_rng(0)
    quantised = draw_layer("q6_K", 21, 5, rng, Epilogue.SILU_MUL, biased=True)
    check_gemv(quantised, draw(rng, 3, 1280, DTYPE), draw(rng, 3, 21, DTYPE), GemvShape(4, 4, 4), (1,))
    plain = draw_plain(DTYPE, 21, 1288, rng, Epilogue.ADD, biased=True)
    check_wide(plain, draw(rng, 3, 1288, DTYPE), draw(rng, 3, 21, DTYPE), GemvShape(4, 4, 4), (1,))
    check_gemm(quantised, draw(rng, 13, 1280, DTYPE), draw(rng, 13, 21, DTYPE), GemmCut(3, 4), (1,))
    x, into = draw(rng, 3, 1312, DTYPE), Int8Rows.empty(3, 1312, torch.device("cpu"))
    run_prepared(acts.prepare(x, into), seed=1)
    out, ids = torch.empty(3, 1280, dtype=DTYPE), torch.tensor([41, 0, 99], dtype=torch.int32)
    run_prepared(dequant.prepare(quantised.planes, out, ids=ids), seed=1)
    print("done")


@pytest.mark.slow
def test_only_memory_of_tensors_is_touched() -> None:
    done = run_sanitized(__name__)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip().endswith("done")


if __name__ == "__main__":
    main()
