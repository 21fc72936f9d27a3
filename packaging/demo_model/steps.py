"""What a training run tells of itself: its progress after each step, its result at the end.

Runs in: anywhere, without torch, so that the process that only watches stays light; owns: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """What a watcher is told after each step."""

    step: int
    steps: int
    loss: float
    tokens_per_s: float  # since this process began
    seconds_left: float


@dataclass(frozen=True)
class Result:
    """The outcome of one run, for the report."""

    parameters: int
    steps: int
    tokens: int
    seconds: float  # of this process alone, where a run was resumed
    train_loss: float  # mean of the last 50 steps
    validation_loss: float
    documents: int
    corpus_sha256: str
