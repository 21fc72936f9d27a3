"""Products with weights of every format on the card, and what goes before and beside them.

Weights are random bytes of an encoding, and outputs lie in a frame of NaNs: see tests/kernels/fibers/gemm_cases.py.
"""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from edgekv.kernels.gemm import acts, dequant, gemm, gemv, wide_gemv
from edgekv.kernels.gemm.epilogue import Epilogue
from edgekv.kernels.gemm.matrix import PlaneMatrix
from edgekv.kernels.gemm.planes import ENCODINGS_IN_PLANES
from edgekv.kernels.gemm.shape import GemvShape
from edgekv.kernels.quant.encodings import ENCODINGS
from edgekv.kernels.rt.registry import KernelSpec
from tests.gpu import bounds
from tests.gpu.bed import Bed
from tests.kernels.fibers.gemm_cases import (
    EPILOGUES,
    Layer,
    assert_close,
    assert_frame_is_whole,
    draw,
    draw_layer,
    draw_plain,
    framed,
)

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
FORMATS = tuple(encoding.name for encoding in ENCODINGS_IN_PLANES)
# Tokens, the kernel's shape and the output's type; each format with all of them.
SHAPES = (
    (1, GemvShape(1, 2, 1), BF16),
    (3, GemvShape(4, 4, 4), F32),
    (8, GemvShape(8, 2, 2), F16),
)
WIDE = (
    (BF16, BF16, BF16, GemvShape(1, 2, 1)),
    (BF16, F32, F32, GemvShape(8, 4, 4)),
    (F16, F16, F32, GemvShape(2, 4, 2)),
    (F32, F32, F32, GemvShape(4, 2, 4)),
    (F32, BF16, BF16, GemvShape(1, 4, 2)),
)
MARGIN = 8  # of a frame where rows have to begin at multiples of 16 bytes

of_formats = pytest.mark.parametrize("name", FORMATS)


def specs(bed: Bed) -> Iterator[KernelSpec]:
    for dtype in (BF16, F16, F32):
        yield acts.spec(dtype)
    for name in FORMATS:
        encoding = ENCODINGS[name]
        yield from (gemv.spec(encoding, shape, out) for _, shape, out in SHAPES)
        yield from (dequant.spec(encoding, dtype) for dtype in (BF16, F16, F32))
        for tokens, dtype, out in _gemm_kinds(bed, name):
            yield from (gemm.spec(encoding, tokens, dtype, out, merge=merge) for merge in (False, True))
    yield from (wide_gemv.spec(weights, x, shape, out) for weights, x, out, shape in WIDE)


def _layer(name: str, bed: Bed, epilogue: Epilogue, *, seed: int) -> Layer:
    rng = np.random.default_rng(seed)
    cols = bed.sized(card=4096, host=512)
    return draw_layer(
        name, bed.sized(card=700, host=21), cols // ENCODINGS[name].block_cols, rng, epilogue, biased=seed % 2 == 0
    )


def _moved(bed: Bed, planes: PlaneMatrix) -> PlaneMatrix:
    return PlaneMatrix(planes.encoding, planes.cols, *(bed.put(each) for each in (planes.q, planes.h, planes.s)))


def _out(bed: Bed, before: Tensor) -> tuple[Tensor, Tensor]:
    """An output on the device with what lies in it before, and the frame around it."""
    whole = bed.put(framed(before)[1])
    return whole[1:-1, 3:-3], whole


def _bias(bed: Bed, layer: Layer) -> Tensor | None:
    return None if layer.bias is None else bed.put(layer.bias)


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
def test_activations_are_rounded_to_the_bit(dtype: torch.dtype, bed: Bed) -> None:
    rng = np.random.default_rng(0)
    numbers = rng.standard_normal((7, bed.sized(card=14336, host=320)), dtype=np.float32)
    numbers *= np.float32(2.0) ** rng.integers(-12, 12, (7, 1))
    numbers[2, 37], numbers[3, 64:96], numbers[5, 5] = np.nan, 0, np.inf
    x = torch.from_numpy(numbers).to(dtype)
    into, own = acts.Int8Rows.empty(*x.shape, bed.device), bed.put(x)
    bed.run(acts.prepare(own, into))
    wanted = acts.reference(x)
    assert torch.equal(into.codes.cpu(), wanted.codes)
    sums = into.sums.cpu()
    assert torch.equal(sums[..., 1], wanted.sums[..., 1])
    scales = sums.view(torch.float32)[..., 0]
    assert torch.equal(scales.isnan(), wanted.scales.isnan())
    assert torch.equal(scales.nan_to_num(), wanted.scales.nan_to_num())


