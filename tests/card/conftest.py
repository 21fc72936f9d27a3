from pathlib import Path

import pytest

from tests.model.tiny_models import make_tiny

SHAPE = {
    "head_dim": 32, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    """Makes a model of an architecture that the card's kernels take, once."""
    made: dict[str, Path] = {}

    def make(arch: str) -> Path:
        if arch not in made:
            layers = 7 if arch == "gemma3" else 2
            folder = tmp_path_factory.mktemp(f"card-{arch}")
            made[arch] = make_tiny(arch, folder, num_hidden_layers=layers, window=24, **SHAPE)
        return made[arch]

    return make
