"""What an engine is built from, beyond its memory: the texts and ids of the model folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import edgekv.demo
from edgekv.config.settings import PinnedPrompt
from edgekv.core.step import Resize
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


def test_a_pinned_prompt_is_there_when_the_engine_is_on_the_ledger_and_outlives_every_shrinking() -> None:
    folder = Path(edgekv.demo.__file__).parent / "draft"
    text = "You are a gardener who answers in short and friendly sentences, and who knows every plant. " * 3
    pinned = PinnedPrompt(name="gardener", text=text)
    settings = EngineSettings(folder, CPU, kv_budget=40 << 20, context_tokens=512, pinned_prompts=(pinned,))
    core, _ = assemble(settings, progress=lambda done, total, stage: None)
    memory = core.stats().memory
    assert memory is not None
    within, num_bytes = memory.earmarks["prefix.pinned"]
    assert (within, memory.facts.floor_bytes > 0) == ("kv.target", True)
    core.resize(Resize(0, shrink_bytes=1 << 40))
    memory = core.step().stats.memory
    assert memory is not None
    assert 0 < num_bytes <= memory.leases["kv.target"] == memory.facts.floor_bytes == memory.facts.kv_bytes
    assert core.scheduler.cache.pinned_blocks * 16 > 20


def test_pins_are_told_the_time_with_every_step_and_every_resize() -> None:
    core, _ = assemble(
        EngineSettings(Path(edgekv.demo.__file__).parent / "draft", CPU, kv_budget=8 << 20),
        progress=lambda done, total, stage: None,
    )
    told: list[float] = []

    class Pins:
        def observe(self, now_s: float, spare_blocks: Callable[[], int]) -> None:
            told.append(now_s)

    core.keep(Pins())
    core.clock = iter((3.0, 5.0)).__next__
    core.resize(Resize(0))
    core.step()
    assert told == [3.0, 5.0]
