"""From a model folder to a running engine: shape, dtype, plan, leases, weights, pool, core.

Runs in: engine thread; owns: nothing once it returns. The plan comes from `edgekv.core.capacity`, as that of
`edgekv plan` does, and every byte of it is leased before anything is allocated.
"""

from collections.abc import Callable
from collections.abc import Sequence as Listing
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch

from edgekv.core.block_pool import BlockPool
from edgekv.core.dtype_choice import DtypeChoice
from edgekv.core.kv_cache import KVCache
from edgekv.core.kv_format import KVDtypeName
from edgekv.core.ledger import Ledger
from edgekv.core.memory_plan import MemoryPlan
from edgekv.core.prefix_cache import PrefixCache
from edgekv.core.scheduler import Limits, Scheduler
from edgekv.core.speculation import Controller
from edgekv.engine.at_once import AtOnce
from edgekv.engine.card_load import load_card_runner
from edgekv.engine.card_runner import CardRunner
from edgekv.engine.core import EngineCore
from edgekv.engine.draft_load import drafted_by, load_drafted
from edgekv.engine.kv_pool import BlockMemory, KVPool
from edgekv.engine.memory_errors import give_back_cached
from edgekv.engine.native import choose_kernels, load_native, native_kv_pool
from edgekv.engine.native_runner import NativeRunner
from edgekv.engine.ngram import NGramProposer
from edgekv.engine.pinned import PinnedPrefixes
from edgekv.engine.pinned_text import encode_pinned
from edgekv.engine.proposer import Proposer
from edgekv.engine.protocols import ElasticPool
from edgekv.engine.runner import Runner
from edgekv.engine.runtime import measure_runtime
from edgekv.engine.sampler import Sampler
from edgekv.engine.segments import Segments
from edgekv.engine.settings import KV_LEASE, EngineSettings, lease, plan_engine
from edgekv.engine.shared_memory import SharedMemory
from edgekv.engine.warm_up import warm_up
from edgekv.kernels.cpu.threads import default_threads
from edgekv.model.hf_config import read_generation_config, read_spec
from edgekv.model.loader import load_model
from edgekv.model.spec import GenerationDefaults, ModelSpec
from edgekv.smi.device import Place
from edgekv.smi.reader import Source
from edgekv.smi.sources import sources_for
from edgekv.text.chat_template import ChatTemplate, load_chat_template
from edgekv.text.tokenizer import Tokenizer, load_tokenizer

