"""What a plan says of who drafts: what that takes, what it costs in context, and how far it reaches.

Runs in: the main thread; owns: nothing.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from edgekv.cli.assumed import checkpoint_json
from edgekv.config.units import format_size
from edgekv.core.draft_plan import DraftPlan
from edgekv.core.memory_plan import MemoryPlan
from edgekv.engine.draft_settings import DraftSettings
from edgekv.engine.settings import DraftFiles, EngineSettings, plan_engine

if TYPE_CHECKING:
    from edgekv.model.spec import ModelSpec
    from edgekv.model.weight_table import WeightTable


@dataclass(frozen=True, slots=True)
class DraftCost:
    """What speculation takes of the device, and how many tokens the target's pool would hold without it.

    `verify_bytes` of `num_bytes` are the target's, in its workspace and graphs: proposed tokens have logits too.
    """

    num_bytes: int
    verify_bytes: int
    tokens: int
    tokens_without: int


def draft_cost(
    settings: EngineSettings, spec: "ModelSpec", result: MemoryPlan, table: "WeightTable"
) -> DraftCost | None:
    """Against a plan without it; None where nobody drafts."""
    if settings.draft is None:
        return None
    without = plan_engine(replace(settings, draft=None), spec, table)[1]
    num_bytes = result.fixed_bytes - without.fixed_bytes
    drafted = 0 if result.draft is None else result.draft.num_bytes
    tokens = without.kv.pool_tokens
    return DraftCost(num_bytes, num_bytes - drafted, tokens - result.kv.pool_tokens, tokens)


def drafter(settings: DraftSettings, spec: "ModelSpec | None", dtype: str) -> str:
    """Who proposes, and how much. `spec`, `dtype`: of the draft model; no spec for n-grams."""
    proposes = f"{settings.tokens} token{'s' if settings.tokens > 1 else ''} for a sequence at once"
    if spec is None:
        return f"n-grams propose up to {proposes}, as they followed earlier in its text"
    size = f"{spec.num_parameters / 1e6:,.1f} M parameters"
    return f"draft: {spec.architecture}, {size}, in {dtype}; proposes up to {proposes}"


def draft_lines(
    settings: EngineSettings, model: DraftFiles | None, result: MemoryPlan, cost: DraftCost | None
) -> Iterator[str]:
    """For a person; none where nobody drafts."""
    draft = result.draft
    if settings.draft is None or cost is None:
        return
    yield drafter(settings.draft, None if model is None else model.spec, "" if draft is None else draft.dtype)
    verifying = f"{format_size(cost.verify_bytes)} to verify what is proposed (logits)"
    if draft is None or model is None:
        yield f"they take no device memory but {verifying}: {_fewer(cost)}"
        return
    yield f"the draft takes {format_size(cost.num_bytes)}, {verifying} among it: {_fewer(cost)}"
    if not draft.kv.num_blocks:
        return
    reach = min(result.context_tokens, model.spec.max_position_embeddings)
    yield (
        f"its pool holds {draft.kv.pool_tokens:,} tokens ({draft.kv.max_concurrency(reach):.2f}x {reach:,}): those of "
        "the sequences that decode; one that finds no room there goes on without proposals"
    )
    if reach < result.context_tokens:
        yield (
            f"its own context ends at {reach:,} tokens, the model's at {result.context_tokens:,}: "
            "in a longer sequence nothing more is proposed"
        )


def draft_json(
    settings: EngineSettings, model: DraftFiles | None, plan: DraftPlan | None, cost: DraftCost | None
) -> dict[str, Any] | None:
    """For programs; null where nobody drafts. `num_bytes`: all that speculation takes, as `DraftCost` has it."""
    if settings.draft is None or cost is None:
        return None
    told: dict[str, Any] = {
        "method": "ngram" if settings.draft.folder is None else "model", "tokens": settings.draft.tokens,
        "num_bytes": cost.num_bytes, "verify_bytes": cost.verify_bytes, "cost_tokens": cost.tokens,
    }  # fmt: skip
    if plan is None or model is None:
        return told
    planned = asdict(plan)
    planned["kv"] |= {"pool_tokens": plan.kv.pool_tokens, "pool_bytes": plan.kv.pool_bytes}
    return told | planned | {
        "architecture": model.spec.architecture, "num_parameters": model.spec.num_parameters,
        "context_tokens": model.spec.max_position_embeddings, "weight_bytes": plan.weight_bytes,
        "checkpoint": checkpoint_json(model.table),
    }  # fmt: skip


def _fewer(cost: DraftCost) -> str:
    if not cost.tokens_without:
        return "without it there would be no room for a KV pool either"
    if cost.tokens <= 0:
        return "the KV pool is no smaller for it"
    return f"{cost.tokens:,} fewer tokens of context ({cost.tokens_without:,} without it)"
