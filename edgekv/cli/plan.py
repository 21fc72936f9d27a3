"""`edgekv plan`: where every byte would go, before anything is loaded. Runs in: the main thread; owns: nothing."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from edgekv.cli.console import print_json
from edgekv.config.cards import KnownCard, find_card, live_card
from edgekv.config.units import parse_size, parse_size_or_share

if TYPE_CHECKING:
    from edgekv.config.settings import Config, PinnedPrompt
    from edgekv.core.capacity import Draft, DtypeName, MemoryPlan
    from edgekv.core.kv_format import KVDtypeName
    from edgekv.engine.settings import EngineSettings
    from edgekv.model.matrix_layout import WeightsName
    from edgekv.model.spec import ModelSpec
    from edgekv.model.weight_table import WeightTable
    from edgekv.smi.device import Place


@dataclass(frozen=True, slots=True)
class Asked:
    """What is to be planned. `card`: the table's entry for the device; `is_here`: whether this machine has it.

    `table`: what the model's files hold; `draft_table`: what those of its draft hold. `pinned`: how many tokens each
    pinned prompt has, by name; `pinned_blocks` are pinned for all of them.
    """

    settings: "EngineSettings"
    table: "WeightTable"
    draft_table: "WeightTable | None"
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
    draft: str | None = typer.Option(None, help="A draft model to keep room for: its path, or 'demo' for its draft."),
    draft_kv: str | None = typer.Option(None, help="Memory for the draft's KV pool, as 1GiB; by default chosen."),
    max_num_seqs: int | None = typer.Option(None, min=1, help="Sequences in one step; by default 16."),
    as_json: bool = typer.Option(False, "--json", help="Print the plan as JSON."),
) -> None:
    """Say how many tokens of KV cache a model leaves room for, and where every byte goes."""
    from edgekv.cli.plan_view import plan_json, print_plan
    from edgekv.engine.settings import plan_engine, runs_natively
    from edgekv.model.hf_config import read_spec
    from edgekv.model.weight_table import read_weight_table

    if device not in ("auto", "cpu"):
        raise typer.BadParameter("--device is auto or cpu")
    if draft_kv is not None and draft is None:
        raise typer.BadParameter("--draft-kv needs --draft")
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
    )
    draft_table = None
    if draft is not None:
        drafted, draft_table = _draft(draft, draft_kv, settings)
        settings = replace(settings, draft=drafted)
    spec = read_spec(settings.folder)
    settings = replace(settings, native=runs_natively(settings, spec))
    table = read_weight_table(settings.folder, spec)
    choice, result = plan_engine(settings, spec, table)
    tokens, blocks = _pinned(settings, spec, result, pinned)
    place = settings.place
    card_here = known or live_card(place.title, place.total_bytes)
    asked = Asked(settings, table, draft_table, card_here, elsewhere is None, tokens, blocks)
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
    from edgekv.cli.models import resolve_model
    from edgekv.cli.serve import served_model
    from edgekv.config.load import load_config
    from edgekv.engine.settings import EngineSettings
    from edgekv.smi.device import choose_place

    if model.endswith((".yaml", ".yml")):
        config = load_config(Path(model), (), os.environ)
        place = choose_place("cpu", {}) if device == "cpu" else None
        if elsewhere is not None:
            place = _lent(elsewhere, known, config)
        name, _, settings = served_model(config, None, place)
        return settings, config.models[name].pinned_prompts if name in config.models else ()
    return EngineSettings(folder=resolve_model(model), place=elsewhere or choose_place(device, {})), ()


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


def _draft(name: str, kv: str | None, target: "EngineSettings") -> "tuple[Draft, WeightTable]":
    """The draft as what would run it has it, which is decided as for a target, and what its files hold."""
    from edgekv.cli.models import DEMO, resolve_model
    from edgekv.core.capacity import Draft
    from edgekv.demo import draft_path
    from edgekv.engine.settings import EngineSettings, runs_natively, weigh
    from edgekv.model.hf_config import read_spec
    from edgekv.model.weight_table import read_weight_table

    path = draft_path() if name == DEMO else resolve_model(name)
    spec, settings = read_spec(path), EngineSettings(path, target.place, block_size=target.block_size)
    table = read_weight_table(path, spec)
    choice, weights = weigh(settings, spec, table, native=runs_natively(settings, spec))
    return Draft(spec, choice.name, None if kv is None else _size(kv), weights), table


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
