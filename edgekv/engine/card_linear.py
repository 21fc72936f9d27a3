"""Which way a linear layer goes on a card, by its weights and the rows of the step.

    rows    plain weights        quantised
    1-8     our gemv             activations to int8, our gemv
    9-32    torch's product      our gemm by matrix units (16-bit activations)
    more    torch's product      dequantised a piece at a time, torch's product

Runs in: engine thread; owns: nothing.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from edgekv.engine.card_actions import Actions
from edgekv.engine.card_buffers import StepBuffers
from edgekv.engine.card_device import Card
from edgekv.kernels.common.prepared import Prepared
from edgekv.kernels.fused import gated
from edgekv.kernels.gemm import acts, dequant, gemm, gemv, wide_gemv
from edgekv.kernels.gemm.acts import Int8Rows
from edgekv.kernels.gemm.epilogue import Epilogue
from edgekv.kernels.gemm.matrix import PlaneMatrix
from edgekv.model.card_matrices import CardMatrix, CardRows
from edgekv.model.card_memory import GEMM_TOKENS, GEMV_TOKENS

_GATES = {Epilogue.SILU_MUL: gated.Gate.SILU, Epilogue.GELU_MUL: gated.Gate.GELU_TANH}


class CardBias:
    """A bias in both types that products want."""

    def __init__(self, wide: Tensor, narrow: Tensor) -> None:
        self.wide, self.narrow = wide, narrow

    def part(self, first: int, rows: int) -> "CardBias":
        """Of some rows."""
        return CardBias(self.wide[first : first + rows], self.narrow[first : first + rows])


class Linear:
    """Adds products to a program's actions."""

    def __init__(self, card: Card, actions: Actions, buffers: StepBuffers) -> None:
        self._card, self._actions, self._buffers = card, actions, buffers
        self._multiprocessors = card.compute_units
        self._prepared: tuple[int, Int8Rows] | None = None

    def forget(self) -> None:
        """The activations that the next product reads are others than before."""
        self._prepared = None

    def add(self, matrix: CardMatrix, x: Tensor, out: Tensor, epilogue: Epilogue, bias: CardBias | None) -> None:
        """To `out` goes epilogue(x · matrixᵀ + bias); x [rows, cols], out [rows, outputs]."""
        first = 0
        for part in matrix.parts:
            own = None if bias is None else bias.part(first, part.rows)
            into = out if len(matrix.parts) == 1 else out[:, first : first + part.rows]
            self._part(part, x, into, epilogue, own)
            first += part.rows

    def _part(self, part: CardRows, x: Tensor, out: Tensor, epilogue: Epilogue, bias: CardBias | None) -> None:
        rows, wide = x.shape[0], None if bias is None else bias.wide
        if part.planes is not None:
            if rows <= GEMV_TOKENS:
                codes = self._codes(x)
                self._actions.launch(
                    gemv.prepare(
                        part.planes, codes, out, multiprocessors=self._multiprocessors, epilogue=epilogue, bias=wide
                    )
                )
                return
            if rows <= GEMM_TOKENS and self._has_units(x.dtype):
                for prepared in gemm.prepare(
                    part.planes, x, out, multiprocessors=self._multiprocessors, parts=self._gemm_parts(),
                    epilogue=epilogue, bias=wide,
                ):  # fmt: skip
                    self._actions.launch(prepared)
                return
        elif rows <= GEMV_TOKENS:
            assert part.plain is not None
            self._actions.launch(
                wide_gemv.prepare(
                    part.plain, x, out, multiprocessors=self._multiprocessors, epilogue=epilogue, bias=wide
                )
            )
            return
        self._by_torch(part, x, out, epilogue, bias)

    def _has_units(self, dtype: torch.dtype) -> bool:
        """Whether the card's matrix units multiply it."""
        return dtype == torch.float16 or (dtype == torch.bfloat16 and self._card.has_bf16_units)

    def _codes(self, x: Tensor) -> Int8Rows:
        """Of activations, made once for all matrices that read them."""
        if self._prepared is None or self._prepared[0] != x.shape[1]:
            codes = self._buffers.int8_rows(*x.shape)
            self._actions.launch(acts.prepare(x, codes))
            self._prepared = x.shape[1], codes
        return self._prepared[1]

    def _gemm_parts(self) -> Tensor:
        size = len(self._buffers.raw("gemm_parts")) // 4
        return self._buffers.view("gemm_parts", size, dtype=torch.float32)

    def _by_torch(self, part: CardRows, x: Tensor, out: Tensor, epilogue: Epilogue, bias: CardBias | None) -> None:
        rows, outputs = x.shape[0], part.rows
        if epilogue in _GATES:
            pair = self._buffers.view("pair", rows, outputs, dtype=x.dtype)
            self._product(part, x, pair, bias, adds=False)
            half = outputs // 2
            self._actions.launch(gated.prepare(pair[:, :half], pair[:, half:], out, _GATES[epilogue]))
        elif out.dtype != x.dtype:  # logits in float32 of 16-bit activations
            rounded = self._buffers.view("short_logits", rows, outputs)
            if part.plain is not None and bias is None:
                card, plain = self._card, part.plain
                self._actions.call(lambda: card.product(x, plain, out, rounded))
            else:
                self._product(part, x, rounded, bias, adds=False)
                self._actions.call(lambda: out.copy_(rounded))
        else:
            self._product(part, x, out, bias, adds=epilogue is Epilogue.ADD)

    def _product(self, part: CardRows, x: Tensor, out: Tensor, bias: CardBias | None, *, adds: bool) -> None:
        for first, weights, before in self._plain(part):
            if before is not None:
                self._actions.launch(before)
            into = out[:, first : first + weights.shape[0]]
            self._actions.call(_product_of(x, weights, into, None if bias is None else bias.narrow[first:], adds=adds))

    def _plain(self, part: CardRows) -> Iterator[tuple[int, Tensor, Prepared | None]]:
        """Rows as plain numbers, and what has to run before they are."""
        if part.plain is not None:
            yield 0, part.plain, None
            return
        planes = part.planes
        assert planes is not None
        item = self._buffers.dtype.itemsize
        piece = max(1, len(self._buffers.raw("scratch")) // (planes.cols * item))
        for first in range(0, planes.rows, piece):
            rows = _rows_of(planes, first, min(piece, planes.rows - first))
            scratch = self._buffers.view("scratch", rows.rows, planes.cols)
            yield first, scratch, dequant.prepare(rows, scratch)


def _rows_of(planes: PlaneMatrix, first: int, count: int) -> PlaneMatrix:
    q, h, s = (plane[first : first + count] for plane in (planes.q, planes.h, planes.s))
    return PlaneMatrix(planes.encoding, planes.cols, q, h, s)


def _product_of(x: Tensor, weights: Tensor, out: Tensor, bias: Tensor | None, *, adds: bool) -> Callable[[], None]:
    turned = weights.t()
    own = None if bias is None else bias[: weights.shape[0]]

    def run() -> None:
        if adds:
            out.addmm_(x, turned)
            if own is not None:
                out.add_(own)
        elif own is None:
            torch.mm(x, turned, out=out)
        else:
            torch.addmm(own, x, turned, out=out)

    return run