@of_formats
@pytest.mark.parametrize(("tokens", "shape", "dtype"), SHAPES, ids=str)
def test_few_tokens_times_quantised_weights(
    name: str, tokens: int, shape: GemvShape, dtype: torch.dtype, bed: Bed
) -> None:
    for seed, epilogue in enumerate(EPILOGUES):
        rng, layer = np.random.default_rng(seed), _layer(name, bed, epilogue, seed=seed)
        rounded = acts.reference(draw(rng, tokens, layer.planes.cols, F32))
        before = draw(rng, tokens, layer.columns, dtype)
        out, whole = _out(bed, before)
        planes, bias = _moved(bed, layer.planes), _bias(bed, layer)
        x = acts.Int8Rows(bed.put(rounded.codes), bed.put(rounded.sums))
        bed.run(
            gemv.prepare(
                planes, x, out, multiprocessors=bed.card.compute_units, epilogue=epilogue, bias=bias, shape=shape
            )
        )
        assert_frame_is_whole(whole.cpu())
        numbers, values = rounded.values(), layer.values.double()
        top = values.abs().unflatten(1, (-1, 32)).amax(2).repeat_interleave(32, 1)
        share = bounds.PRODUCTS * 2.0**-24 * (layer.planes.groups / (32 * shape.split) + 13) * 4
        assert_close(out.cpu(), layer, numbers @ values.T, share * (numbers.abs() @ top.T), before)


@pytest.mark.parametrize(("weights", "x", "out", "shape"), WIDE, ids=str)
def test_few_tokens_times_plain_weights(
    weights: torch.dtype, x: torch.dtype, out: torch.dtype, shape: GemvShape, bed: Bed
) -> None:
    cols, tokens = bed.sized(card=4104, host=520), shape.tokens
    for seed, epilogue in enumerate(EPILOGUES):
        rng = np.random.default_rng(seed)
        layer = draw_plain(weights, bed.sized(card=700, host=21), cols, rng, epilogue, biased=seed % 2 == 0)
        numbers, before = draw(rng, tokens, cols, x), draw(rng, tokens, layer.columns, out)
        into, whole = _out(bed, before)
        matrix, own, bias = bed.put(layer.plain), bed.put(numbers), _bias(bed, layer)
        bed.run(
            wide_gemv.prepare(
                matrix, own, into, multiprocessors=bed.card.compute_units, epilogue=epilogue, bias=bias, shape=shape
            )
        )
        assert_frame_is_whole(whole.cpu())
        wide, values = numbers.double(), layer.values.double()
        share = bounds.PRODUCTS * 2.0**-24 * (cols / (32 * shape.split) + 17)
        assert_close(into.cpu(), layer, wide @ values.T, share * (wide.abs() @ values.abs().T), before)


def _gemm_kinds(bed: Bed, name: str) -> Iterator[tuple[int, torch.dtype, torch.dtype]]:
    """Tokens, operands and outputs; formats take turns with the second."""
    is_odd = FORMATS.index(name) % 2
    yield (9, 32)[is_odd], bed.operands(BF16), bed.operands(BF16)
    yield (27, 16)[is_odd], F16, F32


@of_formats
def test_some_tokens_times_quantised_weights(name: str, bed: Bed) -> None:
    for tokens, dtype, out_dtype in _gemm_kinds(bed, name):
        for seed, epilogue in enumerate((Epilogue.ADD, Epilogue.SILU_MUL)):
            rng, layer = np.random.default_rng(seed), _layer(name, bed, epilogue, seed=seed)
            x, before = draw(rng, tokens, layer.planes.cols, dtype), draw(rng, tokens, layer.columns, out_dtype)
            out, whole = _out(bed, before)
            planes, own, bias = _moved(bed, layer.planes), bed.put(x), _bias(bed, layer)
            parts = torch.full((bed.sized(card=8 << 20, host=1 << 16),), torch.nan, device=bed.device)
            bed.run(
                gemm.prepare(
                    planes, own, out, multiprocessors=bed.card.compute_units, parts=parts, epilogue=epilogue,
                    bias=bias,
                )
            )  # fmt: skip
            assert_frame_is_whole(whole.cpu())
            wide, values = x.double(), layer.values.to(dtype).double()
            share = bounds.PRODUCTS * 2.0**-23 * (16 + layer.planes.cols / 16)
            assert_close(out.cpu(), layer, wide @ values.T, share * (wide.abs() @ values.abs().T), before)


@of_formats
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
def test_weights_become_plain_numbers(name: str, dtype: torch.dtype, bed: Bed) -> None:
    layer = _layer(name, bed, Epilogue.STORE, seed=3)
    planes, rows = _moved(bed, layer.planes), len(layer.values)
    largest = layer.values.abs().unflatten(1, (-1, 32)).amax(2).repeat_interleave(32, 1)
    for ids, scale in ((None, 1.0), ([0, rows - 1, rows + 9, -4, 5, 5], 45.254833)):
        wanted_ids = None if ids is None else torch.tensor(ids, dtype=torch.int32)
        chosen = slice(None) if wanted_ids is None else wanted_ids.long().clamp(0, rows - 1)
        count = rows if ids is None else len(ids)
        whole = bed.put(framed(torch.full((count, planes.cols), torch.nan, dtype=dtype), MARGIN)[1])
        out, own = whole[1:-1, MARGIN:-MARGIN], None if wanted_ids is None else bed.put(wanted_ids)
        bed.run(dequant.prepare(planes, out, ids=own, scale=scale))
        assert_frame_is_whole(whole.cpu(), MARGIN)
        wanted = dequant.reference(layer.values, dtype, wanted_ids, scale).double()
        bound = bounds.DEQUANTISED[dtype] * wanted.abs() + bounds.DEQUANTISED_OF_LARGEST * scale * largest[chosen]
        assert ((out.cpu().double() - wanted).abs() <= bound).all()
