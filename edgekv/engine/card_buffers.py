"""The memory that steps on a card work in: one allocation, cut into the buffers that were planned.

Runs in: engine thread; owns: that allocation, which stays where it is, so that captured graphs stay valid.
"""

import torch
from torch import Tensor

from edgekv.core.dtype_choice import DtypeName
from edgekv.engine.card_device import Card
from edgekv.kernels.gemm.acts import Int8Rows
from edgekv.model.card_layout import aligned
from edgekv.model.card_memory import CardLimits, MatrixFacts, buffer_bytes, total_bytes
from edgekv.model.spec import ModelSpec

TORCH_DTYPES: dict[DtypeName, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class StepBuffers:
    """Raw bytes by name, and what kernels want to see in them."""

    def __init__(self, card: Card, spec: ModelSpec, limits: CardLimits, facts: MatrixFacts, dtype: DtypeName) -> None:
        """Raises MemoryError, or torch's like."""
        sizes = buffer_bytes(spec, limits, facts, dtype)
        self.num_bytes = total_bytes(sizes.values())
        self.dtype = TORCH_DTYPES[dtype]
        self.limits = limits
        memory = card.allocate(self.num_bytes)
        # Nothing is read before it is written but tables of addresses and counts; yet a NaN that lies about would
        # reach results through rows that are only padding, and look like a fault of theirs.
        memory.zero_()
        self._pieces: dict[str, Tensor] = {}
        first = 0
        for name, size in sizes.items():
            self._pieces[name] = memory[first : first + size]
            first += aligned(size)
        # What a step is told lies behind the tokens that the step before has chosen: one gather takes from both.
        results, inputs = sizes["results"], sizes["inputs"]
        start = sum(aligned(size) for name, size in sizes.items() if name not in ("results", "inputs"))
        assert list(sizes)[-2:] == ["results", "inputs"], "results and inputs are the last two"
        self._told = memory[start : start + aligned(results) + inputs]
        self._inputs_at = aligned(results) // 4

    def view(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """The beginning of a buffer, as `shape` of `dtype` (None: of the activations')."""
        kind = dtype or self.dtype
        count = 1
        for size in shape:
            count *= size
        return self._pieces[name][: count * kind.itemsize].view(kind).view(*shape)

    def raw(self, name: str) -> Tensor:
        """All of a buffer, uint8."""
        return self._pieces[name]

    @property
    def results(self) -> Tensor:
        """[words] int32: see `card_results`."""
        return self._pieces["results"].view(torch.int32)

    @property
    def inputs(self) -> Tensor:
        """[words] int32: see `card_inputs`."""
        return self._pieces["inputs"].view(torch.int32)

    @property
    def told(self) -> Tensor:
        """Results and inputs as one, [words] int32."""
        return self._told.view(torch.int32)

    @property
    def inputs_at(self) -> int:
        """Where in `told` the inputs begin."""
        return self._inputs_at

    def int8_rows(self, tokens: int, cols: int) -> Int8Rows:
        """Room for activations of a quantised matrix."""
        groups = cols // 32
        return Int8Rows(
            self.view("codes", tokens, 2, groups, 16, dtype=torch.int8),
            self.view("code_sums", tokens, groups, 2, dtype=torch.int32),
        )
