"""`edgekv check`: say everything that is wrong with a configuration. Runs in: the main thread; owns: nothing."""

import os
from pathlib import Path

import typer
from rich.markup import escape

from edgekv.cli.console import print_json, stderr, stdout


def check(
    config: Path | None = typer.Argument(None, help="The configuration file.", show_default=False),
    settings: list[str] = typer.Option([], "--set", metavar="PATH=VALUE", help="Override a setting, as serve would."),
    schema: bool = typer.Option(False, "--schema", help="Print the JSON schema of configuration files and stop."),
    as_json: bool = typer.Option(False, "--json", help="Print the result as JSON."),
) -> None:
    """Check a configuration: every fault at once, with its line, before anything is loaded."""
    from edgekv.config.load import json_schema, load_config
    from edgekv.engine.servable import unservable
    from edgekv.errors import ConfigError

    if schema:
        print_json(json_schema())
        return
    if config is None:
        raise typer.BadParameter("name a configuration file, for example: edgekv check config.yaml")
    warnings: list[str] = []
    try:
        loaded = load_config(config, settings, os.environ, warn=warnings.append, further=unservable)
    except ConfigError as error:
        if not as_json:
            raise
        print_json({"ok": False, "faults": error.faults, "warnings": warnings})
        raise typer.Exit(1) from None
    if as_json:
        print_json({"ok": True, "faults": [], "warnings": warnings})
        return
    for warning in warnings:
        stderr().print(f"[yellow]warning:[/] {escape(warning)}", soft_wrap=True)
    served = ", ".join(loaded.models) or "the demo model"
    fine = f"{config} is fine: serves {served} on {loaded.server.host}:{loaded.server.port}"
    stdout().print(fine, markup=False, soft_wrap=True)
