"""Who drafts, as a configuration says it: every way to say nobody, and none that silently is another."""

from pathlib import Path

import pytest

from edgekv.config.load import load_config
from edgekv.config.settings import ModelDraft
from edgekv.demo import draft_path, target_path
from edgekv.engine.draft_settings import DraftSettings
from edgekv.errors import ConfigError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "c.yaml"


def draft(file: Path, written: str, *settings: str) -> ModelDraft | None:
    file.write_text(f"models:\n  m:\n    path: demo\n    draft: {written}\n")
    return load_config(file, settings).models["m"].draft


def engine(file: Path, written: str, *settings: str) -> DraftSettings | None:
    made = draft(file, written, *settings)
    assert made is not None
    return DraftSettings.from_config(made)


def fault(file: Path, written: str, *settings: str) -> str:
    with pytest.raises(ConfigError) as caught:
        draft(file, written, *settings)
    [only] = caught.value.faults
    return only.removeprefix(f"{file}:")


@pytest.mark.parametrize(
    ("written", "place"),
    [
        ("{path: null}", "4:19: error: models.m.draft.path"),
        ("{path: }", "4:18: error: models.m.draft.path"),
        ("{method: model, path: ~}", "4:34: error: models.m.draft.path"),
        ("{method: model}", "4:12: error: models.m.draft"),
        ("{tokens: 4}", "4:12: error: models.m.draft"),
    ],
)
def test_a_model_that_is_not_named_is_no_n_grams(file: Path, written: str, place: str) -> None:
    told = "which model drafts? Give its 'path', or write 'method: ngram', or 'draft: off' for nobody"
    assert fault(file, written) == f"{place}: {told}"


def test_off_and_ngram_are_short_forms(file: Path) -> None:
    assert draft(file, "off") == draft(file, "{method: off}")
    assert engine(file, "off") is None
    assert engine(file, "ngram") == engine(file, "{method: ngram}") == DraftSettings()


def test_off_leaves_the_rest_as_it_stands(file: Path) -> None:
    assert engine(file, "{method: off, path: nowhere, tokens: 3, kv: {budget: 1KiB}}") is None
    assert engine(file, "{path: nowhere, tokens: 3}", "models.m.draft.method=off") is None
    assert draft(file, "{path: demo}", "models.m.draft=off") == draft(file, "off")


def test_one_more_setting_does_not_undo_a_short_form(file: Path) -> None:
    assert engine(file, "ngram", "models.m.draft.tokens=3") == DraftSettings(tokens=3)
    assert engine(file, "off", "models.m.draft.tokens=3") is None
    assert engine(file, "null", "models.m.draft=ngram", "models.m.draft.tokens=3") == DraftSettings(tokens=3)


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("/m/draft", "not '/m/draft'; for a draft model write {path: /m/draft}"),
        ("ngrams", "not 'ngrams'; did you mean 'ngram'?"),
        ("false", "not false; did you mean 'off'?"),
        ("true", "not true"),
        ("[a]", "not a list"),
        ("5", "not 5"),
    ],
)
def test_what_is_none_is_told_what_to_write(file: Path, written: str, told: str) -> None:
    expected = "4:12: error: models.m.draft: expected 'off', 'ngram' or 'name: value' pairs such as {path: FOLDER}, "
    assert fault(file, written) == expected + told


def test_the_bundled_models_have_a_name(file: Path) -> None:
    file.write_text("models: {m: {path: demo, draft: {path: demo}}}")
    model = load_config(file).models["m"]
    assert model.draft is not None
    assert (model.path, model.draft.path) == (target_path(), draft_path())
    file.write_text("models: {m: {path: ./demo}}")
    with pytest.raises(ConfigError, match=f"{file.parent}/demo: no such folder"):
        load_config(file)
    with pytest.raises(ConfigError, match=r"required, but not given: a folder, a \.gguf file, or demo$"):
        load_config(None, ["models.demo.draft=off"])


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("2", "must be at most 1.0, not 2: it is a share, 0.5 for one in two"),
        ("1.5", "must be at most 1.0, not 1.5: it is a share, 0.5 for one in two"),
        ("50%", "expected a number from 0 to 1, not '50%'; did you mean 0.5?"),
        ("x%", "expected a number from 0 to 1, not 'x%'"),
        ("-1", "must be at least 0.0, not -1"),
        ("half", "expected a number, not 'half'"),
    ],
)
def test_a_share_is_a_number_up_to_one(file: Path, value: str, told: str) -> None:
    written = f"{{path: demo, min_acceptance: {value}}}"
    if "%" in value:
        written = f"{{path: demo, min_acceptance: '{value}'}}"
    assert fault(file, written) == f"4:41: error: models.m.draft.min_acceptance: {told}"
