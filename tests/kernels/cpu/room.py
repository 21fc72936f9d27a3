"""Memory for running operations of the CPU kernels in tests: buffers, prepared activations, a batch, a cache."""

import ctypes
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from edgekv.kernels.cpu import abi
from edgekv.kernels.cpu.formats import PanelFormat, activation_stride
from edgekv.kernels.cpu.library import Library, load_library
from edgekv.kernels.cpu.program import Pool

POISON = float("nan")


@cache
def library() -> Library:
    return load_library()


@cache
def pool(threads: int, tier: str | None = None) -> Pool:
    return Pool(library(), threads, tier=tier)


class Room:
    """Buffers of `widths`, each of `tokens` rows between poisoned rows and columns, and all that a step points to."""

    def __init__(
        self,
        widths: Sequence[int],
        tokens: int,
        *,
        samples: Sequence[int] = (),
        heads: int = 1,
        kv_heads: int = 1,
        head_dim: int = 16,
        rope_dim: int | None = None,
        ropes: int = 1,
    ) -> None:
        self.tokens, self.widths = tokens, list(widths)
        widest = max(widths)
        self.memory = [torch.full((tokens + 1, activation_stride(width, 4)), POISON) for width in widths]
        structs = [abi.Buffer(tensor.data_ptr(), tensor.shape[1]) for tensor in self.memory]
        self._buffers = (abi.Buffer * len(widths))(*structs)
        self.f32 = torch.full((tokens + 1, activation_stride(widest, 4)), POISON)
        self.bf16 = torch.full((tokens + 1, activation_stride(widest, 2)), POISON, dtype=torch.bfloat16)
        self.q8 = torch.full((tokens + 1, activation_stride(widest, 1)), -128, dtype=torch.int8)
        self.scales = torch.full((tokens + 1, -(-widest // 32) + 1), POISON)
        self.sums = torch.full(self.scales.shape, -1, dtype=torch.int32)
        self.tables = torch.full((ropes, tokens, head_dim), POISON)
        self.token_ids = np.zeros(tokens, np.int64)
        self.positions = np.arange(tokens)
        self.sample_rows = np.array(samples, np.int64)
        self.starts, self.lengths = np.zeros(1, np.int64), np.array([tokens])
        self.first_rows, self.table_starts = np.zeros(1, np.int64), np.array([0, 0])
        self.blocks = np.zeros(0, np.int64)
        self.batch = abi.Batch()
        self.batch.tokens, self.batch.spans, self.batch.samples = tokens, 1, len(samples)
        acts = abi.Acts(
            *(each.data_ptr() for each in (self.f32, self.bf16, self.q8, self.scales, self.sums)),
            *(each.stride(0) for each in (self.f32, self.bf16, self.q8, self.scales)),
        )
        self.program = abi.Program(
            heads=heads, kv_heads=kv_heads, head_dim=head_dim, rope_dim=head_dim if rope_dim is None else rope_dim
        )
        self.step = abi.Step(
            batch=ctypes.addressof(self.batch),
            buffers=ctypes.addressof(self._buffers),
            prepared=acts,
            rope_tables=self.tables.data_ptr(),
        )
        self.kept: list[object] = []
        self.set_batch()

    def set_batch(self) -> None:
        """After the arrays were replaced."""
        for name in ("token_ids", "positions", "sample_rows", "starts", "lengths", "first_rows", "blocks"):
            setattr(self.batch, name, getattr(self, name).ctypes.data)
        self.batch.table_starts = self.table_starts.ctypes.data

    def rows(self, buffer: int) -> Tensor:
        """[tokens, width], to be written and read."""
        return self.memory[buffer][: self.tokens, : self.widths[buffer]]

    def is_untouched_around(self, buffer: int) -> bool:
        """Whether all past the rows and columns is still poison."""
        memory = self.memory[buffer]
        return bool(memory[self.tokens :].isnan().all() and memory[:, self.widths[buffer] :].isnan().all())

    def op(self, kind: abi.OpKind, **fields: object) -> abi.Op:
        """One operation; tensors and matrices among the fields are kept and pointed to."""
        op = abi.Op(kind=int(kind), src=-1, dst=-1, scale=1.0)
        for name, value in fields.items():
            if isinstance(value, Tensor):
                self.kept.append(value)
                value = value.data_ptr()
            elif isinstance(value, ctypes.Array):
                self.kept.append(value)
                op.num_parts, value = len(value), ctypes.addressof(value)
            setattr(op, name, value)
        return op


def f32_matrix(weight: Tensor) -> tuple[ctypes.Array[abi.Matrix], Tensor]:
    """A matrix [rows, cols] in panels of float32, and what it points to."""
    rows, cols = weight.shape
    padded = torch.zeros(-(-rows // 16) * 16, cols)
    padded[:rows] = weight
    panels = padded.view(-1, 16, cols).transpose(1, 2).contiguous()
    return (abi.Matrix * 1)(abi.Matrix(panels.data_ptr(), int(PanelFormat.F32), rows, cols, 0)), panels
