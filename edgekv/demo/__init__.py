"""Where the bundled demo model and its draft lie; packaging/demo_model made them."""

from pathlib import Path

DEMO = "demo"
"""What both are called where a path is asked for."""


def target_path() -> Path:
    """The folder of the demo model."""
    return Path(__file__).parent / "target"


def draft_path() -> Path:
    """The folder of the smaller model that drafts for it; both have the same tokenizer."""
    return Path(__file__).parent / "draft"
