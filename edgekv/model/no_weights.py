"""A model folder without weights that could be loaded: whether it is one, and what lies there instead.

Runs in: anywhere (no torch); owns: nothing.
"""

import json
import re
from pathlib import Path

from edgekv.config.model_path import gguf_files
from edgekv.errors import ModelError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

_PICKLED = (".bin", ".pt", ".pth")
_SHARD = re.compile(r".+-\d{5}-of-\d{5}\.safetensors", re.DOTALL)
_MOST_NAMES = 4
MOST_BYTES = 64 << 20  # of an index that is looked into here


def has_weights(folder: Path) -> bool:
    """Whether there are any for a load to look at.

    An index alone, of which no shard is there, is part of a configuration that was downloaded without weights.
    """
    if (folder / SINGLE).exists():
        return True
    try:
        if (folder / INDEX).stat().st_size > MOST_BYTES:
            return True
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except (OSError, ValueError, RecursionError):
        return True  # for those that open it to find fault with
    shards = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict):
        return True
    return any((folder / shard).exists() for shard in set(shards.values()) if isinstance(shard, str))


def no_weights(folder: Path) -> ModelError:
    """What a load says of a folder without any. Raises ModelError where that cannot be read."""
    lacking = f"{folder}: holds neither {SINGLE} nor {INDEX}"
    if (folder / INDEX).exists():
        lacking = f"{folder / INDEX}: none of the files that it names is there"
    return ModelError(". ".join((lacking, *instead_of_weights(folder))))


def instead_of_weights(folder: Path, command: str = "") -> tuple[str, ...]:
    """What lies in a folder without safetensors files in their layout, and what to do: sentences without their stops.

    `command` is what to write before a model's path, as "edgekv plan ". Raises ModelError for an unreadable folder.
    """
    told = []
    if ggufs := gguf_files(folder):
        what = "A GGUF file lies there" if len(ggufs) == 1 else f"GGUF files lie there ({_names(ggufs)})"
        told.append(f"{what}: give the file itself: {command}{ggufs[0]}")
    files = sorted(folder.iterdir())
    if any(file.suffix in _PICKLED for file in files):
        pickled = f"Pickled weights ({', '.join(_PICKLED)}) can run code and are never loaded"
        told.append(f"{pickled}: convert them to safetensors")
    unlisted = [file for file in files if file.suffix == ".safetensors"]
    if any(_SHARD.fullmatch(file.name) for file in unlisted):
        if not (folder / INDEX).exists():
            told.append(f"Shards lie there without their index: download {INDEX} too")
    elif unlisted:
        told.append(f"{_names(unlisted)}: not a name that weights have here, which is {SINGLE}")
    return tuple(told)


def _names(files: list[Path]) -> str:
    more = f" and {len(files) - _MOST_NAMES} more" if len(files) > _MOST_NAMES else ""
    return ", ".join(file.name for file in files[:_MOST_NAMES]) + more
