"""Make one model from nothing: tokenizer, token row, training, export. Both models may be made side by side.

Runs in: a process of its own for each model; owns: the folder of that model.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from .corpus import SEED, documents
from .data import TOKENIZER_DOCUMENTS, plain_lines, token_row, validation_windows
from .export import export, load_weights, save_weights
from .loop import Losses, Recipe, train
from .model import Llama
from .recipes import MODEL_SEED, MODELS, THREADS
from .steps import Progress, Result
from .tokenizer import equivalent_json, train_sentencepiece


def result_path(work: Path, name: str) -> Path:
    """Where the result of a finished model is kept until the whole run is finished."""
    return work / f"{name}.json"


def train_rounds(
    name: str,
    model: Llama,
    recipes: tuple[Recipe, ...],
    row: NDArray[np.uint16],
    validation: Tensor,
    work: Path,
    watch: Callable[[str, Progress], None],
) -> list[Losses]:
    """Train ``model`` in place, round by round. A round that ``work`` holds already is read from there."""
    done, used = [], 0
    for number, recipe in enumerate(recipes, 1):
        weights, losses = work / f"{name}-round{number}.safetensors", work / f"{name}-round{number}.json"
        if losses.exists():
            load_weights(model, weights)
            done.append(Losses(**json.loads(losses.read_text())))
        else:
            label = name if len(recipes) == 1 else f"{name} round {number}"
            checkpoint = work / f"{name}-checkpoint.safetensors"
            done.append(train(model, recipe, row[used:], validation, checkpoint, partial(watch, label)))
            work.mkdir(parents=True, exist_ok=True)
            save_weights(model, weights)
            load_weights(model, weights)
            losses.write_text(json.dumps(asdict(done[-1])))
            checkpoint.unlink(missing_ok=True)
        used += recipe.num_tokens
    return done


def build(name: str, steps: int | None, out: Path, work: Path, watch: Callable[[str, Progress], None]) -> Result:
    """Train and export the model called ``name``; ``steps`` shortens each round. Resumes from ``work``."""
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    shape, recipes = MODELS[name]
    if steps is not None:
        recipes = tuple(replace(recipe, steps=steps) for recipe in recipes)
    num_tokens = sum(recipe.num_tokens for recipe in recipes)
    tokenizer_bytes = train_sentencepiece(plain_lines(documents(SEED, TOKENIZER_DOCUMENTS)))
    tokenizer = Tokenizer.from_str(equivalent_json(tokenizer_bytes))
    row, corpus_sha256, num_documents = token_row(tokenizer, SEED, num_tokens + 1)
    validation = validation_windows(tokenizer, SEED, 512)
    model = Llama(shape, MODEL_SEED)
    rounds = train_rounds(name, model, recipes, row, validation, work, watch)
    export(model, tokenizer_bytes, out / name)
    result = Result(
        parameters=model.num_parameters(),
        steps=sum(recipe.steps for recipe in recipes),
        tokens=num_tokens,
        seconds=round(sum(losses.seconds for losses in rounds), 1),
        train_loss=rounds[-1].train,
        validation_loss=rounds[-1].validation,
        documents=num_documents,
        corpus_sha256=corpus_sha256,
    )
    result_path(work, name).write_text(json.dumps(asdict(result)))
    for path in work.glob(f"{name}-round*"):
        path.unlink()
    return result
