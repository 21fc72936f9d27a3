"""The two models and how each is trained: everything that decides the committed weights, apart from the corpus.

Runs in: the training process; owns: nothing.
"""

from __future__ import annotations

from dataclasses import replace

from .loop import Recipe
from .model import LlamaShape
from .tokenizer import VOCAB_SIZE

THREADS = 1  # part of the recipe: more threads add up in another order
MODEL_SEED = 7

TARGET_SHAPE = LlamaShape(
    vocab_size=VOCAB_SIZE,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
)
DRAFT_SHAPE = replace(
    TARGET_SHAPE,
    hidden_size=128,
    intermediate_size=320,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)
# A model is trained in rounds: each starts from the weights of the one before, rounded to bfloat16 as they are stored,
# with a fresh optimiser and with documents that no earlier round has used.
MODELS = {
    "target": (TARGET_SHAPE, (Recipe(steps=1700, peak_rate=3e-3), Recipe(steps=1100, peak_rate=1.5e-3))),
    "draft": (DRAFT_SHAPE, (Recipe(steps=2000, peak_rate=6e-3),)),
}
