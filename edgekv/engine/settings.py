"""What an engine is built from, and the plan of its memory. Runs in: anywhere (no torch); owns: nothing."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from edgekv.config.settings import Config, Model, PinnedPrompt, Priorities
from edgekv.config.units import Share
from edgekv.core.capacity import plan_memory
from edgekv.core.demand import Demand
from edgekv.core.draft_plan import DRAFT_KV_LEASE, Draft
from edgekv.core.dtype_choice import DtypeChoice, DtypeName, choose_dtype, without_bfloat16
from edgekv.core.kv_format import KVDtypeName, kv_alignment, plan_kv
from edgekv.core.ledger import Ledger
from edgekv.core.memory_plan import MemoryPlan
from edgekv.core.model_shape import WeightBytes
from edgekv.engine.draft_errors import DraftPoolTooSmall, check_is_model, told_of_draft
from edgekv.engine.draft_settings import DraftSettings
from edgekv.engine.kernel_needs import NOT_IN_USE, NotServedHere, kv_engine, not_served, why_not_on_card, why_not_served
from edgekv.engine.no_room import KVBudgetTooLarge, NoRoomForDraft, NoRoomForKV
from edgekv.errors import EdgeKVError, OverBudget
from edgekv.kernels.cpu.threads import default_threads
from edgekv.model import card_memory
from edgekv.model.card_layout import card_bytes
from edgekv.model.card_memory import CardLimits, matrix_facts
from edgekv.model.card_shape import has_bfloat16
from edgekv.model.hf_config import read_spec
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

    `kv_budget` is in bytes (int) or a share of the device's free memory (float). `draft`: who proposes tokens for
    it; None: nobody. `pinned_prompts`: beginnings of prompts to compute at load and keep. `weights`: see `Limits`.
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
    draft: DraftSettings | None = None
    pinned_prompts: tuple[PinnedPrompt, ...] = ()
    weights: Mapping[int, int] = field(default_factory=lambda: Priorities().weights)
    native: bool | None = None

    @property
    def max_proposed(self) -> int:
        """The most proposals that a step verifies, all sequences together: a token each, or all of one sequence's.

        More would seldom pay where many sequences share the steps, and each has logits of its own to make room for.
        """
        return 0 if self.draft is None else max(self.draft.tokens, self.max_sequences)

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
            draft=None if model.draft is None else DraftSettings.from_config(model.draft),
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


@dataclass(frozen=True, slots=True)
class DraftFiles:
    """What the files of a draft model say, for those who plan more than once."""

    spec: ModelSpec
    table: WeightTable


def read_draft(folder: Path) -> DraftFiles:
    """The files of a draft model. Raises DraftUnusable."""
    folder = folder.absolute()
    with told_of_draft(folder):
        check_is_model(folder)
        spec = read_spec(folder)
        return DraftFiles(spec, read_weight_table(folder, spec))


def plan_engine(
    settings: EngineSettings, spec: ModelSpec, table: WeightTable | None = None, draft: DraftFiles | None = None
) -> tuple[DtypeChoice, MemoryPlan]:
    """How the device's free memory is shared out; the same arithmetic as `edgekv plan`.

    `table`: what the model's files hold, `draft`: what those of its draft do; None to read their headers. Raises
    ModelError for files that could not be loaded, ContextTooLong, and NotServedHere for what only other kernels can do.
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
    workspace, graphs = _step_bytes(settings, spec, table, choice, native=native)
    demand = Demand(
        shape=spec,
        device=place.kind,
        dtype=choice.name,
        kv_dtype=settings.kv_dtype or choice.name,
        block_size=settings.block_size,
        context_tokens=context_tokens,
        max_sequences=settings.max_sequences,
        max_step_tokens=settings.max_step_tokens,
        max_proposed=settings.max_proposed,
        kv_alignment=kv_alignment(kv_engine(settings, native=native)),
    )
    memory = plan_memory(
        demand,
        total_bytes=max(place.total_bytes, place.free_bytes),
        free_bytes=place.free_bytes,
        reserve_bytes=place.reserve_bytes,
        most_bytes=place.most_bytes,
        weights=weights,
        workspace=workspace,
        graphs=graphs,
        kv_budget=settings.kv_budget,
        draft=weigh_draft(replace(settings, native=native, context_tokens=context_tokens), draft),
    )
    return choice, memory


def draft_engine(settings: EngineSettings, files: DraftFiles | None = None) -> tuple[EngineSettings, ModelSpec] | None:
    """What a draft model is built from as an engine of its own, and its shape; None where no model drafts.

    It runs on the same device, one request of it is as long as the target's, as far as its own positions go, and its
    kernels are chosen as for a target. `settings.context_tokens` is decided. Raises ModelError.
    """
    draft = settings.draft
    if draft is None or draft.folder is None:
        return None
    folder = draft.folder.absolute()
    with told_of_draft(folder):
        if files is None:
            check_is_model(folder)
        spec = read_spec(folder) if files is None else files.spec
    asked = EngineSettings(
        folder=folder,
        place=settings.place,
        kv_dtype=draft.kv_dtype,
        kv_budget=draft.kv_budget,
        context_tokens=min(settings.context_tokens or spec.max_position_embeddings, spec.max_position_embeddings),
        block_size=settings.block_size,
        prefix_cache=settings.prefix_cache,
        max_sequences=settings.max_sequences,
        max_step_tokens=settings.max_step_tokens,
        native=False if settings.native is False else None,
        # On a card the last token of a guess that was all right is computed beside the one after it: see engine/draft.
        draft=DraftSettings(tokens=1) if settings.place.kind == "card" else None,
    )
    return replace(asked, native=runs_natively(asked, spec)), spec


