"""Whether a checkpoint is quantised as it is: told from headers, without numpy."""

import subprocess
import sys
from pathlib import Path

import pytest

from edgekv.errors import ModelError
from edgekv.model.quantised_before import quantised_before
from tests.model.gguf_files import make_gguf
from tests.model.quantised_models import SHAPE
from tests.model.tiny_models import make_tiny
from tests.unit.cli.shapes import LLAMA_3_8B, write_shape
from tests.unit.model.test_quantised_config import AWQ


def test_folders_are_what_their_configuration_says(tmp_path: Path) -> None:
    assert quantised_before(write_shape(tmp_path / "plain", LLAMA_3_8B)) is None
    awq = write_shape(tmp_path / "awq", LLAMA_3_8B | {"quantization_config": AWQ})
    assert quantised_before(awq) == "AWQ, 4 bits, groups of 128"
    with pytest.raises(ModelError, match=r"config\.json"):
        quantised_before(tmp_path)


def test_gguf_files_are_what_most_of_them_is(tmp_path: Path) -> None:
    folder = make_tiny("llama", tmp_path / "made", **SHAPE)
    plain = make_gguf(folder, tmp_path / "plain.gguf", types={"*": "F16", "output.weight": "BF16"})
    assert quantised_before(plain) is None
    mixed = make_gguf(folder, tmp_path / "mixed.gguf", types={"*": "Q8_0", "blk.0.ffn_up*": "Q4_0"})
    assert quantised_before(mixed) == "q8_0"
    code = (
        "import sys; from pathlib import Path; from edgekv.engine.servable import quantised_before\n"
        f"assert quantised_before(Path({str(mixed)!r})) == 'q8_0'\n"
        "sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
