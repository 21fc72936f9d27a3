"""From a draft model's folder to a proposer with memory of its own.

Runs in: engine thread; owns: nothing once it returns.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from edgekv.core.block_pool import BlockPool
from edgekv.core.draft_plan import DRAFT_KV_LEASE, WEIGHTS_LEASE, WORKSPACE_LEASE, DraftPlan
from edgekv.core.dtype_choice import DtypeChoice
from edgekv.core.kv_cache import KVCache
from edgekv.core.ledger import Ledger
from edgekv.core.prefix_cache import PrefixCache
from edgekv.engine.at_once import AtOnce
from edgekv.engine.draft import DraftModel
from edgekv.engine.draft_errors import DraftUnusable, told_of_draft
from edgekv.engine.draft_memory import DraftMemory, LoadedDraft
from edgekv.engine.draft_settings import drafter_name
from edgekv.engine.kv_pool import KVPool
from edgekv.engine.native import Kernels, load_native
from edgekv.engine.native_pool import NativeKVPool
from edgekv.engine.native_runner import NativeRunner
from edgekv.engine.runner import Runner
from edgekv.engine.sampler import Sampler
from edgekv.engine.settings import EngineSettings, card_limits, draft_engine, weigh
from edgekv.engine.warm_up import warm_up
from edgekv.errors import ModelError
from edgekv.kernels.rt.compiler import CompileFailed
from edgekv.kernels.rt.device_error import DriverError
from edgekv.kernels.rt.registry import KernelUnavailable
from edgekv.model.card_memory import graphs_bytes
from edgekv.model.loader import load_model
from edgekv.model.spec import ModelSpec
from edgekv.model.weight_table import read_weight_table
from edgekv.text.same_vocabulary import check_same_vocabulary
from edgekv.text.tokenizer import Tokenizer, load_tokenizer

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Drafted:
    """A draft model that fits its target: as an engine of its own, its shape, what it computes in."""

    settings: EngineSettings
    spec: ModelSpec
    choice: DtypeChoice
    target: ModelSpec
    tokens: int


def drafted_by(settings: EngineSettings, target: ModelSpec, tokenizer: Tokenizer) -> Drafted | None:
    """The draft model that is asked for, None where there is none. Raises DraftUnusable, VocabularyMismatch.

    `settings.native` is decided.
    """
    context_tokens = settings.context_tokens or target.max_position_embeddings
    made = draft_engine(replace(settings, context_tokens=context_tokens))
    if made is None or settings.draft is None:
        return None
    engine, spec = made
    with told_of_draft(engine.folder):
        check_same_vocabulary(tokenizer, load_tokenizer(engine.folder), draft_at=engine.folder)
        table = read_weight_table(engine.folder, spec)
        choice, _ = weigh(engine, spec, table, native=bool(engine.native))
    return Drafted(engine, spec, choice, target, settings.draft.tokens)


def load_drafted(
    drafted: Drafted, plan: DraftPlan, ledger: Ledger, kernels: Kernels, progress: Progress
) -> tuple[DraftModel, DraftMemory]:
    """The draft model on the leases that were taken for it. Raises ModelError, and the device's out of memory."""
    settings, spec = drafted.settings, drafted.spec
    blocks = BlockPool(block_size=plan.kv.block_size, segment_blocks=plan.kv.segment_blocks)
    model = DraftModel(
        KVCache(blocks, PrefixCache(plan.kv.block_size) if settings.prefix_cache else None),
        vocab_size=spec.vocab_size,
        target_vocab=drafted.target.vocab_size,
        context_tokens=settings.context_tokens or spec.max_position_embeddings,
        max_step_tokens=settings.max_step_tokens,
        overlaps=kernels.card is not None and bool(settings.native),
    )
    model.name = drafter_name(settings.folder)
    memory = DraftMemory(model, plan, ledger, lambda: _load(drafted, plan, kernels, lambda done, total, stage: None))
    [weights] = ledger.leases(WEIGHTS_LEASE)
    [workspace] = ledger.leases(WORKSPACE_LEASE)
    begun_s = time.monotonic()
    try:
        with told_of_draft(settings.folder):
            loaded = _load(drafted, plan, kernels, progress)
    except (CompileFailed, DriverError, KernelUnavailable) as error:
        raise DraftUnusable(settings.folder, f"the card's kernels cannot run it: {error}") from error
    memory.adopt(loaded, weights, workspace, ledger.leases(DRAFT_KV_LEASE), load_s=time.monotonic() - begun_s)
    if plan.kv.num_blocks:
        warm_up(loaded.pipeline, blocks)
    return model, memory


def _load(drafted: Drafted, plan: DraftPlan, kernels: Kernels, progress: Progress) -> LoadedDraft:
    settings, spec, choice = drafted.settings, drafted.spec, drafted.choice

    def told(done: int, total: int, stage: str) -> None:
        progress(done, total, f"draft: {stage}")

    if not settings.native:
        return _load_torch(drafted, plan, told)
    if kernels.card is not None:
        from edgekv.engine.card_load import load_card_runner

        # One step beyond those of a guess: what reads for another sequence.
        in_flight = drafted.tokens + 1
        card_pool, runner = load_card_runner(settings, spec, choice, plan, kernels.card, told, in_flight=in_flight)
        runner.warm_up()
        runner.capture(graphs_bytes(spec, card_limits(settings, spec)))
        return LoadedDraft(runner, card_pool)
    assert kernels.pool is not None
    native = load_native(settings, spec, choice, kernels.pool, told)
    pool = NativeKVPool(
        spec, kv_format=plan.kv_dtype, block_size=plan.kv.block_size, segment_blocks=plan.kv.segment_blocks
    )
    return LoadedDraft(AtOnce(NativeRunner(native, pool), Sampler(spec.vocab_size, "cpu")), pool)


def _load_torch(drafted: Drafted, plan: DraftPlan, progress: Progress) -> LoadedDraft:
    settings, spec = drafted.settings, drafted.spec
    device = torch.device(settings.place.torch_name)
    dtype, kv_dtype = getattr(torch, drafted.choice.name), getattr(torch, plan.kv_dtype)
    model = load_model(settings.folder, dtype=dtype, device=device, progress=progress)
    if model.spec != spec:
        raise ModelError(f"{settings.folder}: it is another model than the one that memory was planned for")
    pool = KVPool(
        spec,
        dtype=kv_dtype,
        device=device,
        block_size=plan.kv.block_size,
        segment_blocks=plan.kv.segment_blocks,
        commit=settings.place.kind == "cpu",
    )
    return LoadedDraft(AtOnce(Runner(model, pool), Sampler(spec.vocab_size, device)), pool)
