"""What a model is called on the command line. Runs in: anywhere; owns: nothing."""

from pathlib import Path

from edgekv.demo import target_path
from edgekv.errors import ModelError

DEMO = "demo"


def resolve_model(name: str) -> Path:
    """The folder that `name` stands for: "demo", or a path (./demo for one of that name). Raises ModelError."""
    if name == DEMO:
        if not target_path().is_dir():
            raise ModelError("the demo model is not in this installation; make it with: make demo-model")
        return target_path()
    folder = Path(name).expanduser()
    if folder.name == "config.json":
        folder = folder.parent
    if not folder.is_dir():
        raise ModelError(f"{name}: no such folder; give a model folder in Hugging Face's layout, or 'demo'")
    return folder
