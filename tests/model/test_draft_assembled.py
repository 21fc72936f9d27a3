"""The demo pair, assembled as a server does it: what is planned is what is leased and loaded, and comes back so."""

import gc
import json
import shutil
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import edgekv.demo
from edgekv.core.sampling import SamplingParams
from edgekv.core.sequence import SequenceSpec
from edgekv.core.step import Resize
from edgekv.engine.assemble import Assembly, assemble
from edgekv.engine.core import EngineCore
from edgekv.engine.draft import DraftModel
from edgekv.engine.draft_settings import DraftSettings
from edgekv.engine.settings import EngineSettings, plan_engine
from edgekv.engine.shared_memory import SharedMemory
from edgekv.kernels.cpu.library import available
from edgekv.model.hf_config import read_spec
from edgekv.smi.device import Place
from edgekv.text.same_vocabulary import VocabularyMismatch
from tests.model.tiny_models import make_tiny
from tests.unit.text.tiny_tokenizers import write_byte_bpe

DEMO = Path(edgekv.demo.__file__).parent
PLACE = Place("cpu", "cpu", "CPU", free_bytes=4 << 30, most_bytes=300 << 20)
ROOM = 1 << 40


@pytest.fixture(autouse=True)
def torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["kernels", "torch"])
def settings(request: pytest.FixtureRequest) -> EngineSettings:
    if request.param == "kernels" and not available(compile=True):
        pytest.skip("no compiled kernels here")
    return EngineSettings(
        DEMO / "target",
        PLACE,
        draft=DraftSettings(DEMO / "draft", kv_budget=6 << 20),
        native=request.param == "kernels",
        max_step_tokens=64,
        max_sequences=16,
    )


def load(settings: EngineSettings) -> tuple[EngineCore, Assembly]:
    return assemble(settings, progress=lambda done, total, stage: None)


def parts(core: EngineCore) -> tuple[DraftModel, SharedMemory]:
    assert isinstance(core.proposer, DraftModel)
    assert isinstance(core.pool, SharedMemory)
    return core.proposer, core.pool


def answers(core: EngineCore, first: int) -> list[list[int]]:
    """Of three sequences, drawn and greedy."""
    for number in range(first, first + 3):
        prompt = tuple((place * 7 + number - first) % 900 + 20 for place in range(30))
        sampling = SamplingParams(max_tokens=24, seed=number - first, temperature=0.7 * (number - first))
        core.submit(SequenceSpec(number, prompt, sampling))
    said: dict[int, list[int]] = {}
    while core.busy:
        for out in core.step().tokens:
            said.setdefault(out.sequence_id, []).append(out.sampled.token_id)
    return [said[number] for number in sorted(said)]


def test_what_a_draft_costs_is_planned_leased_and_loaded(settings: EngineSettings) -> None:
    pools = []
    for asked in (settings, replace(settings, draft=None)):
        _, planned = plan_engine(asked, read_spec(asked.folder))
        core, assembly = load(asked)
        leased, promised = dict(assembly.leases), dict(planned.leases)
        assert leased.pop("runtime") > 0
        promised.pop("runtime")
        assert leased == promised
        memory = core.stats().memory
        assert memory is not None
        assert memory.leases == assembly.leases
        loaded = core.scheduler.cache.pool.total_blocks * 16
        assert loaded == planned.kv.pool_tokens == assembly.pool_tokens
        if asked.draft is not None:
            assert planned.draft is not None
            model, shared = parts(core)
            assert shared.draft.num_bytes == planned.draft.num_bytes
            assert model.cache.pool.total_blocks == planned.draft.kv.num_blocks
            runner: Any = model.pipeline.runner  # type: ignore[union-attr]
            pool = runner._pool
            assert pool.num_bytes == planned.draft.kv.pool_bytes
            if not settings.native:
                weights = {id(each): each for each in _tensors(runner.model)}
                actual = sum(each.numel() * each.element_size() for each in weights.values())
                assert actual == pytest.approx(planned.draft.weight_bytes, rel=0.01)
            shared.check_integrity()
        pools.append((planned.kv.pool_tokens, loaded))
    (with_draft, loaded_with), (without, loaded_without) = pools
    assert loaded_without - loaded_with == without - with_draft > 0


