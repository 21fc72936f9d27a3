"""What a model is called on the command line. Runs in: anywhere; owns: nothing."""

from pathlib import Path

from edgekv.config.model_path import LAYOUTS, gguf_at
from edgekv.demo import DEMO, draft_path, target_path
from edgekv.errors import ModelError

NGRAM, OFF = "ngram", "off"
DRAFT_HELP = "Who proposes tokens to verify, instead of the configuration's: a model's path, 'demo', 'ngram' or 'off'."
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


def resolve_model(name: str) -> Path:
    """The folder or GGUF file that `name` stands for: "demo", or a path (./demo for one of that name).

    Raises ModelError.
    """
    if name == DEMO:
        if not target_path().is_dir():
            raise ModelError("the demo model is not in this installation; make it with: make demo-model")
        return target_path()
    path = Path(name).expanduser()
    if path.name == "config.json":
        path = path.parent
    if path.suffix in _WEIGHTS and path.is_file():
        raise ModelError(f"{name}: is a part of a model; give the folder it lies in, {path.absolute().parent}")
    file = gguf_at(path)
    if not (file or path).exists():
        what = "file" if file else "folder"
        raise ModelError(f"{name}: no such {what}; give {LAYOUTS}, or 'demo'")
    return file or path


def resolve_draft(name: str, others: tuple[str, ...] = (NGRAM, OFF)) -> Path:
    """The folder or GGUF file of the draft model `name`: "demo" for the demo model's, or a path.

    `others`: what else could have been named. Raises ModelError.
    """
    if name == DEMO and not draft_path().is_dir():
        raise ModelError("the demo model's draft is not in this installation; make it with: make demo-model")
    try:
        return draft_path() if name == DEMO else resolve_model(name)
    except ModelError as error:
        instead = "" if Path(name).expanduser().exists() else "".join(f", {other!r}" for other in others)
        raise ModelError(f"--draft {error}{instead}") from None


def is_model(name: str) -> bool:
    """Whether what may be the path of a configuration file is rather a model, as `resolve_model` knows them."""
    return name == DEMO or Path(name).suffix == ".gguf" or Path(name).is_dir()
