"""What a configuration asks for that could not be served: told from the models' headers and this machine, at once.

Runs in: anywhere (no torch; calls may block); owns: nothing.
"""

import os
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path as FilePath

from edgekv.config.document import Path
from edgekv.config.model_path import gguf_at
from edgekv.config.settings import Config, Model, ModelDraft
from edgekv.demo import target_path
from edgekv.engine.draft_errors import DraftPoolTooSmall, check_is_model, told_of_draft
from edgekv.engine.kernel_needs import NotServedHere, not_served, why_not_served
from edgekv.engine.settings import ContextTooLong, EngineSettings, read_draft, weigh_draft
from edgekv.errors import ModelError
from edgekv.model.hf_config import read_generation_config, read_spec
from edgekv.model.no_weights import has_weights, no_weights
from edgekv.model.quantised_before import quantised_before
from edgekv.model.weight_table import read_weight_table
from edgekv.smi.device import Place, choose_place
from edgekv.text.chat_template import load_chat_template
from edgekv.text.same_vocabulary import check_same_vocabulary
from edgekv.text.tokenizer import Tokenizer, load_tokenizer


def unservable(config: Config) -> Iterator[tuple[Path, str]]:
    """Where in a sound configuration, and why. Nothing is loaded or compiled: of weights the headers are read.

    Of cards, only "auto" is looked up: one that is named may well be in another machine.
    """
    for name, model in config.models.items():
        where = ("models", name)
        tokenizer = yield from _faults(config, model, where)
        if model.draft is not None and model.draft.method == "model" and model.draft.path is not None:
            yield from _draft_faults(config, model, model.draft, model.draft.path.absolute(), tokenizer, where)
    if not config.models:
        yield from _faults(config, Model.model_construct(path=target_path(), aliases=()), ("models", "demo"))


def check_drafts_tokens(model: FilePath, draft: FilePath) -> None:
    """Raise ModelError where there is no draft, or its token ids are not the model's, if both have a tokenizer."""
    draft = draft.absolute()
    check_is_model(draft)
    try:
        tokenizers = load_tokenizer(model), load_tokenizer(draft)
    except ModelError:
        return
    check_same_vocabulary(*tokenizers, draft_at=draft)


def _faults(config: Config, model: Model, where: Path) -> Generator[tuple[Path, str], None, Tokenizer | None]:
    """Also returns the tokenizer, if it can be had."""
    folder, tokenizer = model.path, None
    try:
        spec = read_spec(folder)
        before = quantised_before(folder)
        _check_weights_are_there(folder)
    except ModelError as error:
        yield (*where, "path"), str(error)
        return None
    try:
        read_weight_table(folder, spec)
    except ModelError as error:
        yield (*where, "path"), str(error)
    try:
        tokenizer = load_tokenizer(folder)
        load_chat_template(folder)
        read_generation_config(folder)
    except ModelError as error:
        yield (*where, "path"), str(error)
    settings = EngineSettings.from_config(config, model, Place("cpu", "cpu", "CPU", 0))
    if settings.context_tokens is not None and settings.context_tokens > spec.max_position_embeddings:
        yield (*where, "context"), str(ContextTooLong(settings.context_tokens, spec.max_position_embeddings))
    needs = dict(not_served(settings, native=False))
    if "weights" in needs and before is not None:
        del needs["weights"]
        what = f"is for weights that are not quantised, and the model's are {before} already"
        yield (*where, "weights"), f"{model.weights} {what}: leave it at auto, or take another file"
    if not needs:
        return tokenizer
    settings = replace(settings, place=_place(config, model))
    paths: dict[str, Path] = {"weights": (*where, "weights")}
    paths["kv.dtype"] = ("kv", "dtype") if model.kv.dtype is None else (*where, "kv", "dtype")
    for setting, value in needs.items():
        if (lacking := why_not_served(settings, spec, setting)) is not None:
            yield paths[setting], NotServedHere(setting, value, lacking).advice
    return tokenizer


def _draft_faults(
    config: Config, model: Model, draft: ModelDraft, folder: FilePath, of_target: Tokenizer | None, where: Path
) -> Iterator[tuple[Path, str]]:
    try:
        with told_of_draft(folder):
            _check_weights_are_there(folder)
            files = read_draft(folder)
            tokenizer = load_tokenizer(folder)
            if of_target is not None:
                check_same_vocabulary(of_target, tokenizer, draft_at=folder)
    except ModelError as error:
        yield (*where, "draft", "path"), str(error)
        return
    if draft.kv.dtype != "auto":
        asked = EngineSettings(folder, _place(config, model), kv_dtype=draft.kv.dtype, block_size=config.kv.block_size)
        for setting, value in not_served(asked, native=False):
            name = f"draft.{setting}"
            if (lacking := why_not_served(asked, files.spec, name)) is not None:
                yield (*where, "draft", "kv", "dtype"), NotServedHere(name, value, lacking).advice
                return
    if isinstance(draft.kv.budget, int):
        try:
            weigh_draft(EngineSettings.from_config(config, model, _place(config, model)), files)
        except DraftPoolTooSmall as error:
            yield (*where, "draft", "kv", "budget"), error.advice
        except ModelError as error:
            yield (*where, "draft", "path"), str(error)


def _check_weights_are_there(folder: FilePath) -> None:
    if gguf_at(folder) is None and not has_weights(folder):
        raise no_weights(folder)


def _place(config: Config, model: Model) -> Place:
    """The kind of device that the model goes to; its memory is left open."""
    if model.device == "auto":
        return choose_place(model.device, config.devices, dict(os.environ))
    if model.device == "cpu" or config.devices[model.device].match.vendor == "cpu":
        return Place("cpu", "cpu", "CPU", 0)
    return Place("card", "cuda:0", model.device, 0)
