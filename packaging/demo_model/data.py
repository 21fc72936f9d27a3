"""From documents to batches: one long row of token ids, cut into windows.

Runs in: the training process; owns: the token array. No document is seen twice: the row is as long as training
needs, and every window is used once, in order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from .corpus import Document, documents
from .tokenizer import BOS_ID, EOS_ID

TOKENIZER_DOCUMENTS = 8000  # enough for every word of the templates to be seen often
VALIDATION_START = 10_000_000  # far past any training document
VALIDATION_DOCUMENTS = 400


@dataclass(frozen=True)
class Phase:
    """Part of the training: from the step at ``begins`` (a share of all steps) windows have ``length`` tokens."""

    begins: float
    length: int
    windows: int  # in one forward pass


def plain_lines(texts: Iterable[Document]) -> Iterator[str]:
    """Lines for tokenizer training: ASCII only, so that emoji and other scripts are left to the byte fallback."""
    for text in texts:
        pieces = [message.content for message in text.chat] if text.chat else [text.prose or ""]
        for piece in pieces:
            yield from (line for line in piece.split("\n") if line and line.isascii())


def encode_document(tokenizer: Tokenizer, doc: Document, rng: Random) -> list[int]:
    """Ids of one document.

    Prose stands between <s> and </s>; chats start with <s> half of the time, since some servers put it before a chat
    and the template does not.
    """
    ids: list[int] = tokenizer.encode(doc.text(), add_special_tokens=False).ids
    if doc.chat is None:
        return [BOS_ID, *ids, EOS_ID]
    return [BOS_ID, *ids] if rng.random() < 0.5 else ids


def token_row(tokenizer: Tokenizer, seed: int, num_tokens: int) -> tuple[NDArray[np.uint16], str, int]:
    """At least ``num_tokens`` ids, the sha256 of the texts behind them and how many documents there are."""
    rng, digest = Random(f"{seed}/packing"), hashlib.sha256()
    row: list[NDArray[np.uint16]] = []
    filled = count = 0
    while filled < num_tokens:
        for doc in documents(seed, 500, start=count):
            digest.update(doc.text().encode() + b"\0")
            row.append(np.array(encode_document(tokenizer, doc, rng), dtype=np.uint16))
            filled += len(row[-1])
        count += 500
    return np.concatenate(row), digest.hexdigest(), count


def validation_windows(tokenizer: Tokenizer, seed: int, length: int) -> Tensor:
    """Documents that training never sees, [windows, length + 1]."""
    rng = Random(f"{seed}/validation")
    docs = documents(seed, VALIDATION_DOCUMENTS, start=VALIDATION_START)
    row = np.concatenate([np.array(encode_document(tokenizer, doc, rng), dtype=np.int64) for doc in docs])
    count = (len(row) - 1) // length
    return torch.stack([torch.from_numpy(row[i * length : (i + 1) * length + 1]) for i in range(count)])


def batch_at(row: NDArray[np.uint16], step: int, batch_tokens: int, phase: Phase) -> list[Tensor]:
    """The micro-batches of one step, each [windows, length + 1]; a function of the step alone, so a run can resume."""
    start = step * batch_tokens
    starts = range(start, start + batch_tokens, phase.length)
    windows = [torch.from_numpy(row[s : s + phase.length + 1].astype(np.int64)) for s in starts]
    return [torch.stack(windows[i : i + phase.windows]) for i in range(0, len(windows), phase.windows)]
