"""gemm.h: y = W x for 9 to 32 tokens by the matrix cores, of any format of planes.h.

Runs in: engine thread; owns: nothing.
"""

from collections.abc import Iterator
from ctypes import Structure, c_int32, c_int64, c_uint64
from dataclasses import dataclass

import torch
from torch import Tensor

from edgekv.kernels.common.prepared import Prepared, address_of, blocks_of, kind
from edgekv.kernels.gemm.epilogue import EkFinish, Epilogue, columns, finish, finish_args, is_gated
from edgekv.kernels.gemm.matrix import EkPlanes, PlaneMatrix
from edgekv.kernels.gemm.numbers import are_rows, described
from edgekv.kernels.gemm.planes import ONE_OF_EACH_FORMAT, format_defines
from edgekv.kernels.quant.encodings import Q4_K, Encoding
from edgekv.kernels.rt.registry import KernelSpec

MOST_TOKENS = 32
THREADS = 128
_TILE_ROWS = 64
_STEP_GROUPS = 4
BLOCKS_WANTED = 4
"""On a multiprocessor of NVIDIA's; on one of AMD's, which is two of those, twice as many."""
_LEAST_STEPS = 2  # of a block: fewer are not worth the sums that have to be written and read


class EkGemm(Structure):
    """What the kernel is told."""

    _fields_ = (
        ("w", EkPlanes),
        ("x", c_uint64),
        ("parts", c_uint64),
        ("x_stride", c_int64),
        ("out", EkFinish),
        ("steps", c_int32),
        ("splits", c_int32),
    )


@dataclass(frozen=True, slots=True)
class GemmCut:
    """How the columns are shared: `splits` blocks of `steps` steps each, the last one maybe fewer."""

    splits: int
    steps: int

    def parts_elements(self, rows: int, tokens: int) -> int:
        """Float32 numbers that the splits' sums take; 0 where there is but one."""
        return self.splits * tokens * rows if self.splits > 1 else 0


def choose_cut(
    num_columns: int, groups: int, *, gated: bool, multiprocessors: int, blocks_wanted: int = BLOCKS_WANTED
) -> GemmCut:
    """What suits a matrix, however many tokens there are: so what comes out for one does not depend on the others."""
    tiles, steps = blocks_of(num_columns, _TILE_ROWS // 2 if gated else _TILE_ROWS), blocks_of(groups, _STEP_GROUPS)
    splits = max(1, min(blocks_wanted * multiprocessors // tiles, steps // _LEAST_STEPS))
    each = blocks_of(steps, splits)
    return GemmCut(blocks_of(steps, each), each)


def spec(
    encoding: Encoding, tokens: int, x_dtype: torch.dtype, out_dtype: torch.dtype, *, merge: bool = False
) -> KernelSpec:
    """The kernel for matrices of an encoding; `merge`: the one that adds up splits, which is compiled with it."""
    if x_dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"the matrix cores multiply bfloat16 or float16, not {x_dtype}")
    defines = {
        **format_defines(encoding),
        "EK_T": 16 if tokens <= 16 else MOST_TOKENS,
        "EK_F16": kind(x_dtype),
        "EK_OUT": kind(out_dtype),
    }
    return KernelSpec("gemm/gemm.h", "ek_gemm_merge" if merge else "ek_gemm", THREADS, EkGemm, defines)


def variants(x_dtype: torch.dtype) -> Iterator[KernelSpec]:
    """What stands for all kernels where they are compiled for every card; sm_75 has float16 only."""
    for encoding in ONE_OF_EACH_FORMAT:
        yield spec(encoding, MOST_TOKENS, x_dtype, x_dtype)
    yield spec(Q4_K, 16, x_dtype, torch.float32)
    yield spec(Q4_K, 16, x_dtype, torch.float32, merge=True)


def prepare(
    weights: PlaneMatrix,
    x: Tensor,
    out: Tensor,
    *,
    multiprocessors: int,
    blocks_wanted: int = BLOCKS_WANTED,
    parts: Tensor | None = None,
    epilogue: Epilogue = Epilogue.STORE,
    bias: Tensor | None = None,
    cut: GemmCut | None = None,
) -> list[Prepared]:
    """One launch, or two where splits are added up.

    `x` [tokens, cols] of bfloat16 or float16 with rows that begin at multiples of 16 bytes; `parts` float32, of
    cut.parts_elements or more; `blocks_wanted` on a multiprocessor; `out` and `bias` as gemv's. For the same matrix and
    card a token comes out the same to the bit, however many others there are. Raises ValueError for what does not fit
    together.
    """
    tokens, width = out.shape[0], columns(weights.rows, epilogue)
    if not 1 <= tokens <= MOST_TOKENS or not are_rows(x, tokens, weights.cols):
        raise ValueError(f"{tokens} tokens of {weights.cols} columns are not {described(x)}")
    if cut is None:
        cut = choose_cut(
            width, weights.groups, gated=is_gated(epilogue), multiprocessors=multiprocessors,
            blocks_wanted=blocks_wanted,
        )  # fmt: skip
    wanted = cut.parts_elements(weights.rows, tokens)
    if wanted and (parts is None or parts.dtype != torch.float32 or parts.numel() < wanted):
        raise ValueError(f"{cut} of {weights.rows} rows and {tokens} tokens takes {wanted} float32")
    args = EkGemm(
        weights.args(), x.data_ptr(), address_of(parts if wanted else None), x.stride(0),
        finish_args(weights.rows, out, epilogue, bias), cut.steps, cut.splits,
    )  # fmt: skip
    tiles = blocks_of(width, _TILE_ROWS // 2 if is_gated(epilogue) else _TILE_ROWS)
    prepared = [Prepared(spec(weights.encoding, tokens, x.dtype, out.dtype), (tiles, 1, cut.splits), args)]
    if cut.splits > 1:
        merge = spec(weights.encoding, tokens, x.dtype, out.dtype, merge=True)
        prepared.append(Prepared(merge, (blocks_of(width, THREADS), tokens, 1), args))
    return prepared


def reference(
    values: Tensor, x: Tensor, before: Tensor | None, epilogue: Epilogue = Epilogue.STORE, bias: Tensor | None = None
) -> Tensor:
    """Plain torch in float64, of exact weights [rows, cols], rounded to x's dtype as the kernel does, x [tokens, cols].

    `before` is what lies in the output.
    """
    return finish(x.double() @ values.to(x.dtype).double().T, before, epilogue, bias)
