"""The `edgekv` command: what there is, and how its errors look.

Runs in: the main thread; owns: nothing. No command's module imports torch, trio or HTTP at its top, so that help and
the torch-free commands answer at once.
"""

import sys

import typer

from edgekv import __version__
from edgekv.cli.bench import bench
from edgekv.cli.chat import chat
from edgekv.cli.check import check
from edgekv.cli.console import stderr
from edgekv.cli.doctor import doctor
from edgekv.cli.plan import plan
from edgekv.cli.serve import serve
from edgekv.cli.status import status
from edgekv.errors import ConfigError, EdgeKVError

app = typer.Typer(
    help="A local LLM server whose KV cache never spills out of the card's memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(serve)
app.command()(check)
app.command()(plan)
app.command()(status)
app.command()(chat)
app.command()(doctor)
app.add_typer(bench, name="bench")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"edgekv {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """A local LLM server whose KV cache never spills out of the card's memory."""


def main() -> None:
    """The entry point. What a person got wrong is told in a line or a few, without a traceback, and exits with 1."""
    try:
        app()
    except ConfigError as error:
        for fault in error.faults:
            stderr().print(fault, markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    except EdgeKVError as error:
        stderr().print(f"[red]error:[/] {_escaped(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
