"""What an engine is built from, beyond its memory: the texts and ids of the model folder."""

import json
import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import edgekv.demo
from edgekv.config.settings import PinnedPrompt
from edgekv.core.step import Resize
from edgekv.engine.assemble import assemble
from edgekv.engine.settings import EngineSettings
from edgekv.kernels.cpu.library import available
from edgekv.smi.device import Place

CPU = Place("cpu", "cpu", "CPU", free_bytes=4 << 30)
DRAFT = Path(edgekv.demo.__file__).parent / "draft"
END_OF_TEXT = 4  # of the demo model's tokenizer


@pytest.fixture
def torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


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
    core.clock = iter((3.0, 4.0, 5.0)).__next__  # the second is when the step begins
    core.resize(Resize(0))
    core.step()
    assert told == [3.0, 5.0]


@pytest.mark.usefixtures("torch_threads")
def test_every_load_has_all_threads_and_sampling_one(monkeypatch: pytest.MonkeyPatch) -> None:
    if not available(compile=True):
        pytest.skip("no compiled kernels here")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    loading: list[int] = []
    sampling: list[int] = []

    def load() -> None:
        def progress(done: int, total: int, stage: str) -> None:
            if "weights" in stage:
                loading.append(torch.get_num_threads())

        assemble(EngineSettings(DRAFT, CPU, kv_budget=8 << 20, weight_format="int8"), progress)
        sampling.append(torch.get_num_threads())

    for _ in range(2):  # each engine has a thread of its own, as it has in a server that starts it again
        thread = threading.Thread(target=load)
        thread.start()
        thread.join()
    assert (set(loading), sampling) == ({3}, [1, 1])


@pytest.mark.usefixtures("torch_threads")
def test_a_number_of_threads_that_cannot_be_is_said_and_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if not available(compile=True):
        pytest.skip("no compiled kernels here")
    monkeypatch.setenv("OMP_NUM_THREADS", "5000")
    with caplog.at_level(logging.WARNING):
        _, assembly = assemble(EngineSettings(DRAFT, CPU, kv_budget=8 << 20), lambda done, total, stage: None)
    assert assembly.kernels_loss is None
    assert "kernels, " in assembly.kernels
    assert caplog.messages == ["OMP_NUM_THREADS=5000 is ignored: it must be a whole number from 1 to 1024"]
