"""What a configuration asks for that could not be served is found without serving it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from edgekv.config.settings import Config
from edgekv.demo import draft_path, target_path
from edgekv.engine import servable
from edgekv.engine.draft_errors import DraftUnusable
from edgekv.engine.servable import check_drafts_tokens, unservable
from edgekv.errors import ModelError
from edgekv.kernels.cpu.library import VARIABLE
from edgekv.smi.device import Place
from tests.model.other_tokens import copy_with_other_tokens
from tests.model.quantised_models import make_quantised
from tests.model.tiny_models import edit_config

NEEDED = "int8 needs the native CPU kernels, but "
BLOCKS = NEEDED + "they cannot run this model: the KV block size of 8 is no multiple of 16. Set kv.block_size to 16"


def found(model: Path | None = None, *, kv: Any = None, own_kv: Any = None, **asked: Any) -> dict[str, str]:
    """Faults by the dotted path of what was asked."""
    models = {} if model is None else {"m": {"path": str(model), "device": "cpu", "kv": own_kv or {}, **asked}}
    devices = {"big": {"match": {"vendor": "nvidia"}}, "memory": {"match": {"vendor": "cpu"}}}
    config = Config.model_validate({"kv": kv or {}, "models": models, "devices": devices}, context={"base": Path("/")})
    return {".".join(map(str, where)): message for where, message in unservable(config)}


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return shutil.copytree(target_path(), tmp_path / "model")


def test_what_can_be_served_has_no_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgekv.kernels.cpu.library.available", lambda: True)
    monkeypatch.setattr("edgekv.kernels.cpu.library.is_ready", lambda: False)
    assert found() == found(target_path()) == {}
    assert found(target_path(), weights="int4", kv={"dtype": "int8"}) == {}
    assert found(target_path(), weights="int4", device="memory") == {}
    assert found(target_path(), device="big", kv={"block_size": 8}) == {}, "torch takes any block"


def test_a_block_size_that_the_kernels_do_not_take(copied: Path) -> None:
    small = {"block_size": 8, "dtype": "int8"}
    assert found(copied, kv=small)["kv.dtype"].startswith(BLOCKS)
    assert found(kv=small)["kv.dtype"].startswith(BLOCKS), "the demo model's"
    assert found(copied, weights="int8", kv={"block_size": 8})["models.m.weights"].startswith(BLOCKS)
    assert list(found(copied, kv={"block_size": 8}, own_kv={"dtype": "int8"})) == ["models.m.kv.dtype"]


def test_every_setting_with_a_cause_is_told(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {"weights": "int8", "kv": {"dtype": "int8"}}
    monkeypatch.setenv(VARIABLE, "off")
    told = found(copied, **asked)
    assert set(told) == {"models.m.weights", "kv.dtype"}
    assert all(NEEDED + f"they are switched off by {VARIABLE}=off" in message for message in told.values())
    assert found(copied, **asked, device="big") == {}, "a card has kernels of its own"
    edit_config(copied, head_dim=24)
    monkeypatch.delenv(VARIABLE)
    assert found(copied, **asked)["kv.dtype"].endswith("its head dim of 24 is no multiple of 16. Set kv.dtype to auto")


def test_auto_is_looked_up_where_it_matters(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def choose(device: str, *_: object) -> Place:
        asked.append(device)
        return Place("card", "cuda:0", "RTX 4090", 0)

    monkeypatch.setattr(servable, "choose_place", choose)
    assert found(copied, device="auto", kv={"block_size": 8}) == {}
    assert asked == []
    told = found(copied, device="auto", weights="int8", kv={"block_size": 8})["models.m.weights"]
    assert "needs a card's kernels, but they cannot run this model: the KV block size of 8" in told


def test_formats_that_only_a_card_has(copied: Path) -> None:
    for dtype in ("fp8", "int4"):
        told = f"{dtype} needs a card's kernels, but this model runs on the CPU. Set kv.dtype to int8; or set kv.dtype "
        refused = {"kv.dtype": told + "to auto"}
        assert found(copied, kv={"dtype": dtype}) == found(copied, kv={"dtype": dtype}, device="memory") == refused
        assert found(copied, kv={"dtype": dtype}, device="big") == {}
        assert list(found(copied, own_kv={"dtype": dtype})) == ["models.m.kv.dtype"]


def test_a_draft_that_speaks_other_tokens(tmp_path: Path) -> None:
    other = copy_with_other_tokens(draft_path(), tmp_path / "other")
    told = found(target_path(), draft={"path": str(other)})
    assert list(told) == ["models.m.draft.path"]
    assert "2 of 2,048 token ids differ. A draft must come from the same family" in told["models.m.draft.path"]
    assert told["models.m.draft.path"].startswith(f"the draft {other}: token ")
    assert found(target_path(), draft={"path": str(draft_path())}) == {}
    assert found(target_path(), draft={"path": str(other), "method": "off"}) == {}
    with pytest.raises(ModelError, match="token ids differ"):
        check_drafts_tokens(target_path(), other)
    (other / "tokenizer.json").unlink()
    check_drafts_tokens(target_path(), other)
    assert found(target_path(), draft={"method": "ngram"}) == {}


def test_what_a_start_would_refuse_of_the_files_is_found(copied: Path) -> None:
    def told() -> str:
        as_model, as_draft = found(copied), found(target_path(), draft={"path": str(copied)})
        assert list(as_model) == ["models.m.path"]
        assert list(as_draft) == ["models.m.draft.path"]
        assert as_draft["models.m.draft.path"].startswith("the draft model")
        [message] = as_model.values()
        assert message in as_draft["models.m.draft.path"].replace(f"model {copied}", f"model: {copied}")
        return message

    assert found(copied) == {}
    weights, tokenizer = copied / "model.safetensors", copied / "tokenizer.json"
    whole, text = weights.read_bytes(), tokenizer.read_text()
    weights.write_bytes(whole[:-1000])
    assert "the file is truncated, 1,000 bytes short" in told()
    weights.write_bytes(whole)
    tokenizer.write_text(text[:-1000])
    assert told().startswith(f"{tokenizer}: not a tokenizer: ")
    tokenizer.unlink()
    (copied / "tokenizer.model").unlink()
    assert told().startswith(f"{copied}: no tokenizer: neither ")
    tokenizer.write_text(text)
    edit_config(copied, intermediate_size=96)
    assert "but config.json asks for [96, " in told()


def test_a_model_whose_texts_are_broken(copied: Path) -> None:
    (copied / "chat_template.jinja").write_text("{% if %}")
    assert found(copied)["models.m.path"].startswith(f"{copied}: ")
    (copied / "chat_template.jinja").unlink()
    (copied / "generation_config.json").write_text('{"temperature": "hot"}')
    assert "temperature" in found(copied)["models.m.path"]


@pytest.mark.parametrize("device", ["cpu", "big"])
def test_a_drafts_pool_that_could_hardly_propose(device: str) -> None:
    def drafts(budget: str, **changes: Any) -> dict[str, str]:
        draft = {"path": str(draft_path()), "kv": {"budget": budget}} | changes
        return found(target_path(), device=device, draft=draft)

    for budget in ("0MiB", "1KiB"):
        assert list(drafts(budget)) == ["models.m.draft.kv.budget"]
        assert "Set draft.kv.budget to " in drafts(budget)["models.m.draft.kv.budget"]
        assert drafts(budget, method="off") == {}
    assert drafts("1MiB") == drafts("0.001%") == {}, "of what there is then"


def test_no_folder_is_a_draft_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(DraftUnusable, match=f"the draft model {tmp_path}: neither config.json nor"):
        check_drafts_tokens(target_path(), tmp_path)


def test_a_draft_that_cannot_be_kept_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ModelError("no such format")

    monkeypatch.setattr(servable, "weigh_draft", fail)
    draft = {"path": str(draft_path()), "kv": {"budget": "1GiB"}}
    assert found(target_path(), draft=draft) == {"models.m.draft.path": "no such format"}


def test_weights_that_are_quantised_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_quantised(tmp_path, "awq", 64)[0]
    shutil.copy(target_path() / "tokenizer.json", folder)
    told = found(folder, weights="int4", context=128)
    assert told == {
        "models.m.weights": "int4 is for weights that are not quantised, and the model's are AWQ, 4 bits, groups of 64 "
        "already: leave it at auto, or take another file"
    }
    monkeypatch.setenv(VARIABLE, "off")
    assert found(folder, weights="int4", context=128) == told, "one cause is enough"


def test_models_that_no_start_would_load(copied: Path) -> None:
    assert found(copied, context=99_999)["models.m.context"].startswith("A context of 99,999 tokens is more than")
    (copied / "model.safetensors").rename(copied / "model.gguf")
    assert found(copied)["models.m.path"].endswith(f"give the file itself: {copied}/model.gguf")
    (copied / "config.json").write_text(json.dumps({"architectures": ["Gpt5"]}))
    assert "field 'architectures'" in found(copied)["models.m.path"]
