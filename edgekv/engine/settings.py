"""What an engine is built from, and the plan of its memory. Runs in: anywhere (no torch); owns: nothing."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from edgekv.config.settings import Config, Model, PinnedPrompt, Priorities
from edgekv.config.units import Share
from edgekv.core.capacity import Draft, DtypeChoice, DtypeName, MemoryPlan, WeightBytes, choose_dtype, plan_memory
from edgekv.core.dtype_choice import without_bfloat16
from edgekv.core.kv_format import KVDtypeName, kv_alignment
from edgekv.core.ledger import Ledger
from edgekv.engine.kernel_needs import NOT_IN_USE, NotServedHere, kv_engine, not_served, why_not_on_card, why_not_served
from edgekv.engine.no_room import KVBudgetTooLarge, NoRoomForKV
from edgekv.errors import EdgeKVError, OverBudget
from edgekv.kernels.cpu.threads import default_threads
from edgekv.model import card_memory
from edgekv.model.card_layout import card_bytes
from edgekv.model.card_memory import CardLimits, matrix_facts
from edgekv.model.card_shape import has_bfloat16
from edgekv.model.matrix_layout import WeightForm, WeightsName
from edgekv.model.native_shape import unsupported
from edgekv.model.spec import ModelSpec
from edgekv.model.step_memory import workspace_bytes
from edgekv.model.weight_plan import native_bytes, native_inputs, plain_bytes
from edgekv.model.weight_table import WeightTable, read_weight_table
from edgekv.smi.device import Place

KV_LEASE = "kv.target"


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What was asked for; None leaves the choice to the planner.

    `kv_budget` is in bytes (int) or a share of the device's free memory (float). `draft`: a draft model to keep room
    for beside it. `pinned_prompts`: beginnings of prompts to compute at load and keep. `weights`: see `Limits`.
    `weight_format`: what the model's weights are quantised to when they are loaded. `native`: whether our own kernels
    run the model, those of the processor or of the card; None: where they are available and can.
    """

    folder: Path
    place: Place
    dtype: DtypeName | None = None
    weight_format: WeightsName = "auto"
    kv_dtype: KVDtypeName | None = None
    kv_budget: int | float | None = None
    context_tokens: int | None = None
    block_size: int = 16
    prefix_cache: bool = True
    max_sequences: int = 16
    max_step_tokens: int = 512
    draft: Draft | None = None
    pinned_prompts: tuple[PinnedPrompt, ...] = ()
    weights: Mapping[int, int] = field(default_factory=lambda: Priorities().weights)
    native: bool | None = None

    @classmethod
    def from_config(cls, config: Config, model: Model, place: Place) -> "EngineSettings":
        """What the configuration asks for: the model's own settings over the general ones."""
        budget = config.kv.budget if model.kv.budget is None else model.kv.budget
        kv_dtype = config.kv.dtype if model.kv.dtype is None else model.kv.dtype
        return cls(
            folder=model.path,
            place=place,
            dtype=None if model.dtype == "auto" else model.dtype,
            weight_format=model.weights,
            kv_dtype=None if kv_dtype == "auto" else kv_dtype,
            kv_budget=None if budget == "auto" else budget.fraction if isinstance(budget, Share) else budget,
            context_tokens=None if model.context == "auto" else model.context,
            block_size=config.kv.block_size,
            prefix_cache=config.kv.prefix_cache,
            max_sequences=model.max_num_seqs,
            max_step_tokens=model.max_step_tokens,
            pinned_prompts=model.pinned_prompts,
            weights=config.priorities.weights,
        )


def runs_natively(settings: EngineSettings, spec: ModelSpec) -> bool:
    """Whether our own kernels are to run the model; a card's are taken to be available."""
    if settings.native is not None:
        return settings.native
    if settings.place.kind == "card":
        return why_not_on_card(settings, spec) is None
    from edgekv.kernels.cpu.library import available

    return unsupported(spec, settings.block_size) is None and available()


def weight_form(settings: EngineSettings, choice: DtypeChoice) -> WeightForm:
    """How a native model's weights are kept. A dtype that was asked for holds for what is not quantised."""
    return WeightForm(None if choice.keeps_stored else choice.name, settings.weight_format)


def weigh(
    settings: EngineSettings, spec: ModelSpec, table: WeightTable, *, native: bool
) -> tuple[DtypeChoice, WeightBytes]:
    """What a model computes in, and what its weights take. Raises ModelError where they cannot be kept as asked."""
    if settings.dtype is not None:
        choice = DtypeChoice(settings.dtype, "as configured")
    elif settings.weight_format != "auto":
        reason = f"the weights are quantised to {settings.weight_format} as they are loaded"
        choice = DtypeChoice("bfloat16", reason, keeps_stored=True)
    else:
        choice = choose_dtype(
            spec.dtype,
            spec.num_parameters,
            settings.place.kind,
            quantised=table.is_quantised,
            native=native,
            stored=table.dtypes,
        )
    if settings.place.kind == "card" and not has_bfloat16(settings.place.target):
        choice = without_bfloat16(choice, is_gemma=spec.architecture.startswith("Gemma"))
    if not native:
        return choice, plain_bytes(spec, choice.name)
    if settings.place.kind == "card":
        return choice, card_bytes(table, spec, weight_form(settings, choice), choice.name)
    return choice, native_bytes(table, spec, weight_form(settings, choice))


