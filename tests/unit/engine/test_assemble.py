"""What an engine is built from, beyond its memory: the texts and ids of the model folder."""

import json
import shutil
from pathlib import Path

import pytest

import edgekv.demo
from edgekv.engine.assemble import assemble
from edgekv.engine.settings import EngineSettings
from edgekv.smi.device import Place

CPU = Place("cpu", "cpu", "CPU", free_bytes=4 << 30)
END_OF_TEXT = 4  # of the demo model's tokenizer


@pytest.mark.parametrize(("configured", "expected"), [(None, (END_OF_TEXT,)), (2, (2, END_OF_TEXT))])
def test_the_end_of_text_that_only_the_tokenizer_names_ends_a_sequence(
    configured: int | None, expected: tuple[int, ...], tmp_path: Path
) -> None:
    folder = shutil.copytree(Path(edgekv.demo.__file__).parent / "draft", tmp_path / "model")
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": configured}))
    settings = EngineSettings(folder, CPU, kv_budget=8 << 20)
    _, assembly = assemble(settings, progress=lambda done, total, stage: None)
    assert assembly.generation.eos_token_ids == expected
