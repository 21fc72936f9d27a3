"""Linear layers of the CPU kernels on poisoned memory, and the formula in float64 beside them.

A `Weight` is a matrix as a file has it: bytes of an encoding, drawn so that every bit is used and scales are numbers
that a model has. What its bytes mean is for kernels/quant/dequantise.py to say.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from edgekv.kernels.cpu import abi
from edgekv.kernels.cpu.abi import Epilogue
from edgekv.kernels.cpu.formats import ALIGNMENT, PanelFormat, activation_stride, panel_bytes, panel_format
from edgekv.kernels.cpu.library import load_library
from edgekv.kernels.quant.dequantise import dequantise
from edgekv.kernels.quant.encodings import ENCODINGS, Encoding

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

# Where a block has its float16 scales, and bytes that have to be something else than random.
_HALVES = {"q4_1": (0, 2), "q5_1": (0, 2), "q4_K": (0, 2), "q5_K": (0, 2), "q6_K": (208,)}
_PADDING = 3  # of affine4


@cache
def pool(tier: str, threads: int) -> int:
    """A pool of the library; lives as long as the process."""
    made: int | None = load_library().functions.ek_pool_new(tier.encode(), threads, None)
    assert made is not None
    return made


def aligned(num_bytes: int, fill: int) -> Bytes:
    """Bytes at a multiple of 64."""
    data = np.full(num_bytes + ALIGNMENT, fill, np.uint8)
    offset = -data.ctypes.data % ALIGNMENT
    return data[offset : offset + num_bytes]


def random_rows(encoding: Encoding, rows: int, cols: int, rng: np.random.Generator) -> Bytes:
    """Rows [rows, row_bytes] with any bits, but with scales of about 1/64 and of either sign."""
    if encoding.is_float:
        numbers = torch.from_numpy(rng.standard_normal((rows, cols), dtype=np.float32))
        kind = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[encoding.name]
        return numbers.to(kind).view(torch.uint8).numpy()
    raw = rng.integers(0, 256, (rows, cols // encoding.block_cols, encoding.block_bytes), np.uint8)
    if encoding.name == "mxfp4":
        raw[..., 0] = rng.integers(118, 124, raw.shape[:2])
    else:
        for place in _HALVES.get(encoding.name, (0,)):
            scales = rng.uniform(0.5, 1.5, (*raw.shape[:2], 1)) * rng.choice([-1, 1], (*raw.shape[:2], 1)) / 64
            raw[..., place : place + 2] = scales.astype(np.float16).view(np.uint8)
    if encoding.group:
        raw[..., _PADDING] = 0
    return raw.reshape(rows, -1)


@dataclass(frozen=True, eq=False)
class Weight:
    """A stored matrix, and its exact values [rows, cols]."""

    encoding: Encoding
    raw: Bytes
    values: Floats

    @property
    def panels(self) -> PanelFormat:
        return panel_format(self.encoding)

    def pack(self, handle: int, dest_rows: Sequence[int] | None = None, rows: int | None = None) -> "Packed":
        """Its rows in a matrix of `rows` rows, at `dest_rows`: as they are, if not said."""
        count, cols = self.values.shape
        places = np.array(range(count) if dest_rows is None else dest_rows, np.int64)
        packed = Packed.empty(self.panels, count if rows is None else rows, cols, self.encoding.group)
        error = load_library().functions.ek_pack(
            handle, self.encoding.number, self.encoding.group, self.raw.ctypes.data, self.raw.shape[1], count,
            places.ctypes.data, ctypes.byref(packed.matrix),
        )  # fmt: skip
        assert error == 0, abi.Error(error)
        return packed


def weight_of(encoding: Encoding, raw: Bytes) -> Weight:
    cols = raw.shape[1] // encoding.block_bytes * encoding.block_cols
    return Weight(encoding, raw, dequantise(encoding, torch.from_numpy(raw), cols).numpy())


def random_weight(name: str, rows: int, cols: int, rng: np.random.Generator) -> Weight:
    return weight_of(ENCODINGS[name], random_rows(ENCODINGS[name], rows, cols, rng))


@dataclass(frozen=True, eq=False)
class Packed:
    """A matrix in panels, with poison behind it."""

    matrix: abi.Matrix
    memory: Bytes
    num_bytes: int

    @staticmethod
    def empty(panels: PanelFormat, rows: int, cols: int, group: int) -> "Packed":
        num_bytes = panel_bytes(panels, rows, cols, group)
        memory = aligned(num_bytes + ALIGNMENT, 0xFF)
        memory[:num_bytes] = 0
        return Packed(abi.Matrix(memory.ctypes.data, int(panels), rows, cols, group), memory, num_bytes)

    def row_values(self, handle: int, rows: Sequence[int]) -> Floats:
        """What ek_matrix_rows makes of it."""
        wanted, out = np.array(rows, np.int64), np.full((len(rows), self.matrix.cols + 1), np.nan, np.float32)
        error = load_library().functions.ek_matrix_rows(
            handle, ctypes.byref(self.matrix), wanted.ctypes.data, len(rows), out.ctypes.data, out.shape[1]
        )
        assert error == 0, abi.Error(error)
        assert np.isnan(out[:, -1]).all()
        return out[:, :-1]


class Activations:
    """Rows [tokens, cols] in all the forms that matrices take, with poison around them.

    `wanted(panels)`: the numbers that a format is multiplied with, once they are rounded to its form.
    """

    def __init__(self, x: Floats) -> None:
        tokens, cols = x.shape
        groups = -(-cols // 32)
        self.f32 = np.full((tokens, activation_stride(cols, 4)), np.nan, np.float32)
        self.bf16 = np.full((tokens, activation_stride(cols + cols % 2, 2)), 0xFFFF, np.uint16)
        self.q8 = np.full((tokens, activation_stride(32 * groups, 1)), 127, np.int8)
        self.scale = np.full((tokens, groups + 1), np.nan, np.float32)
        self.sum = np.full((tokens, groups + 1), 1 << 20, np.int32)
        self.f32[:, :cols] = x
        rounded = torch.from_numpy(x).bfloat16()
        self.bf16[:, : cols + cols % 2] = 0
        self.bf16[:, :cols] = rounded.view(torch.uint16).numpy()
        padded = np.zeros((tokens, groups, 32), np.float32)
        padded.reshape(tokens, -1)[:, :cols] = x
        top = np.abs(padded).max(2, keepdims=True)
        integers = np.rint(padded / np.where(top > 0, top / 127, 1)).astype(np.int8)
        self.q8[:, : 32 * groups] = integers.reshape(tokens, -1)
        self.scale[:, :groups] = top[..., 0] / np.float32(127)
        self.sum[:, :groups] = integers.sum(2, dtype=np.int32)
        self._f32, self._bf16 = x.astype(np.float64), rounded.double().numpy()
        self._q8 = (integers * self.scale[:, :groups, None].astype(np.float64)).reshape(tokens, -1)[:, :cols]
        self.struct = abi.Acts(
            *(each.ctypes.data for each in (self.f32, self.bf16, self.q8, self.scale, self.sum)),
            *(each.shape[1] for each in (self.f32, self.bf16, self.q8, self.scale)),
        )

    def wanted(self, panels: PanelFormat) -> Doubles:
        if panels in (PanelFormat.F32, PanelFormat.F16):
            return self._f32
        return self._bf16 if panels is PanelFormat.BF16 else self._q8


@dataclass(frozen=True, eq=False)
class Layer:
    """Weights one under the other, and what is done with their product."""

    weights: tuple[Weight, ...]
    epilogue: Epilogue = Epilogue.STORE
    bias: Floats | None = None
    packed: list[Packed] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return sum(len(weight.values) for weight in self.weights)

    @property
    def is_gated(self) -> bool:
        return self.epilogue in (Epilogue.SILU_MUL, Epilogue.GELU_MUL)

    def pack(self, handle: int) -> None:
        """Once, before it is run. Of a gated layer the two weights' panels alternate."""
        if not self.is_gated:
            self.packed.extend(weight.pack(handle) for weight in self.weights)
            return
        gate, up = self.weights
        both = Weight(gate.encoding, np.concatenate((gate.raw, up.raw)), np.concatenate((gate.values, up.values)))
        rows = np.arange(len(gate.values))
        places = rows // 16 * 32 + rows % 16
        self.packed.append(both.pack(handle, [*places, *(places + 16)]))

    def run(self, handle: int, acts: Activations, before: Floats) -> Floats:
        """[tokens, columns]; `before` is what lies in the output at first."""
        tokens, columns = before.shape
        out = np.full((tokens + 1, columns + 3), np.nan, np.float32)
        out[:tokens, :columns] = before
        parts = (abi.Matrix * len(self.packed))(*(packed.matrix for packed in self.packed))
        linear = abi.Linear(
            parts=ctypes.addressof(parts), num_parts=len(parts), epilogue=int(self.epilogue),
            bias=None if self.bias is None else self.bias.ctypes.data, acts=ctypes.addressof(acts.struct),
            out=out.ctypes.data, out_stride=out.shape[1], tokens=tokens,
        )  # fmt: skip
        error = load_library().functions.ek_linear_run(handle, ctypes.byref(linear))
        assert error == 0, abi.Error(error)
        assert np.isnan(out[tokens:]).all()
        assert np.isnan(out[:, columns:]).all()
        return out[:tokens, :columns]

    def wanted(self, acts: Activations, before: Floats) -> tuple[Doubles, Doubles]:
        """The output in float64, and how far off rounding may put it."""
        products, errors = zip(*(_product(weight, acts) for weight in self.weights), strict=True)
        y, error = np.concatenate(products, 1), np.concatenate(errors, 1)
        if self.bias is not None:
            y = y + _of_rows(self, self.bias)
            error = error + 1e-7 * np.abs(y)
        if self.epilogue is Epilogue.ADD:
            return y + before, error + 2e-7 * np.abs(y + before)
        if not self.is_gated:
            return y, error
        half = y.shape[1] // 2
        gate, up = y[:, :half], y[:, half:]
        gated = gate / (1 + np.exp(np.minimum(-gate, 700.0))) if self.epilogue is Epilogue.SILU_MUL else _gelu(gate)
        # Both functions have slopes below 1.2.
        off = 1.2 * error[:, :half] * np.abs(up) + error[:, half:] * np.abs(gated)
        return gated * up, off + 2e-6 * np.abs(gated * up) + 1e-30


def _product(weight: Weight, acts: Activations) -> tuple[Doubles, Doubles]:
    """W x for each token, and a bound of what rounding adds: a sum in float32 of products that are nearly exact."""
    x, w = acts.wanted(weight.panels), weight.values.astype(np.float64)
    # In quantised formats what is added is large where an offset is, so the largest weight of 32 counts for all.
    size = np.abs(w)
    if weight.panels > PanelFormat.BF16:
        size = np.repeat(size.reshape(len(w), -1, 32).max(2), 32, axis=1)
    steps = 8 + w.shape[1] / (32 if weight.panels > PanelFormat.BF16 else 1)
    return x @ w.T, 2.0**-23 * np.sqrt(steps) * (np.abs(x) @ size.T) + 1e-30


def _of_rows(layer: Layer, bias: Floats) -> Doubles:
    """A bias in the order of the weights' rows: a gated layer's lies as its panels do."""
    if not layer.is_gated:
        return bias.astype(np.float64)
    halves = bias.astype(np.float64).reshape(-1, 2, 16)
    return np.concatenate((halves[:, 0].reshape(-1), halves[:, 1].reshape(-1)))


def _gelu(x: Doubles) -> Doubles:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