def plan_engine(
    settings: EngineSettings, spec: ModelSpec, table: WeightTable | None = None
) -> tuple[DtypeChoice, MemoryPlan]:
    """How the device's free memory is shared out; the same arithmetic as `edgekv plan`.

    `table`: what the model's files hold; None to read their headers. Raises ModelError for files that could not be
    loaded, ContextTooLong, and NotServedHere for what only other kernels can do.
    """
    place, native = settings.place, runs_natively(settings, spec)
    if settings.context_tokens is not None and settings.context_tokens > spec.max_position_embeddings:
        raise ContextTooLong(settings.context_tokens, spec.max_position_embeddings)
    unmet = next(not_served(settings, native=native), None)
    if unmet is not None:
        raise NotServedHere(*unmet, why_not_served(settings, spec, unmet[0]) or NOT_IN_USE)
    if table is None:
        table = read_weight_table(settings.folder, spec)
    choice, weights = weigh(settings, spec, table, native=native)
    context_tokens = settings.context_tokens or spec.max_position_embeddings
    workspace = graphs = None
    if native and place.kind == "card":
        limits = card_limits(settings, spec)
        facts = matrix_facts(table, spec, weight_form(settings, choice), choice.name)
        workspace = card_memory.workspace_bytes(spec, limits, facts, choice.name)
        graphs = card_memory.graphs_bytes(spec, limits)
    elif native:
        workspace = workspace_bytes(
            spec,
            native_inputs(table, spec, weight_form(settings, choice)),
            max_step_tokens=settings.max_step_tokens,
            max_sequences=settings.max_sequences,
            context_tokens=context_tokens,
            threads=default_threads(),
        )
    memory = plan_memory(
        spec,
        device=place.kind,
        total_bytes=max(place.total_bytes, place.free_bytes),
        free_bytes=place.free_bytes,
        reserve_bytes=place.reserve_bytes,
        most_bytes=place.most_bytes,
        dtype=choice.name,
        kv_dtype=settings.kv_dtype or choice.name,
        block_size=settings.block_size,
        context_tokens=context_tokens,
        max_sequences=settings.max_sequences,
        max_step_tokens=settings.max_step_tokens,
        weights=weights,
        workspace=workspace,
        graphs=graphs,
        kv_budget=settings.kv_budget,
        draft=settings.draft,
        kv_alignment=kv_alignment(kv_engine(settings, native=native)),
    )
    return choice, memory


def card_limits(settings: EngineSettings, spec: ModelSpec) -> CardLimits:
    """The most that a step on a card may have."""
    context_tokens = settings.context_tokens or spec.max_position_embeddings
    # A step has at least a token of each sequence.
    tokens = max(settings.max_step_tokens, settings.max_sequences)
    return CardLimits(tokens, settings.max_sequences, -(-context_tokens // settings.block_size))


class ContextTooLong(EdgeKVError):
    """A context was asked for that goes beyond the positions the model was made for."""

    def __init__(self, context_tokens: int, model_tokens: int) -> None:
        super().__init__(
            f"A context of {context_tokens:,} tokens is more than the model's {model_tokens:,} "
            "(max_position_embeddings in its config.json, context_length in a GGUF). Ask for less, or for 'auto'."
        )
        self.context_tokens, self.model_tokens = context_tokens, model_tokens


def lease(memory: MemoryPlan, runtime_bytes: int | None = None) -> Ledger:
    """A ledger with every part of the plan on it, the KV pool by segment.

    `runtime_bytes`: what the process holds already, None for what was planned for it; the budget makes room for what
    is beyond the plan (see `engine.runtime`). Raises KVBudgetTooLarge or NoRoomForKV where the plan does not hold.
    """
    if memory.kv.num_blocks == 0:
        raise NoRoomForKV(memory)
    runtime = memory.runtime_bytes if runtime_bytes is None else runtime_bytes
    ledger = Ledger(memory.budget_bytes + max(0, runtime - memory.runtime_bytes))
    try:
        for name, num_bytes in (memory.leases | {"runtime": runtime}).items():
            if name != KV_LEASE:
                ledger.reserve(name, num_bytes)
        whole_pool = ledger.reserve(KV_LEASE, memory.kv.pool_bytes)
    except OverBudget as over:
        raise (NoRoomForKV(memory) if memory.missing_bytes else KVBudgetTooLarge(memory, over)) from None
    ledger.release(whole_pool)
    for num_blocks in memory.kv.segments:
        ledger.reserve(KV_LEASE, num_blocks * memory.kv.block_bytes)
    return ledger
