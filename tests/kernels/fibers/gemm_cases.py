"""Products with matrices on host fibers: what goes in, what comes out, and by how much it may be off.

Quantised weights are bytes of an encoding with any bits; what they mean is for kernels/quant/dequantise.py to say.
Outputs lie in a frame of NaNs, which has to be whole afterwards.

    what               equals                                        but for, of each output before its epilogue
    activations        acts.reference                                nothing
    dequantised        dequant.reference                             nothing
    gemv               float64 of the same int8 and exact weights    2^-24 (groups of a lane + 12) 4 sum |x| top |w|
    wide gemv          float64                                       2^-24 (columns of a lane + 9) sum |x w|
    gemm               float64 of weights rounded to x's type        2^-23 (columns / 16 + 16) sum |x w|

`top |w|` is the largest of 32 columns; what minima are subtracted from may be a few times that. A gate adds 4e-6 of the
result, and all are then rounded to the output's type.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edgekv.kernels.common.prepared import Prepared
from edgekv.kernels.gemm import acts, gemm, gemv, wide_gemv
from edgekv.kernels.gemm.epilogue import Epilogue, columns, finish, is_gated
from edgekv.kernels.gemm.gemm import GemmCut
from edgekv.kernels.gemm.matrix import PlaneMatrix
from edgekv.kernels.gemm.shape import GemvShape
from edgekv.kernels.quant.encodings import ENCODINGS
from tests.kernels.cpu.linear_harness import random_rows
from tests.kernels.fibers.harness import in_all_orders, run_prepared

CPU = torch.device("cpu")
EPILOGUES = (Epilogue.STORE, Epilogue.ADD, Epilogue.SILU_MUL, Epilogue.GELU_MUL)

# Rounding a result to its kind: a share of it, and at least so much (float16 has subnormal numbers).
ROUNDING = {torch.float32: (2.0**-24, 0.0), torch.bfloat16: (2.0**-8, 0.0), torch.float16: (2.0**-11, 2.0**-25)}
# Gates: relative, and how much steeper than 1 they get.
GATE, SLOPE = 4e-6, 1.2


@dataclass(frozen=True, eq=False)
class Layer:
    """A matrix, quantised or plain, its exact values [rows, cols], and what is done with its product."""

    weights: PlaneMatrix | Tensor
    values: Tensor
    epilogue: Epilogue
    bias: Tensor | None

    @property
    def columns(self) -> int:
        return columns(len(self.values), self.epilogue)

    @property
    def planes(self) -> PlaneMatrix:
        assert isinstance(self.weights, PlaneMatrix)
        return self.weights

    @property
    def plain(self) -> Tensor:
        assert isinstance(self.weights, Tensor)
        return self.weights


def draw_layer(
    name: str, num_columns: int, blocks: int, rng: np.random.Generator, epilogue: Epilogue, *, biased: bool
) -> Layer:
    """One with so many columns of output, and rows of so many blocks of its encoding."""
    encoding, rows = ENCODINGS[name], num_columns * (2 if is_gated(epilogue) else 1)
    cols = blocks * encoding.block_cols
    weights = PlaneMatrix.of(encoding, random_rows(encoding, rows, cols, rng), cols, CPU)
    return Layer(weights, weights.values(), epilogue, _bias(rows, rng) if biased else None)


def draw_plain(
    dtype: torch.dtype, num_columns: int, cols: int, rng: np.random.Generator, epilogue: Epilogue, *, biased: bool
) -> Layer:
    """The same of plain numbers; what lies between rows is NaN."""
    rows = num_columns * (2 if is_gated(epilogue) else 1)
    wide = torch.full((rows, cols + 16), torch.nan, dtype=dtype)
    weights = wide[:, :cols]
    weights.copy_(torch.from_numpy(rng.standard_normal((rows, cols), dtype=np.float32)))
    return Layer(weights, weights.float(), epilogue, _bias(rows, rng) if biased else None)


def _bias(rows: int, rng: np.random.Generator) -> Tensor:
    return torch.from_numpy(rng.standard_normal(rows, dtype=np.float32))


def draw(rng: np.random.Generator, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """Numbers so small that gates are not just open or shut."""
    return (torch.from_numpy(rng.standard_normal((rows, cols), dtype=np.float32)) / 20).to(dtype)


def framed(before: Tensor, margin: int = 3) -> tuple[Tensor, Tensor]:
    """A copy in a frame of NaNs, and the frame with it: rows begin `margin` columns in."""
    rows, cols = before.shape
    whole = torch.full((rows + 2, cols + 2 * margin), torch.nan, dtype=before.dtype)
    inner = whole[1:-1, margin:-margin]
    inner.copy_(before)
    return inner, whole


def assert_frame_is_whole(whole: Tensor, margin: int = 3) -> None:
    outside = torch.ones(whole.shape, dtype=torch.bool)
    outside[1:-1, margin:-margin] = False
    assert whole[outside].isnan().all()


def run_gemv(
    layer: Layer, x: acts.Int8Rows, before: Tensor, shape: GemvShape, seeds: Sequence[int] = (0,), plant: str = ""
) -> Tensor:
    def prepare(out: Tensor) -> Prepared:
        return gemv.prepare(
            layer.planes, x, out, multiprocessors=1, epilogue=layer.epilogue, bias=layer.bias, shape=shape
        )

    return _run(prepare, before, seeds, {plant: 1} if plant else {})


def run_wide(
    layer: Layer, x: Tensor, before: Tensor, shape: GemvShape, seeds: Sequence[int] = (0,), plant: str = ""
) -> Tensor:
    def prepare(out: Tensor) -> Prepared:
        return wide_gemv.prepare(
            layer.plain, x, out, multiprocessors=1, epilogue=layer.epilogue, bias=layer.bias, shape=shape
        )

    return _run(prepare, before, seeds, {plant: 1} if plant else {})


def run_gemm(
    layer: Layer, x: Tensor, before: Tensor, cut: GemmCut, seeds: Sequence[int] = (0,), **defines: int
) -> Tensor:
    parts = torch.empty(cut.parts_elements(len(layer.values), len(x)) + 1)

    def prepare(out: Tensor) -> list[Prepared]:
        parts.fill_(torch.nan)
        return gemm.prepare(
            layer.planes, x, out, multiprocessors=1, parts=parts, epilogue=layer.epilogue, bias=layer.bias, cut=cut
        )

    found = _run(prepare, before, seeds, defines)
    assert parts[-1].isnan()
    return found


def _run(
    prepare: Callable[[Tensor], Prepared | list[Prepared]], before: Tensor, seeds: Sequence[int],
    defines: dict[str, int],
) -> Tensor:  # fmt: skip
    def once(seed: int) -> Tensor:
        out, whole = framed(before)
        run_prepared(prepare(out), seed=seed, plant=defines)
        assert_frame_is_whole(whole)
        return out.clone()

    return in_all_orders(once, seeds)


def check_gemv(
    layer: Layer, x: Tensor, before: Tensor, shape: GemvShape, seeds: Sequence[int] = (0,), plant: str = ""
) -> None:
    rounded = acts.reference(x)
    numbers = rounded.values()
    found = run_gemv(layer, rounded, before, shape, seeds, plant)
    top = layer.values.double().abs().unflatten(1, (-1, 32)).amax(2).repeat_interleave(32, 1)
    share = 2.0**-24 * (-(-layer.planes.groups // (32 * shape.split)) + 12)
    y = numbers @ layer.values.double().T
    assert_close(found, layer, y, share * 4 * (numbers.abs() @ top.T), before)


def check_wide(
    layer: Layer, x: Tensor, before: Tensor, shape: GemvShape, seeds: Sequence[int] = (0,), plant: str = ""
) -> None:
    found = run_wide(layer, x, before, shape, seeds, plant)
    numbers, weights = x.double(), layer.values.double()
    share = 2.0**-24 * (weights.shape[1] / (32 * shape.split) + 8 + 9)  # the last vector of 8 may be one lane's alone
    assert_close(found, layer, numbers @ weights.T, share * (numbers.abs() @ weights.abs().T), before)


def check_gemm(
    layer: Layer, x: Tensor, before: Tensor, cut: GemmCut, seeds: Sequence[int] = (0,), **defines: int
) -> None:
    found = run_gemm(layer, x, before, cut, seeds, **defines)
    numbers, weights = x.double(), layer.values.to(x.dtype).double()
    share = 2.0**-23 * (16 + weights.shape[1] / 16)
    assert_close(found, layer, numbers @ weights.T, share * (numbers.abs() @ weights.abs().T), before)


def assert_close(found: Tensor, layer: Layer, y: Tensor, error: Tensor, before: Tensor) -> None:
    """`y` [tokens, rows] in float64, and by how much it may be off before the epilogue."""
    wanted = finish(y, before, layer.epilogue, layer.bias)
    if layer.bias is not None:
        y = y + layer.bias.double()
        error = error + 2.0**-24 * y.abs()
    if is_gated(layer.epilogue):
        gate, up = y.chunk(2, 1)
        gated = finish(torch.cat((gate, torch.ones_like(up)), 1), None, layer.epilogue, None)
        of_gate, of_up = error.chunk(2, 1)
        error = SLOPE * of_gate * (up.abs() + of_up) + of_up * gated.abs() + GATE * wanted.abs()
    share, least = ROUNDING[found.dtype]
    bound = error + share * (wanted.abs() + error) + 2.0**-23 * wanted.abs() + least + 1e-30
    off = (found.double() - wanted).abs() / bound
    worst = int(off.nan_to_num(nan=torch.inf).argmax())
    at = divmod(worst, off.shape[1])
    assert (off <= 1).all(), f"{off[at]:.2f} times the bound at {at}: {found[at]}, not {wanted[at]}"
