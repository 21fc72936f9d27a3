"""What a model's path means: a folder in Hugging Face's layout, or a GGUF file. Runs in: anywhere; owns: nothing."""

import re
from pathlib import Path

from edgekv.errors import ModelError

LAYOUTS = "a folder in Hugging Face's layout or a .gguf file"
_LATER_PART = re.compile(r".+-(?!00001)\d{5}-of-\d{5}\.gguf", re.DOTALL)


def gguf_at(path: Path) -> Path | None:
    """The GGUF file that `path` stands for; None where it is a folder in Hugging Face's layout, or nothing at all.

    A folder without config.json stands for the one GGUF file in it; the parts of a split file count as one, its first.
    Raises ModelError naming all files of a folder that holds several.
    """
    if path.is_file() or (path.suffix == ".gguf" and not path.is_dir()):
        return path
    if not path.is_dir() or (path / "config.json").exists():
        return None
    found = gguf_files(path)
    if len(found) > 1:
        raise ModelError(f"{path}: holds several GGUF files, name one: {', '.join(file.name for file in found)}")
    return found[0] if found else None


def gguf_files(folder: Path) -> list[Path]:
    """The GGUF files in a folder, by name; the parts of a split file count as one, its first. Raises ModelError."""
    try:
        found = sorted(file for file in folder.iterdir() if file.suffix == ".gguf")
    except OSError as fault:
        raise ModelError(f"{folder}: cannot be read: {fault.strerror or fault}") from None
    return [file for file in found if not _LATER_PART.fullmatch(file.name)] or found[:1]


def model_name(path: Path) -> str:
    """What a model is called that no configuration names."""
    path = path.absolute()
    return re.sub(r"-\d{5}-of-\d{5}$", "", path.stem) if path.is_file() else path.name


def why_no_model(path: Path) -> str:
    """Why the path is none of a model; "" where it is one, as far as can be told without reading it."""
    try:
        file = gguf_at(path)
        if file is None:
            if (path / "config.json").is_file():
                return ""
            what = "neither config.json nor a .gguf file in it" if path.is_dir() else "no such folder"
            return f"{path}: {what}; a model is {LAYOUTS}"
        with file.open("rb") as opened:
            return "" if opened.read(4) == b"GGUF" else f"{path}: not a GGUF file; a model is {LAYOUTS}"
    except ModelError as error:
        return str(error)
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror or error}"
