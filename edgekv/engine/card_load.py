"""A card's kernels for one engine: whether they run its model, and how it is loaded for them.

Runs in: engine thread; owns: nothing once it returns.
"""

import logging
from collections.abc import Callable
from dataclasses import replace

import torch

from edgekv.core.draft_plan import DraftPlan
from edgekv.core.dtype_choice import DtypeChoice
from edgekv.core.memory_plan import MemoryPlan
from edgekv.engine.card_buffers import StepBuffers
from edgekv.engine.card_device import Card, TorchCard
from edgekv.engine.card_model import CardModel
from edgekv.engine.card_pool import CardKVPool
from edgekv.engine.card_runner import CardRunner
from edgekv.engine.card_specs import kernels_of
from edgekv.engine.card_torch import check_torch
from edgekv.engine.device_faults import told_as_torch
from edgekv.engine.kernel_needs import Lacking, why_not_on_card
from edgekv.engine.settings import EngineSettings, card_limits, plan_engine, weight_form
from edgekv.kernels.fused import sample
from edgekv.kernels.rt.compiler import CompileFailed
from edgekv.kernels.rt.device_error import DriverError
from edgekv.kernels.rt.installed import DriverMissing
from edgekv.kernels.rt.registry import KernelSpec, KernelUnavailable
from edgekv.model.card_matrices import load_on_card
from edgekv.model.card_memory import MOST_SEGMENTS
from edgekv.model.spec import ModelSpec
from edgekv.model.weight_table import read_weight_table

log = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]

STAGE = "compiling the card's kernels (once)"


def is_driven_by_torch(settings: EngineSettings) -> bool:
    """Whether the place is a real card; one that main memory plays has no kernels."""
    return settings.place.kind == "card" and settings.place.torch_name.startswith("cuda")


def open_card(settings: EngineSettings, spec: ModelSpec, progress: Progress) -> Card | Lacking:
    """The card, set in this thread, or why its kernels cannot run the model.

    All kernels are compiled and one is loaded, so that what cannot work is known before weights are read. Raises
    WrongTorch where torch itself cannot run there, ModelError for files that could not be loaded, and what torch raises
    of a device that does not answer.
    """
    if (lacking := why_not_on_card(settings, spec)) is not None:
        return lacking
    device = torch.device(settings.place.torch_name)
    check_torch(device)
    try:
        card = TorchCard(device)
        told_as_torch(lambda: card.launchers.launcher(sample.edit_spec()))
        card.compile(needed_kernels(settings, spec, card), lambda done, total: progress(done, total, STAGE))
    except (KernelUnavailable, DriverMissing) as error:
        return Lacking(error.reason, error.remedy)
    except CompileFailed as error:
        log.debug("%s", error)
        return Lacking(f"they do not compile here: {error.summary}")
    except DriverError as error:
        return Lacking(f"they do not load: {error}")
    return card


def needed_kernels(settings: EngineSettings, spec: ModelSpec, card: Card) -> tuple[KernelSpec, ...]:
    """All that steps of this engine can launch. Raises ModelError, and what `plan_engine` raises."""
    settings = replace(settings, native=True)
    table = read_weight_table(settings.folder, spec)
    choice, memory = plan_engine(settings, spec, table)
    return kernels_of(
        spec,
        table,
        form=weight_form(settings, choice),
        dtype=choice.name,
        kv_format=memory.kv_dtype,
        limits=card_limits(settings, spec),
        compute_units=card.compute_units,
        has_bf16_units=card.has_bf16_units,
        block_size=memory.kv.block_size,
    )


def load_card_runner(
    settings: EngineSettings,
    spec: ModelSpec,
    choice: DtypeChoice,
    memory: MemoryPlan | DraftPlan,
    card: Card,
    progress: Progress,
    *,
    in_flight: int = 2,
) -> tuple[CardKVPool, CardRunner]:
    """The model with an empty pool, every kernel compiled and loaded.

    Up to `in_flight` steps may be begun and not read. Raises ModelError naming the file and the tensor;
    KernelUnavailable, CompileFailed or DriverError for a kernel that cannot be had; the device's out of memory.
    """
    lowered = load_on_card(
        settings.folder,
        spec,
        form=weight_form(settings, choice),
        dtype=choice.name,
        allocate=card.allocate,
        progress=progress,
    )
    model = CardModel(lowered, choice.name, card.allocate)
    buffers = StepBuffers(card, spec, card_limits(settings, spec), model.facts, choice.name)
    pool = CardKVPool(
        spec,
        kv_format=memory.kv_dtype,
        device=card.device,
        block_size=memory.kv.block_size,
        segment_blocks=memory.kv.segment_blocks,
        table=buffers.view("segment_table", MOST_SEGMENTS, dtype=torch.int64),
    )
    runner = CardRunner(card, model, pool, buffers, in_flight=in_flight)
    told_as_torch(lambda: runner.load_kernels(lambda done, total: progress(done, total, STAGE)))
    return pool, runner
