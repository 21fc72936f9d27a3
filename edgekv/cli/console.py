"""Where commands print. Runs in: the main thread; owns: nothing."""

import json
from typing import Any

from rich.console import Console
from rich.table import Table


def stdout() -> Console:
    """For results. In a pipe, lines are as long as they are."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=200)


def stderr() -> Console:
    """For progress, warnings and errors."""
    return Console(stderr=True, highlight=False)


def bearer(key: str | None) -> dict[bytes, bytes]:
    """The header that shows an API key. In bytes: a key may hold any letters, and httpx takes text in ASCII only."""
    return {b"Authorization": b"Bearer " + key.encode("utf-8", "surrogateescape")} if key else {}


def print_json(value: Any) -> None:
    """One JSON document on standard output, uncoloured."""
    print(json.dumps(value, indent=2, ensure_ascii=False))  # noqa: T201 - a result for other programs


def table(*columns: str, title: str | None = None) -> Table:
    """A plain table: the first column to the left, the others to the right."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold", show_header=True)
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return made
