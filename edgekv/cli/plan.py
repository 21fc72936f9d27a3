"""`edgekv plan`: where every byte would go, before anything is loaded. Runs in: the main thread; owns: nothing."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from edgekv.cli.console import print_json
from edgekv.cli.models import DRAFT_HELP
from edgekv.config.cards import KnownCard, find_card, live_card
from edgekv.config.units import parse_size, parse_size_or_share

if TYPE_CHECKING:
    from edgekv.config.settings import Config, PinnedPrompt
    from edgekv.core.dtype_choice import DtypeName
    from edgekv.core.kv_format import KVDtypeName
    from edgekv.core.memory_plan import MemoryPlan
    from edgekv.engine.draft_settings import DraftSettings
    from edgekv.engine.settings import DraftFiles, EngineSettings
    from edgekv.model.matrix_layout import WeightsName
    from edgekv.model.spec import ModelSpec
    from edgekv.model.weight_table import WeightTable
    from edgekv.smi.device import Place


@dataclass(frozen=True, slots=True)
class Asked:
    """What is to be planned. `card`: the table's entry for the device; `is_here`: whether this machine has it.

    `table`: what the model's files hold; `draft`: the model that drafts for it. `pinned`: how many tokens each
    pinned prompt has, by name; `pinned_blocks` are pinned for all of them.
    """

    settings: "EngineSettings"
    table: "WeightTable"
    draft: "DraftFiles | None"
    card: KnownCard | None
    is_here: bool
    pinned: dict[str, int]
    pinned_blocks: int


def plan(
    model: str = typer.Argument(
        ..., help="A model folder (config.json is enough), a .gguf file, 'demo', or a configuration file with one."
    ),
    context: int | None = typer.Option(None, min=1, help="Tokens of one request, prompt and answer together."),
    dtype: str = typer.Option("auto", help="What the weights are computed in: auto, float32, bfloat16, float16."),
    weights: str = typer.Option("auto", help="Quantise them as they are loaded: int8 or int4; auto leaves them."),
    kv_dtype: str = typer.Option(
        "auto", help="What keys and values are kept in: a dtype, int8, on a card fp8 or int4; auto is --dtype's."
    ),
    kv_budget: str | None = typer.Option(None, help="Memory for the KV pool, as 4GiB or 40%; by default chosen."),
    card: str | None = typer.Option(None, help="Plan for a card that is not here, as 'RX 7900 XTX' or 4090."),
    vram: str | None = typer.Option(None, help="Plan for a card with this much memory, as 16GiB."),
    others: str | None = typer.Option(None, help="What other programs hold of that card, as 1GiB; by default nothing."),
    device: str = typer.Option("auto", help="auto or cpu."),
    draft: str | None = typer.Option(None, help=DRAFT_HELP),
    draft_tokens: int | None = typer.Option(
        None, min=1, max=16, help="The most tokens proposed for a sequence at once; by default 8."
    ),
    draft_kv: str | None = typer.Option(None, help="Memory for the draft's KV pool, as 1GiB or 5%; by default chosen."),
    max_num_seqs: int | None = typer.Option(None, min=1, help="Sequences in one step; by default 16."),
    as_json: bool = typer.Option(False, "--json", help="Print the plan as JSON."),
) -> None:
    """Say how many tokens of KV cache a model leaves room for, and where every byte goes."""
    from edgekv.cli.plan_view import plan_json, print_plan
    from edgekv.engine.servable import check_drafts_tokens
    from edgekv.engine.settings import plan_engine, read_draft, runs_natively
    from edgekv.model.hf_config import read_spec
    from edgekv.model.weight_table import read_weight_table

    if device not in ("auto", "cpu"):
        raise typer.BadParameter("--device is auto or cpu")
    known = find_card(card) if card is not None else None
    elsewhere = _elsewhere(known, vram, others)
    settings, pinned = _settings(model, elsewhere, known, device)
    budget = _budget(kv_budget)
    settings = replace(
        settings,
        dtype=_dtype(dtype) or settings.dtype,
        weight_format=_weights(weights) or settings.weight_format,
        kv_dtype=_kv_dtype(kv_dtype) or settings.kv_dtype,
        kv_budget=settings.kv_budget if budget is None else budget,
        context_tokens=context or settings.context_tokens,
        max_sequences=max_num_seqs or settings.max_sequences,
        draft=_draft(settings.draft, draft, draft_tokens, draft_kv),
    )
    drafted = None
    if settings.draft is not None and settings.draft.folder is not None:
        check_drafts_tokens(settings.folder, settings.draft.folder)
        drafted = read_draft(settings.draft.folder)
    spec = read_spec(settings.folder)
    settings = replace(settings, native=runs_natively(settings, spec))
    table = read_weight_table(settings.folder, spec)
    choice, result = plan_engine(settings, spec, table, drafted)
    tokens, blocks = _pinned(settings, spec, result, pinned)
    place = settings.place
    card_here = known or live_card(place.title, place.total_bytes)
    asked = Asked(settings, table, drafted, card_here, elsewhere is None, tokens, blocks)
    if as_json:
        print_json(plan_json(asked, spec, result))
    else:
        print_plan(asked, spec, choice.reason, result)
    if not result.fits:
        raise typer.Exit(1)


def _settings(
    model: str, elsewhere: "Place | None", known: KnownCard | None, device: str
) -> tuple["EngineSettings", tuple["PinnedPrompt", ...]]:
    """What the configuration file says, with its pinned prompts, or the defaults for a model."""
    from edgekv.cli.serve import served_model
    from edgekv.config.load import load_config
    from edgekv.config.settings import Config
    from edgekv.smi.device import choose_place

    if model.endswith((".yaml", ".yml")):
        config = load_config(Path(model), (), os.environ)
        place = choose_place("cpu", {}) if device == "cpu" else None
        if elsewhere is not None:
            place = _lent(elsewhere, known, config)
        name, _, settings = served_model(config, None, place)
        return settings, config.models[name].pinned_prompts if name in config.models else ()
    return served_model(Config(), model, elsewhere or choose_place(device, {}))[2], ()


def _lent(elsewhere: "Place", known: KnownCard | None, config: "Config") -> "Place":
    """The card that is not here, with the reserve and the budget of the device that means it.

    A card of which only the memory was told (`known` is None) is taken for the one that the model is to go to.
    """
    from edgekv.smi.device import lent

    own = next((model.device for model in config.models.values()), "auto")
    for name, wanted in sorted(config.devices.items(), key=lambda item: item[0] != own):
        match = wanted.match
        if known is None:
            means = name == own and match.vendor != "cpu"
        else:
            means = match.vendor == known.vendor and (match.name or "").lower() in known.name.lower()
        if means:
            return lent(elsewhere, wanted)
    return elsewhere


def _pinned(
    settings: "EngineSettings", spec: "ModelSpec", result: "MemoryPlan", written: tuple["PinnedPrompt", ...]
) -> tuple[dict[str, int], int]:
    """The tokens of the pinned prompts, and blocks for all. Raises ModelError, or PinnedPromptRefused as `serve` would.

    In a pool in which the model does not fit anyway, they are not checked.
    """
    if not written:
        return {}, 0
    from edgekv.core.prefix_cache import PrefixCache
    from edgekv.engine.pinned import check_pinned
    from edgekv.engine.pinned_text import encode_pinned
    from edgekv.text.chat_template import load_chat_template
    from edgekv.text.tokenizer import load_tokenizer

    tokenizer, template = load_tokenizer(settings.folder), load_chat_template(settings.folder)
    prompts = [encode_pinned(prompt, tokenizer, template) for prompt in written]
    size = settings.block_size
    blocks = 0
    if result.fits:
        blocks = check_pinned(
            prompts,
            prefix=PrefixCache(size),
            block_size=size,
            pool_blocks=result.kv.num_blocks,
            context_tokens=settings.context_tokens,
            model_tokens=spec.max_position_embeddings,
        )
    return {prompt.name: len(prompt.token_ids) for prompt in prompts}, blocks


def _elsewhere(card: KnownCard | None, vram: str | None, others: str | None) -> "Place | None":
    """The card that is not here; None plans for this machine."""
    from edgekv.smi.device import Place

    if card is None and vram is None:
        if others is not None:
            raise typer.BadParameter("--others needs --card or --vram: on this machine it is measured")
        return None
    total = _size(vram) if vram is not None else card.vram_bytes if card is not None else 0
    held = 0 if others is None else _size(others)
    if held > total:
        raise typer.BadParameter(f"--others {others} is more than the card has")
    return Place("card", "cuda:0", "a card" if card is None else card.name, total - held, total_bytes=total)


def _draft(
    configured: "DraftSettings | None", name: str | None, tokens: int | None, kv: str | None
) -> "DraftSettings | None":
    """Who drafts: as configured, but for the options."""
    from edgekv.cli.serve import drafting

    draft = configured if name is None else drafting(name, configured)
    if draft is None:
        if tokens is not None or kv is not None:
            raise typer.BadParameter("--draft-tokens and --draft-kv need --draft: nobody drafts")
        return None
    if kv is not None and draft.folder is None:
        raise typer.BadParameter("--draft-kv is for the pool of a draft model: n-grams have none")
    budget = _budget(kv)
    return replace(draft, tokens=tokens or draft.tokens, kv_budget=draft.kv_budget if budget is None else budget)


def _dtype(name: str) -> "DtypeName | None":
    match name:
        case "auto":
            return None
        case "float32" | "bfloat16" | "float16":
            return name
    raise typer.BadParameter(f"--dtype {name!r} is not one of auto, float32, bfloat16, float16")


def _weights(name: str) -> "WeightsName | None":
    match name:
        case "auto":
            return None
        case "int8" | "int4":
            return name
    raise typer.BadParameter(f"--weights {name!r} is not one of auto, int8, int4")


def _kv_dtype(name: str) -> "KVDtypeName | None":
    match name:
        case "auto":
            return None
        case "float32" | "bfloat16" | "float16" | "fp8" | "int8" | "int4":
            return name
    raise typer.BadParameter(f"--kv-dtype {name!r} is not one of auto, float32, bfloat16, float16, fp8, int8, int4")


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _budget(text: str | None) -> int | float | None:
    if text is None or text == "auto":
        return None
    try:
        value = parse_size_or_share(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return value if isinstance(value, int) else value.fraction
