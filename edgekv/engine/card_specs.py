"""Which kernels a model needs on a card, found out without one: its programs are made of tensors that have no memory.

Runs in: anywhere with torch; owns: nothing. For the kernels that wheels bring along, and for whoever wants to know.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from edgekv.core.dtype_choice import DtypeName
from edgekv.core.kv_format import KVFormatName
from edgekv.engine.card_buffers import StepBuffers
from edgekv.engine.card_device import Event, Graph
from edgekv.engine.card_model import CardModel
from edgekv.engine.card_pool import CardKVPool
from edgekv.engine.card_runner import CardRunner
from edgekv.kernels.common.prepared import Launchers
from edgekv.kernels.rt.registry import KernelSpec
from edgekv.model.card_matrices import DeclaredCardMatrices
from edgekv.model.card_memory import CardLimits
from edgekv.model.lowering import lower
from edgekv.model.matrix_layout import WeightForm
from edgekv.model.spec import ModelSpec
from edgekv.model.stored import StoredTensors


def kernels_of(
    spec: ModelSpec,
    stored: StoredTensors,
    *,
    form: WeightForm,
    dtype: DtypeName,
    kv_format: KVFormatName,
    limits: CardLimits,
    compute_units: int,
    has_bf16_units: bool = True,
    block_size: int = 16,
) -> tuple[KernelSpec, ...]:
    """Each once. `stored` need be open no more than a WeightTable is; the card's `compute_units` decide on shapes.

    Raises ValueError for what the kernels do not have, ModelError where `form` does not suit the files.
    """
    card = _NoCard(compute_units, has_bf16_units)
    model = CardModel(lower(spec, DeclaredCardMatrices(stored, form, dtype)), dtype, card.allocate)
    pool = CardKVPool(spec, kv_format=kv_format, device=card.device, block_size=block_size, segment_blocks=1)
    runner = CardRunner(card, model, pool, StepBuffers(card, spec, limits, model.facts, dtype))
    return runner.kernels()


class _NoCard:
    """Memory that is none, and nothing that could run."""

    def __init__(self, compute_units: int, has_bf16_units: bool) -> None:
        self.device = torch.device("meta")
        self.compute_units = self.decode_blocks = compute_units
        self.has_bf16_units = has_bf16_units
        self.stream = 0

    @property
    def launchers(self) -> Launchers:
        raise NotImplementedError

    def allocate(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def staging(self, num_bytes: int) -> Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def event(self) -> Event:
        return _NoEvent()

    def call(self, function: Callable[[], object]) -> None:
        raise NotImplementedError

    def capture(self, run: Callable[[], None], owner: object) -> Graph:
        raise NotImplementedError

    def compile(self, specs: tuple[KernelSpec, ...], progress: Callable[[int, int], None]) -> None:
        raise NotImplementedError

    def free_bytes(self) -> int:
        raise NotImplementedError

    def product(self, x: Tensor, weights: Tensor, out: Tensor, rounded: Tensor) -> None:
        raise NotImplementedError


class _NoEvent:
    def record(self) -> None:
        raise NotImplementedError

    def synchronize(self) -> None:
        raise NotImplementedError
