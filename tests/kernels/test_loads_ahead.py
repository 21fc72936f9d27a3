"""Weights are on their way while those before them are multiplied: read from clang's assembly for an AMD card.

There a wave waits by the number of loads that may still be under way, so that none of them may is seen at once. Source
that looks as if loads went ahead is no proof: compilers move them to where they are used, or wait to copy a register.
"""

import re
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch

from edgekv.kernels.gemm import gemm, gemv, wide_gemv
from edgekv.kernels.gemm.shape import GemvShape
from edgekv.kernels.quant.encodings import Q4_0, Q4_K, Q6_K, Q8_0
from edgekv.kernels.rt.compiler import CompilerMissing
from edgekv.kernels.rt.registry import KernelSpec

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "packaging"))

from kernel_compilers import ClangForAmd, Unit, source_text

TARGET = "gfx1100"
BF16, F32 = torch.bfloat16, torch.float32
ONE, FOUR, EIGHT = GemvShape(1, 2, 1), GemvShape(4, 4, 4), GemvShape(8, 2, 1)
SPECS = [
    *(gemv.spec(encoding, ONE, BF16) for encoding in (Q8_0, Q4_0, Q4_K, Q6_K)),
    gemv.spec(Q6_K, FOUR, F32),
    gemv.spec(Q4_K, EIGHT, BF16),
    wide_gemv.spec(BF16, BF16, ONE, BF16),
    wide_gemv.spec(BF16, F32, GemvShape(8, 4, 1), F32),
    wide_gemv.spec(F32, BF16, GemvShape(1, 1, 4), BF16),
    gemm.spec(Q4_K, 32, BF16, BF16),
]


def waits_in_main_loop(assembly: str, entry: str) -> list[int]:
    """How many loads each wait leaves under way, in the kernel's loop that loads most."""
    lines = assembly[assembly.index(f"\n{entry}:") :].splitlines()
    lines = lines[: next(i for i, line in enumerate(lines) if ".end_amdhsa_kernel" in line)]
    loops, loop = defaultdict[str, list[str]](list), ""
    for line in lines:
        if block := re.match(r"(?:\.L|; %)(\w+(?:\.\d+)?):", line):
            loop = header[1] if (header := re.search(r"in Loop: Header=(\w+)", line)) else block[1]
        loops[loop].append(line)
    main = max(loops.values(), key=lambda loop: sum("global_load" in each for each in loop))
    assert sum("global_load" in each for each in main) >= 2
    return [int(wait[1]) for each in main if (wait := re.search(r"s_waitcnt .*?vmcnt\((\d+)\)", each))]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_some_loads_are_under_way_at_every_wait(spec: KernelSpec) -> None:
    try:
        clang = ClangForAmd()
    except CompilerMissing as error:
        pytest.skip(str(error))
    waits = waits_in_main_loop(clang.assembly(source_text(spec.source), Unit.of(TARGET, spec)), spec.entry)
    assert waits
    assert min(waits) >= 2, waits


WAITS_AT_ONCE = """
ek_gemv:
\tglobal_load_b32 v1, v[2:3], off
.LBB0_2:                                ;   in Loop: Header=BB0_3 Depth=1
\tglobal_load_b32 v4, v[5:6], off
\ts_waitcnt vmcnt(0) lgkmcnt(0)
.LBB0_3:                                ; =>This Inner Loop Header: Depth=1
\tglobal_load_b32 v1, v[2:3], off
\ts_cbranch_execz .LBB0_2
; %bb.4:                                ;   in Loop: Header=BB0_3 Depth=1
\ts_waitcnt vmcnt(3)
\ts_branch .LBB0_2
.LBB0_5:
\ts_waitcnt vmcnt(1)
\tglobal_load_b32 v1, v[2:3], off
\t.end_amdhsa_kernel
"""


def test_a_wait_for_everything_is_seen() -> None:
    assert waits_in_main_loop(WAITS_AT_ONCE, "ek_gemv") == [0, 3]
