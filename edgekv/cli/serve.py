"""`edgekv serve`: load a model and serve it until told to stop. Runs in: the main thread; owns: the terminal."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.markup import escape

from edgekv.cli.console import stderr
from edgekv.cli.models import DRAFT_HELP, NGRAM, OFF, is_model, resolve_draft, resolve_model
from edgekv.config.model_path import model_name
from edgekv.demo import DEMO, draft_path, target_path

if TYPE_CHECKING:
    from edgekv.config.settings import Config
    from edgekv.engine.draft_settings import DraftSettings
    from edgekv.engine.settings import EngineSettings
    from edgekv.smi.device import Place


def serve(
    config: str | None = typer.Argument(
        None, help="The configuration file, or a model: a folder, a .gguf file or 'demo'; without any, the demo model."
    ),
    settings: list[str] = typer.Option([], "--set", metavar="PATH=VALUE", help="Override a setting: server.port=9000."),
    host: str | None = typer.Option(None, help="Where to listen, instead of the configuration's."),
    port: int | None = typer.Option(None, min=0, max=65535, help="Port to listen on; 0 takes any free one."),
    model: str | None = typer.Option(
        None, help="A model folder, a .gguf file or 'demo', instead of the configuration's."
    ),
    draft: str | None = typer.Option(None, help=DRAFT_HELP),
) -> None:
    """Serve a model over the OpenAI protocol until Ctrl-C."""
    from edgekv.config.load import load_config
    from edgekv.engine.servable import check_drafts_tokens
    from edgekv.engine.settings import lease, plan_engine
    from edgekv.model.hf_config import read_spec

    if config is not None and is_model(config):
        if model is not None:
            raise typer.BadParameter(f"{config} is a model, and --model names another")
        config, model = None, config
    overrides = list(settings)
    if host is not None:
        overrides.append(f"server.host={host}")
    if port is not None:
        overrides.append(f"server.port={port}")
    warnings: list[str] = []
    path = None if config is None else Path(config)
    loaded = load_config(path, overrides, os.environ, warn=warnings.append, check_files=model is None)
    for warning in warnings:
        stderr().print(f"[yellow]warning:[/] {escape(warning)}", soft_wrap=True)
    name, aliases, engine = served_model(loaded, model)
    if draft is not None:
        engine = replace(engine, draft=drafting(draft, engine.draft))
    if engine.draft is not None and engine.draft.folder is not None:
        check_drafts_tokens(engine.folder, engine.draft.folder)
    lease(plan_engine(engine, read_spec(engine.folder))[1])

    from edgekv.cli.running import run

    code = run(loaded, name, aliases, engine)
    if code:
        sys.exit(code)


def served_model(
    config: "Config", model: str | None, place: "Place | None" = None
) -> tuple[str, tuple[str, ...], "EngineSettings"]:
    """The one model to serve: `model` if given, else the configuration's, else the demo model, which has its draft.

    `place`: where to, instead of the configured device. Returns its name, its aliases and what to build. Raises
    ModelError or ConfigError.
    """
    from edgekv.config.settings import Model, ModelDraft
    from edgekv.engine.settings import EngineSettings
    from edgekv.smi.device import choose_place

    if model is None and config.models:
        name, chosen = next(iter(config.models.items()))
    elif model is None or model == DEMO:
        drafted = ModelDraft.model_construct(path=draft_path()) if draft_path().is_dir() else None
        name, chosen = DEMO, Model.model_construct(path=resolve_model(DEMO), aliases=(), draft=drafted)
    else:
        path = resolve_model(model)
        name = DEMO if path == target_path() else model_name(path)
        chosen = Model.model_construct(path=path, aliases=())
    if place is None:
        place = choose_place(chosen.device, config.devices)
    return name, chosen.aliases, EngineSettings.from_config(config, chosen, place)


def drafting(
    name: str, configured: "DraftSettings | None", others: tuple[str, ...] = (NGRAM, OFF)
) -> "DraftSettings | None":
    """Who drafts where the command line says "off", "ngram", "demo" or a path; the rest stays as it is configured.

    `others`: what may be named beside models. Raises ModelError.
    """
    from edgekv.engine.draft_settings import DraftSettings

    if name == OFF:
        return None
    folder = None if name == NGRAM else resolve_draft(name, others)
    settings = configured or DraftSettings()
    if folder is None:
        return replace(settings, folder=None, kv_dtype=None, kv_budget=None)
    return replace(settings, folder=folder)