TORCH_DTYPES: dict[KVDtypeName, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


ModelRunner: TypeAlias = Runner | NativeRunner | CardRunner


@dataclass(frozen=True, slots=True)
class Assembly:
    """What was built: the model's shape and texts, and where every byte went (`leases`, by name).

    `runtime_reason` says how the bytes of the lease `runtime` are known. `kernels` says what runs the model, and
    `kernels_loss` why that is torch where it could have been the native kernels.
    """

    spec: ModelSpec
    generation: GenerationDefaults
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    place: Place
    dtype: DtypeChoice
    memory: MemoryPlan
    leases: dict[str, int]
    pool_tokens: int
    runtime_reason: str
    kernels: str
    kernels_loss: str | None


def assemble(
    settings: EngineSettings,
    progress: Callable[[int, int, str], None],
    sources: Listing[Source] | None = None,
) -> tuple[EngineCore, Assembly]:
    """Load the model and build its engine. Raises ModelError or OverBudget before anything large is allocated.

    Raises PinnedPromptRefused for a pinned prompt that makes no sense, before the weights are read, or does not fit.

    `sources`: how a card's memory is read; None for the usual ways.
    """
    give_back_cached()  # of an engine before this one: it would be measured as this one's own
    spec = read_spec(settings.folder)
    tokenizer = load_tokenizer(settings.folder)
    generation = _with_end_of_text(read_generation_config(settings.folder), tokenizer.eos_id)
    template = load_chat_template(settings.folder)
    prompts = [encode_pinned(written, tokenizer, template) for written in settings.pinned_prompts]
    settings, kernels = choose_kernels(settings, spec, progress)
    drafted = drafted_by(settings, spec, tokenizer)
    choice, memory = plan_engine(settings, spec)
    place = settings.place
    if sources is None:
        sources = () if place.watched.vendor == "cpu" else sources_for(place.watched)
    runtime = measure_runtime(place, memory.runtime_bytes, sources)
    ledger = lease(memory, runtime.num_bytes)
    device = torch.device(place.torch_name)
    pool: BlockMemory[Any]
    runner: ModelRunner
    if kernels.pool is not None:
        # The number is the process's, and still 1 where an engine was there before this one.
        torch.set_num_threads(kernels.pool.threads)
        native = load_native(settings, spec, choice, kernels.pool, progress)
        # Sampling is all that is left to torch; threads of its own would fight the kernels' for the cores.
        torch.set_num_threads(1)
        pool = native_pool = native_kv_pool(spec, memory)
        runner = NativeRunner(native, native_pool)
    elif kernels.card is not None:
        pool, runner = load_card_runner(settings, spec, choice, memory, kernels.card, progress)
    else:
        if place.kind == "cpu":
            torch.set_num_threads(default_threads())
        model = load_model(settings.folder, dtype=TORCH_DTYPES[choice.name], device=device, progress=progress)
        pool = torch_pool = KVPool(
            spec,
            dtype=TORCH_DTYPES[memory.kv_dtype],
            device=device,
            block_size=memory.kv.block_size,
            segment_blocks=memory.kv.segment_blocks,
            # A card's memory that is played by main memory comes and goes as quickly as a card's.
            commit=place.kind == "cpu",
        )
        runner = Runner(model, torch_pool)
    progress(0, memory.kv.pool_bytes, "KV pool")
    blocks = BlockPool(block_size=memory.kv.block_size, segment_blocks=memory.kv.segment_blocks)
    segments = Segments(blocks, pool, ledger, ceiling_blocks=memory.ceiling_blocks)
    for num_blocks, segment_lease in zip(memory.kv.segments, ledger.leases(KV_LEASE), strict=True):
        segments.add(num_blocks, segment_lease)
        progress(pool.num_bytes, memory.kv.pool_bytes, "KV pool")
    cache = KVCache(blocks, PrefixCache(memory.kv.block_size) if settings.prefix_cache else None)
    limits = Limits(
        max_sequences=settings.max_sequences,
        max_step_tokens=settings.max_step_tokens,
        weights=settings.weights,
        # A card's block tables have rows of that length.
        context_tokens=memory.context_tokens if isinstance(runner, CardRunner) else None,
        max_proposed=settings.max_proposed,
    )
    scheduler = Scheduler(cache, limits)
    sampler = Sampler(spec.vocab_size, device)
    progress(0, 0, "first step")
    warm_up(runner if isinstance(runner, CardRunner) else AtOnce(runner, sampler), blocks)
    pipeline = None
    if isinstance(runner, CardRunner):
        runner.warm_up()
        runner.capture(memory.graphs_bytes, lambda done, total: progress(done, total, "capturing decode graphs"))
        pipeline = runner
    proposer: Proposer | None = None
    elastic: ElasticPool = segments
    if drafted is not None:
        assert memory.draft is not None
        proposer, draft_memory = load_drafted(drafted, memory.draft, ledger, kernels, progress)
        elastic = SharedMemory(segments, draft_memory, memory.kv.pool_bytes, lambda: scheduler.num_running > 0)
    elif settings.draft is not None:
        proposer = NGramProposer()
    if pipeline is not None:
        _lease_rest(ledger, place, sources)
    core = EngineCore(
        scheduler,
        runner,
        sampler,
        spec.vocab_size,
        elastic,
        pipeline=pipeline,
        proposer=proposer,
        controller=controller_of(settings),
    )
    if prompts:
        pins = PinnedPrefixes(cache, ledger, block_bytes=memory.kv.block_bytes)
        pins.load(
            core,
            prompts,
            context_tokens=settings.context_tokens,
            model_tokens=spec.max_position_embeddings,
            now_s=core.clock(),
            progress=progress,
        )
        core.keep(pins)
    return core, Assembly(
        spec=spec,
        generation=generation,
        tokenizer=tokenizer,
        chat_template=template,
        place=place,
        dtype=choice,
        memory=memory,
        leases=ledger.statement(),
        pool_tokens=pool.num_tokens,
        runtime_reason=runtime.reason,
        kernels=kernels.title,
        kernels_loss=kernels.loss,
    )


def controller_of(settings: EngineSettings) -> Controller | None:
    """Who decides how much is proposed, knowing nothing yet; None where nobody proposes."""
    draft = settings.draft
    if draft is None:
        return None
    return Controller(draft.tokens, most_in_all=settings.max_proposed, min_acceptance=draft.min_acceptance)


def _with_end_of_text(generation: GenerationDefaults, eos_id: int | None) -> GenerationDefaults:
    """The tokenizer's end of text joins those of the configuration, as in vLLM: some folders name it nowhere else."""
    if eos_id is None or eos_id in generation.eos_token_ids:
        return generation
    return replace(generation, eos_token_ids=(*generation.eos_token_ids, eos_id))


def _lease_rest(ledger: Ledger, place: Place, sources: Listing[Source]) -> None:
    """A lease for what the card holds of this process beyond all leases: code of kernels and of torch's libraries.

    It is there whatever the budget says, which makes room for it as for the runtime (see `engine.runtime`).
    """
    rest = measure_runtime(place, ledger.leased_bytes, sources).num_bytes - ledger.leased_bytes
    if rest > 0:
        ledger.set_budget(ledger.budget_bytes + rest)
        ledger.reserve("libraries", rest)
