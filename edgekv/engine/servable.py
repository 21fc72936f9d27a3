"""What a configuration asks for that could not be served: told from the models' headers and this machine, at once.

Runs in: anywhere (no torch; calls may block); owns: nothing.
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path as FilePath

from edgekv.config.document import Path
from edgekv.config.model_path import gguf_at
from edgekv.config.settings import Config, Model
from edgekv.demo import target_path
from edgekv.engine.kernel_needs import NotServedHere, not_served, why_not_served
from edgekv.engine.settings import ContextTooLong, EngineSettings
from edgekv.errors import ModelError
from edgekv.model.hf_config import read_spec
from edgekv.model.no_weights import has_weights, no_weights
from edgekv.model.quantised_before import quantised_before
from edgekv.smi.device import Place, choose_place
from edgekv.text.same_vocabulary import check_same_vocabulary
from edgekv.text.tokenizer import load_tokenizer


def unservable(config: Config) -> Iterator[tuple[Path, str]]:
    """Where in a sound configuration, and why. Nothing is loaded or compiled.

    Of cards, only "auto" is looked up: one that is named may well be in another machine.
    """
    for name, model in config.models.items():
        yield from _faults(config, model, ("models", name))
        yield from _draft_faults(config, model, ("models", name, "draft"))
    if not config.models:
        yield from _faults(config, Model.model_construct(path=target_path(), aliases=()), ("models", "demo"))


def check_drafts_tokens(model: FilePath, draft: FilePath) -> None:
    """Raise ModelError where the draft's token ids are not the model's, as far as both have a tokenizer."""
    try:
        tokenizers = load_tokenizer(model), load_tokenizer(draft)
    except ModelError:
        return
    check_same_vocabulary(*tokenizers)


def _faults(config: Config, model: Model, where: Path) -> Iterator[tuple[Path, str]]:
    try:
        spec = read_spec(model.path)
        before = quantised_before(model.path)
        if gguf_at(model.path) is None and not has_weights(model.path):
            raise no_weights(model.path)
    except ModelError as error:
        yield (*where, "path"), str(error)
        return
    settings = EngineSettings.from_config(config, model, Place("cpu", "cpu", "CPU", 0))
    if settings.context_tokens is not None and settings.context_tokens > spec.max_position_embeddings:
        yield (*where, "context"), str(ContextTooLong(settings.context_tokens, spec.max_position_embeddings))
    needs = dict(not_served(settings, native=False))
    if "weights" in needs and before is not None:
        del needs["weights"]
        what = f"is for weights that are not quantised, and the model's are {before} already"
        yield (*where, "weights"), f"{model.weights} {what}: leave it at auto, or take another file"
    if not needs:
        return
    settings = replace(settings, place=_place(config, model))
    paths: dict[str, Path] = {"weights": (*where, "weights")}
    paths["kv.dtype"] = ("kv", "dtype") if model.kv.dtype is None else (*where, "kv", "dtype")
    for setting, value in needs.items():
        if (lacking := why_not_served(settings, spec, setting)) is not None:
            yield paths[setting], NotServedHere(setting, value, lacking).advice


def _draft_faults(config: Config, model: Model, where: Path) -> Iterator[tuple[Path, str]]:
    if model.draft is None or model.draft.path is None:
        return
    folder = model.draft.path
    try:
        spec = read_spec(folder)
        if gguf_at(folder) is None and not has_weights(folder):
            raise no_weights(folder)
        check_drafts_tokens(model.path, folder)
    except ModelError as error:
        yield (*where, "path"), str(error)
        return
    if model.draft.kv.dtype == "auto":
        return
    asked = EngineSettings(
        folder, _place(config, model), kv_dtype=model.draft.kv.dtype, block_size=config.kv.block_size
    )
    for setting, value in not_served(asked, native=False):
        name = f"draft.{setting}"
        if (lacking := why_not_served(asked, spec, name)) is not None:
            yield (*where, "kv", "dtype"), NotServedHere(name, value, lacking).advice


def _place(config: Config, model: Model) -> Place:
    """The kind of device that the model goes to; its memory is left open."""
    if model.device == "auto":
        return choose_place(model.device, config.devices, dict(os.environ))
    if model.device == "cpu" or config.devices[model.device].match.vendor == "cpu":
        return Place("cpu", "cpu", "CPU", 0)
    return Place("card", "cuda:0", model.device, 0)