def _tensors(thing: Any, depth: int = 6) -> Iterator[torch.Tensor]:
    if isinstance(thing, torch.Tensor):
        yield thing
    elif depth and hasattr(thing, "__dict__"):
        for each in vars(thing).values():
            yield from _tensors(each, depth - 1)
    elif depth and isinstance(thing, list | tuple | dict):
        for each in thing.values() if isinstance(thing, dict) else thing:
            yield from _tensors(each, depth - 1)


def test_it_is_given_back_whole_and_loaded_again(settings: EngineSettings) -> None:
    plain, _ = load(replace(settings, draft=None))
    expected = answers(plain, 1)
    core, assembly = load(settings)
    model, shared = parts(core)
    assert answers(core, 1) == expected
    planned = dict(assembly.leases)
    runner: Any = model.pipeline.runner  # type: ignore[union-attr]
    kept = [weakref.ref(each) for each in (runner, runner.model, runner._pool, model.pipeline)]
    del runner
    core.resize(Resize(ROOM, shrink_bytes=shared.draft.num_bytes))
    assert all(each() is None for each in kept), "the weights are still somebody's"
    memory = core.step().stats.memory
    assert memory is not None
    assert not [name for name in memory.leases if "draft" in name]
    assert memory.leases["kv.target"] == planned["kv.target"]
    assert answers(core, 11) == expected
    core.resize(Resize(ROOM, grow_bytes=memory.facts.segment_bytes))
    stats = core.step().stats
    assert stats.memory is not None
    assert stats.memory.leases["weights.draft"] == planned["weights.draft"]
    core.resize(Resize(ROOM, grow_bytes=planned["kv.draft"]))
    stats = core.step().stats
    assert stats.memory is not None
    assert stats.memory.leases == planned
    assert stats.speculation is not None
    assert (stats.speculation.yields, stats.speculation.returns) == (1, 1)
    assert stats.speculation.drafter == "demo"
    assert answers(core, 21) == expected
    model.least_chances = 0.0, 0.0
    proposals = model.propose([sequence := _sequence(core, 31)], {sequence.id: 4})
    assert len(proposals[31]) == 4
    shared.check_integrity()


def _sequence(core: EngineCore, number: int) -> Any:
    core.submit(SequenceSpec(number, tuple(range(20, 50)), SamplingParams(max_tokens=30, temperature=0.0)))
    core.step()
    [sequence] = core.scheduler.running
    return sequence


@pytest.mark.parametrize("change", ["gone", "another"])
def test_files_that_are_not_those_any_more_leave_the_target_as_it_is(
    settings: EngineSettings, change: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(DEMO / "draft", tmp_path / "draft")
    assert settings.draft is not None
    core, assembly = load(replace(settings, draft=replace(settings.draft, folder=folder)))
    model, shared = parts(core)
    expected = answers(core, 1)
    core.resize(Resize(ROOM, shrink_bytes=shared.draft.num_bytes))
    shutil.rmtree(folder)
    if change == "another":
        make_tiny("llama", folder, vocab_size=300)
    core.resize(Resize(ROOM, grow_bytes=shared.draft.next_bytes))
    memory = core.step().stats.memory
    assert memory is not None
    assert memory.shortfall is not None
    assert str(folder) in memory.shortfall
    assert memory.leases == {name: size for name, size in assembly.leases.items() if "draft" not in name}
    assert memory.facts.ceiling_bytes == shared.target.ceiling_bytes
    assert model.away is not None
    assert answers(core, 11) == expected


def test_a_tokenizer_of_its_own_is_refused_before_anything_is_read(settings: EngineSettings, tmp_path: Path) -> None:
    folder = make_tiny("llama", tmp_path / "draft", vocab_size=300)
    write_byte_bpe(folder)
    stages: list[str] = []
    with pytest.raises(VocabularyMismatch, match="tokenizer must be the target's"):
        assemble(
            replace(settings, draft=DraftSettings(folder)), progress=lambda done, total, stage: stages.append(stage)
        )
    assert not [stage for stage in stages if "weights" in stage]
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 300
    gc.collect()
