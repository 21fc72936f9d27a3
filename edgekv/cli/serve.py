"""`edgekv serve`: load a model and serve it until told to stop. Runs in: the main thread; owns: the terminal."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.markup import escape

from edgekv.cli.console import stderr
from edgekv.cli.models import DEMO, is_model_path, model_name, resolve_model
from edgekv.demo import target_path

if TYPE_CHECKING:
    from edgekv.config.settings import Config
    from edgekv.engine.settings import EngineSettings
    from edgekv.smi.device import Place


def serve(
    config: Path | None = typer.Argument(
        None, help="The configuration file, or a model: a folder or a .gguf file; without any, the demo model."
    ),
    settings: list[str] = typer.Option([], "--set", metavar="PATH=VALUE", help="Override a setting: server.port=9000."),
    host: str | None = typer.Option(None, help="Where to listen, instead of the configuration's."),
    port: int | None = typer.Option(None, min=0, max=65535, help="Port to listen on; 0 takes any free one."),
    model: str | None = typer.Option(
        None, help="A model folder, a .gguf file or 'demo', instead of the configuration's."
    ),
) -> None:
    """Serve a model over the OpenAI protocol until Ctrl-C."""
    from edgekv.config.load import load_config
    from edgekv.engine.settings import lease, plan_engine
    from edgekv.model.hf_config import read_spec

    if config is not None and is_model_path(config):
        if model is not None:
            raise typer.BadParameter(f"{config} is a model, and --model names another")
        config, model = None, str(config)
    overrides = list(settings)
    if host is not None:
        overrides.append(f"server.host={host}")
    if port is not None:
        overrides.append(f"server.port={port}")
    warnings: list[str] = []
    loaded = load_config(config, overrides, os.environ, warn=warnings.append, check_files=model is None)
    for warning in warnings:
        stderr().print(f"[yellow]warning:[/] {escape(warning)}", soft_wrap=True)
    name, aliases, engine = served_model(loaded, model)
    lease(plan_engine(engine, read_spec(engine.folder))[1])

    from edgekv.cli.running import run

    code = run(loaded, name, aliases, engine)
    if code:
        sys.exit(code)


def served_model(
    config: "Config", model: str | None, place: "Place | None" = None
) -> tuple[str, tuple[str, ...], "EngineSettings"]:
    """The one model to serve: `model` if given, else the configuration's, else the demo model.

    `place`: where to, instead of the configured device. Returns its name, its aliases and what to build. Raises
    ModelError or ConfigError.
    """
    from edgekv.config.settings import Model
    from edgekv.engine.settings import EngineSettings
    from edgekv.smi.device import choose_place

    if model is not None:
        path = resolve_model(model)
        name = DEMO if path == target_path() else model_name(path)
        chosen = Model.model_construct(path=path, aliases=())
    elif config.models:
        name, chosen = next(iter(config.models.items()))
    else:
        name, chosen = DEMO, Model.model_construct(path=resolve_model(DEMO), aliases=())
    if place is None:
        place = choose_place(chosen.device, config.devices)
    return name, chosen.aliases, EngineSettings.from_config(config, chosen, place)
