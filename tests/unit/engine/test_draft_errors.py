"""Whatever is wrong with a draft is told as the draft's, with its folder and what to do."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from edgekv.config.units import GIB, KIB, parse_size
from edgekv.core.block_pool import BlockPool
from edgekv.core.kv_cache import KVCache
from edgekv.core.sampling import SamplingParams
from edgekv.core.sequence import Sequence, SequenceSpec, Stage
from edgekv.demo import draft_path, target_path
from edgekv.engine.assemble import assemble
from edgekv.engine.draft_errors import DraftPoolTooSmall, DraftUnusable
from edgekv.engine.draft_load import drafted_by
from edgekv.engine.draft_settings import LAG_TOKENS, DraftSettings
from edgekv.engine.draft_views import DraftViews
from edgekv.engine.settings import EngineSettings, plan_engine, read_draft
from edgekv.errors import ModelError
from edgekv.kernels.rt.device_error import DriverError
from edgekv.model.hf_config import read_spec
from edgekv.smi.device import Place
from edgekv.text.same_vocabulary import VocabularyMismatch
from edgekv.text.tokenizer import load_tokenizer
from tests.model.other_tokens import copy_with_other_tokens
from tests.model.tiny_models import edit_config

CPU = Place("cpu", "cpu", "CPU", 6 * GIB, total_bytes=8 * GIB)
WITHOUT = "go without one (--draft off, or in a configuration draft: off)."


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


@pytest.fixture(autouse=True)
def torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(draft_path(), tmp_path / "draft")


def settings(folder: Path, **changes: object) -> EngineSettings:
    draft = DraftSettings(folder, **changes)  # type: ignore[arg-type]
    return EngineSettings(target_path(), CPU, native=False, draft=draft)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda folder: (folder / "config.json").unlink(), " {}: neither config.json nor a .gguf file in it; a model"),
        (cut, ": {}/model.safetensors: tensor '"),
        (lambda folder: edit_config(folder, intermediate_size=96), ": {}/model.safetensors: tensor '"),
        (lambda folder: edit_config(folder, architectures=["Gpt5"]), ": {}/config.json: field 'architectures'"),
    ],
)
def test_a_plan_names_the_draft(folder: Path, damage: Callable[[Path], None], told: str) -> None:
    damage(folder)
    spec = read_spec(target_path())
    for read in (lambda: plan_engine(settings(folder), spec), lambda: read_draft(folder)):
        with pytest.raises(DraftUnusable) as caught:
            read()
        assert str(caught.value).startswith(f"the draft model{told.format(folder)}")
        assert str(caught.value).endswith(f". Take another, or {WITHOUT}")


def test_an_empty_path_is_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DraftUnusable, match=f"the draft model {tmp_path}: neither config.json nor"):
        plan_engine(settings(Path("")), read_spec(target_path()))


def load(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        drafted_by(settings(folder), read_spec(target_path()), load_tokenizer(target_path()))
    assert isinstance(caught.value, DraftUnusable | VocabularyMismatch)
    assert str(caught.value).endswith(f"Take another, or {WITHOUT}")
    return str(caught.value)


def test_a_load_names_the_draft(folder: Path, tmp_path: Path) -> None:
    other = copy_with_other_tokens(folder, tmp_path / "other")
    assert load(other).startswith(f"the draft {other}: token ")
    (folder / "tokenizer.json").write_text(json.dumps({"a": 1}))
    assert load(folder).startswith(f"the draft model: {folder}/tokenizer.json: not a tokenizer: ")
    for file in ("tokenizer.json", "tokenizer.model"):
        (folder / file).unlink()
    assert load(folder).startswith(f"the draft model {folder}: no tokenizer: neither ")


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (ModelError("/x/model.safetensors: cannot be read"), "/x/model.safetensors: cannot be read"),
        (DriverError("load", 7, "no code"), "the card's kernels cannot run it: load: no code (7)"),
    ],
)
def test_what_fails_while_its_weights_are_read_is_the_drafts(
    fault: Exception, told: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise fault

    monkeypatch.setattr("edgekv.engine.draft_load._load", fail)
    with pytest.raises(DraftUnusable) as caught:
        assemble(settings(folder), progress=lambda done, total, stage: None)
    assert str(caught.value) == f"the draft model {folder}: {told}. Take another, or {WITHOUT}"


def plan(**changes: object) -> int:
    planned = plan_engine(settings(draft_path(), **changes), read_spec(target_path()))[1].draft
    assert planned is not None
    return planned.kv.pool_tokens


@pytest.mark.parametrize("budget", [0, KIB, 20 * KIB, 1e-9])
def test_a_pool_that_could_hardly_propose_is_refused_and_the_named_one_could(budget: int | float) -> None:
    with pytest.raises(DraftPoolTooSmall) as caught:
        plan(kv_budget=budget)
    told = str(caught.value)
    assert told.startswith("draft.kv.budget: ")
    assert told.endswith(f"or to auto; or {WITHOUT.removesuffix('.')}")
    named = re.search(r"Set draft\.kv\.budget to (\S+) or more", told)
    assert named is not None
    least = parse_size(named[1])
    assert plan(kv_budget=least) == 32
    with pytest.raises(DraftPoolTooSmall):
        plan(kv_budget=least - KIB)


def test_more_is_needed_to_propose_more_but_no_more_than_a_context() -> None:
    with pytest.raises(DraftPoolTooSmall):
        plan(kv_budget=32 * KIB, tokens=9)
    short = EngineSettings(
        target_path(), CPU, native=False, context_tokens=16, draft=DraftSettings(draft_path(), kv_budget=20 * KIB)
    )
    assert plan_engine(short, read_spec(target_path()))[1].draft is not None


def test_the_least_pool_holds_a_short_text_and_a_whole_guess() -> None:
    draft = DraftSettings(draft_path())
    text = [7] * LAG_TOKENS
    for blocks, has_room in ((1, False), (draft.least_pool_tokens // 16, True)):
        pool = BlockPool(block_size=16, segment_blocks=1)
        for _ in range(blocks):
            pool.add_segment(1)
        views = DraftViews(KVCache(pool, None), vocab_size=None, context_tokens=1000)
        spec = SequenceSpec(1, tuple(text), SamplingParams(max_tokens=99))
        view = views.open(Sequence(spec, 1, list(text), Stage.RUNNING), draft.tokens, ())
        assert (view is not None) is has_room
