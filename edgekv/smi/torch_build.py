"""Which accelerators the installed torch was built for, without importing it. Runs in: anywhere; owns: nothing."""

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class TorchBuild:
    """torch's version, and the CUDA or ROCm version it was built with."""

    version: str
    cuda: str | None
    hip: str | None


def read_torch_build() -> TorchBuild | None:
    """The installed torch's build , read from its version.py: importing it takes seconds; None without torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None

    def field(name: str) -> str | None:
        match = re.search(rf"^{name}\b[^=\n]*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
        return match[1] if match else None

    return TorchBuild(field("__version__") or "unknown", field("cuda"), field("hip"))