def weigh_draft(settings: EngineSettings, files: DraftFiles | None = None) -> Draft | None:
    """What there is to plan for a draft model; None where no model drafts. `files`: None to read what they say.

    Raises DraftUnusable, DraftPoolTooSmall for a budget that is too small for any proposal, and NotServedHere.
    """
    made = draft_engine(settings, files)
    if made is None or settings.draft is None:
        return None
    engine, spec = made
    native = runs_natively(engine, spec)
    if (unmet := next(not_served(engine, native=native), None)) is not None:
        setting = f"draft.{unmet[0]}"
        raise NotServedHere(setting, unmet[1], why_not_served(engine, spec, setting) or NOT_IN_USE)
    with told_of_draft(engine.folder):
        table = read_weight_table(engine.folder, spec) if files is None else files.table
        choice, weights = weigh(engine, spec, table, native=native)
    workspace, graphs = _step_bytes(engine, spec, table, choice, native=native, is_draft=True)
    budget = engine.kv_budget
    kv_bytes = int(settings.place.free_bytes * budget) if isinstance(budget, float) else budget
    alignment = kv_alignment(kv_engine(engine, native=native))
    if kv_bytes is not None:
        kv_format = engine.kv_dtype or choice.name
        pool = plan_kv(
            spec, kv_format=kv_format, block_size=engine.block_size, budget_bytes=kv_bytes, alignment=alignment
        )
        least_tokens = min(settings.draft.least_pool_tokens, engine.context_tokens or spec.max_position_embeddings)
        if pool.pool_tokens < least_tokens:
            raise DraftPoolTooSmall(kv_bytes, pool, least_tokens)
    return Draft(
        spec,
        choice.name,
        kv_bytes,
        weights,
        workspace_bytes=None if workspace is None else workspace + (graphs or 0),
        kv_format=engine.kv_dtype,
        kv_alignment=alignment,
    )


def _step_bytes(
    settings: EngineSettings,
    spec: ModelSpec,
    table: WeightTable,
    choice: DtypeChoice,
    *,
    native: bool,
    is_draft: bool = False,
) -> tuple[int | None, int | None]:
    """Workspace and graphs of our own kernels; None where torch runs the model, which is estimated."""
    if not native:
        return None, None
    if settings.place.kind == "card":
        limits = card_limits(settings, spec)
        facts = matrix_facts(table, spec, weight_form(settings, choice), choice.name)
        workspace = card_memory.workspace_bytes(spec, limits, facts, choice.name, libraries=not is_draft)
        return workspace, card_memory.graphs_bytes(spec, limits)
    workspace = workspace_bytes(
        spec,
        native_inputs(table, spec, weight_form(settings, choice)),
        max_step_tokens=settings.max_step_tokens,
        max_sequences=settings.max_sequences,
        max_sampled=settings.max_sequences + settings.max_proposed,
        context_tokens=settings.context_tokens or spec.max_position_embeddings,
        threads=default_threads(),
    )
    return workspace, None


def card_limits(settings: EngineSettings, spec: ModelSpec) -> CardLimits:
    """The most that a step on a card may have."""
    context_tokens = settings.context_tokens or spec.max_position_embeddings
    # A step has at least a token of each sequence.
    tokens = max(settings.max_step_tokens, settings.max_sequences)
    context_blocks = -(-context_tokens // settings.block_size)
    proposed = min(settings.max_proposed, tokens - settings.max_sequences)
    return CardLimits(tokens, settings.max_sequences, context_blocks, proposed)


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
    if memory.draft is not None and memory.draft.kv.num_blocks == 0:
        raise NoRoomForDraft(memory.draft)
    runtime = memory.runtime_bytes if runtime_bytes is None else runtime_bytes
    ledger = Ledger(memory.budget_bytes + max(0, runtime - memory.runtime_bytes))
    try:
        for name, num_bytes in (memory.leases | {"runtime": runtime}).items():
            if name not in (KV_LEASE, DRAFT_KV_LEASE):
                ledger.reserve(name, num_bytes)
        if memory.draft is not None:
            for num_blocks in memory.draft.kv.segments:
                ledger.reserve(DRAFT_KV_LEASE, num_blocks * memory.draft.kv.block_bytes)
        whole_pool = ledger.reserve(KV_LEASE, memory.kv.pool_bytes)
    except OverBudget as over:
        raise (NoRoomForKV(memory) if memory.missing_bytes else KVBudgetTooLarge(memory, over)) from None
    ledger.release(whole_pool)
    for num_blocks in memory.kv.segments:
        ledger.reserve(KV_LEASE, num_blocks * memory.kv.block_bytes)
    return ledger
