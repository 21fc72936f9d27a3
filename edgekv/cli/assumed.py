"""What a plan says of a model whose weights are not there, and what it takes for granted instead.

Runs in: the main thread; owns: nothing.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.markup import escape

from edgekv.config.units import format_size
from edgekv.model.no_weights import instead_of_weights
from edgekv.model.weight_table import WeightTable

_COMMAND = "edgekv plan "


def missing_weights(table: WeightTable) -> Iterator[str]:
    """Lines for a person, with markup; none for a model whose weights are there."""
    if not table.is_assumed:
        return
    folder = table.source.parent
    assumed = f"assumed are those that its {table.source.name} describes: {kind_sizes(table.kinds)}"
    yield f"[bold yellow]no weights:[/] {escape(f'{folder} holds none that could be loaded; {assumed}')}"
    for sentence in instead_of_weights(folder, _COMMAND):
        yield f" [yellow]·[/] {escape(sentence)}"


def checkpoint_json(table: WeightTable) -> dict[str, Any]:
    """What a model's files hold, in bytes by encoding, for programs.

    `is_assumed`: there are no weights, and this is what the configuration describes; `instead` is what lies there.
    """
    instead = instead_of_weights(table.source.parent, _COMMAND) if table.is_assumed else ()
    return {
        "path": str(table.source),
        "kinds": table.kinds,
        "is_assumed": table.is_assumed,
        "instead": list(instead),
    }


def kind_sizes(kinds: Mapping[str, int]) -> str:
    """Bytes by encoding, as people call those."""
    return ", ".join(f"{name.replace('affine4_', 'int4/')} {format_size(size)}" for name, size in kinds.items())
