"""The training loop: AdamW with a warm-up and a straight line down to zero, bfloat16 products, float32 sums.

Runs in: the training process; owns: the model while it learns, the optimiser and the checkpoints. Everything a step
does follows from the seed and the step's number, so a run that is stopped and resumed ends in the same weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .data import Phase, batch_at
from .model import Llama
from .steps import Progress

CHECKPOINT_EVERY = 200


@dataclass(frozen=True)
class Recipe:
    """How one model is trained; the defaults are what the committed weights were made with."""

    steps: int
    peak_rate: float
    batch_tokens: int = 4096
    warmup_steps: int = 100
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    phases: tuple[Phase, ...] = (Phase(0.0, 512, 4), Phase(0.9, 2048, 1))

    @property
    def num_tokens(self) -> int:
        """How many tokens all steps together read."""
        return self.steps * self.batch_tokens

    def phase(self, step: int) -> Phase:
        """The phase that ``step`` belongs to."""
        return [phase for phase in self.phases if step >= phase.begins * self.steps][-1]

    def rate(self, step: int) -> float:
        """The learning rate of ``step``: up during the warm-up, then down to zero (arXiv:2502.15938)."""
        warmup = min(self.warmup_steps, self.steps // 4)
        if step < warmup:
            return self.peak_rate * (step + 1) / warmup
        return self.peak_rate * (self.steps - step) / (self.steps - warmup)


@dataclass(frozen=True)
class Losses:
    """Where a round ended, and how long this process took over it."""

    train: float  # mean of the last 50 steps
    validation: float
    seconds: float


def cross_entropy(model: Llama, windows: Tensor) -> Tensor:
    """Mean loss per token of ``windows`` [windows, length + 1]."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


def make_optimiser(model: Llama, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves norms alone."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.peak_rate, betas=(0.9, 0.95), eps=1e-8)


def validate(model: Llama, windows: Tensor) -> float:
    """Mean loss over the validation windows."""
    with torch.no_grad():
        groups = [windows[i : i + 4] for i in range(0, len(windows), 4)]
        return float(torch.stack([cross_entropy(model, group) for group in groups]).mean())


def save_checkpoint(path: Path, model: Llama, optimiser: torch.optim.AdamW, recipe: Recipe, step: int) -> None:
    """Weights and moments in one safetensors file, written beside its place and then moved there."""
    tensors = {}
    for name, parameter in model.named_parameters():
        state = optimiser.state[parameter]
        tensors[f"weight/{name}"] = parameter.detach()
        tensors[f"mean/{name}"] = state["exp_avg"]
        tensors[f"square/{name}"] = state["exp_avg_sq"]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"step": str(step), "recipe": str(asdict(recipe))})
    partial.replace(path)


def load_checkpoint(path: Path, model: Llama, optimiser: torch.optim.AdamW, recipe: Recipe) -> int:
    """Put a checkpoint into the model and the optimiser; the step to go on with.

    Raises ValueError if it was made with another recipe.
    """
    with safe_open(path, framework="pt") as file:
        if file.metadata()["recipe"] != str(asdict(recipe)):
            raise ValueError(f"{path} was made with another recipe; delete it to start afresh")
        step = int(file.metadata()["step"])
        for name, parameter in model.named_parameters():
            parameter.data.copy_(file.get_tensor(f"weight/{name}"))
            optimiser.state[parameter] = {
                "step": torch.tensor(float(step)),
                "exp_avg": file.get_tensor(f"mean/{name}"),
                "exp_avg_sq": file.get_tensor(f"square/{name}"),
            }
    return step


def train(
    model: Llama,
    recipe: Recipe,
    row: NDArray[np.uint16],
    validation: Tensor,
    checkpoint: Path,
    watch: Callable[[Progress], None],
) -> Losses:
    """Train ``model`` in place on ``row``, from ``checkpoint`` if there is one."""
    optimiser = make_optimiser(model, recipe)
    first = load_checkpoint(checkpoint, model, optimiser, recipe) if checkpoint.exists() else 0
    began, losses = time.monotonic(), []
    for step in range(first, recipe.steps):
        for group in optimiser.param_groups:
            group["lr"] = recipe.rate(step)
        batches = batch_at(row, step, recipe.batch_tokens, recipe.phase(step))
        total = 0.0
        for batch in batches:
            loss = cross_entropy(model, batch) / len(batches)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(total)
        done = step + 1
        seconds = time.monotonic() - began
        speed = (done - first) / seconds  # steps per second
        watch(Progress(done, recipe.steps, total, speed * recipe.batch_tokens, (recipe.steps - done) / speed))
        if done % CHECKPOINT_EVERY == 0 and done < recipe.steps:
            save_checkpoint(checkpoint, model, optimiser, recipe, done)
    recent = losses[-50:]
    seconds = time.monotonic() - began
    last = sum(recent) / len(recent) if recent else float("nan")
    return Losses(round(last, 4), round(validate(model, validation), 4), round(seconds, 1))
